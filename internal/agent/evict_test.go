package agent

import (
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/agent/translate"
)

func TestEvict(t *testing.T) {
	b := newBench(t)
	b.m.ignore[syscall.SIGTERM] = true // it would take 30 s
	b.create(nil)
	b.ready()
	e := evictor{b.agent}
	log := translate.Log(b.dir, "default", "web", "uid-"+b.Name(), "main", 0)
	if err := os.WriteFile(log, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	pods := e.Active()
	if len(pods) != 1 || e.Closed(pods[0]) {
		t.Fatalf("active: %+v", pods)
	}
	begun, grace := time.Now(), int64(1)
	if err := e.Evict(pods[0], true, &grace, func(s *v1.PodStatus) {
		s.Phase, s.Reason, s.Message = v1.PodFailed, "Evicted", "no room"
	}); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begun); took > 8*time.Second {
		t.Errorf("it took %v", took)
	}
	if len(e.Active()) != 0 {
		t.Error("it is still active")
	}
	b.until("the pod has failed", func() bool { return b.pod().Status.Phase == v1.PodFailed })
	if s := b.pod().Status; s.Reason != "Evicted" || s.Message != "no room" {
		t.Errorf("told %s, %s", s.Reason, s.Message)
	}
	b.until("nothing is left of it", func() bool {
		_, err := os.Stat(filepath.Dir(filepath.Dir(log)))
		return e.Closed(pods[0]) && os.IsNotExist(err)
	})
	if got, want := b.m.notes(), []string{"start main 0", "terminated main", "killed main", "close"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
}

// Logs of finished pods make room when there is none; those of others stay.
func TestRemoveDead(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyNever })
	b.ready()
	e := evictor{b.agent}
	dir := translate.LogDir(b.dir, "default", "web", "uid-"+b.Name())
	if err := e.RemoveDead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the logs of a pod that runs: %v", err)
	}
	b.m.exit(b.id("main", 0), 0)
	b.until("the pod is closed", func() bool { return b.pod().Status.Phase == v1.PodSucceeded && e.Closed(b.pod()) })
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("the logs of a pod that has just finished: %v", err)
	}
	if err := e.RemoveDead(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("the logs of a finished pod are still there: %v", err)
	}
}
