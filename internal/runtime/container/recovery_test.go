package container

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// A server that ends while a workload is being started must leave to the next
// one what the keeper then runs.
func TestStartCutShort(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	const script = `echo here >/file; trap 'exit 7' TERM; while cat /file; do sleep 0.05; done`
	w := b.Workload("main", script)
	state := filepath.Join(m.Dir, "keeper", "runc", w.ID.String(), "state.json")
	ctx, cancel := context.WithCancel(b.Ctx)
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(state); err == nil { // its root is made, it is about to run
				cancel()
			}
		}
	}()
	if s, err := m.Start(ctx, w); err == nil {
		t.Skipf("it was started before it could be cut short: %s", runtimetest.Show(s))
	}
	if s := b.Start(w); s.State != runtime.Running {
		t.Fatalf("started: %s", runtimetest.Show(s))
	}
	b.AwaitLog(w, "here\n")
	if _, err := os.Stat(filepath.Join(m.attemptDir(w.ID), "upper", "file")); err != nil {
		t.Error("the writable layer is not the one that the workload writes to:", err)
	}
	if err := m.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := b.Wait(w.ID); s.ExitCode != 7 {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
}

// Whoever opens a pod and goes away does not keep another from closing it:
// nothing comes up later.
func TestClosedWhileOpening(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	for i := range 30 {
		pod := runtime.Pod{ID: fmt.Sprintf("%s%d", b.Pod.ID, i), Hostname: "bench", SharePID: true}
		pod.Cgroup = "burstable/pod" + pod.ID
		ctx, cancel := context.WithTimeout(b.Ctx, time.Duration(i)*time.Millisecond)
		_, _ = m.Open(ctx, pod)
		cancel()
		if err := m.Close(b.Ctx, pod.ID); err != nil {
			t.Fatal(err)
		}
	}
	// The last is waited for by opening one more, after it.
	last := runtime.Pod{ID: b.Pod.ID + "last", Hostname: "bench", SharePID: true, Cgroup: "burstable/podlast" + b.Pod.ID}
	if _, err := m.Open(b.Ctx, last); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(b.Ctx, last.ID); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Join(m.Dir, "keeper", "workloads")); err != nil || len(left) > 0 {
		t.Errorf("the keeper has %v, %v", left, err)
	}
}

// A record is not forced to the disk and may be empty after a power failure.
func TestEmptyRecordOfPod(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	if err := os.Truncate(filepath.Join(m.podDir(b.Pod.ID), podFile), 0); err != nil {
		t.Fatal(err)
	}
	m.Keeper.Close()
	m.connect()
	b.Runtime = m.Runtime
	if _, err := m.Open(b.Ctx, b.Pod); err != nil {
		t.Fatal(err)
	}
	b.Start(b.Workload("main", "sleep 1000"))
}
