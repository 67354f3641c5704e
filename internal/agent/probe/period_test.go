package probe

import (
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestPeriodAnnotations(t *testing.T) {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{
		PeriodAnnotation: "100ms", "web." + PeriodAnnotation: "50ms", "slow." + PeriodAnnotation: "1ms",
	}}}
	for container, want := range map[string]time.Duration{"web": 50 * time.Millisecond, "db": 100 * time.Millisecond, "slow": 100 * time.Millisecond} {
		if got := periodOf(p, container); got != want {
			t.Errorf("period of %s is %s, want %s", container, got, want)
		}
	}
	p.Annotations = nil
	if got := periodOf(p, "web"); got != 0 {
		t.Errorf("period without an annotation is %s", got)
	}
	f := newFixture(t, map[string][]string{"live": {"fail"}})
	begun := time.Now()
	f.Add(pod("40ms"), &v1.Container{Name: "c", LivenessProbe: exec("live")}, id, "127.0.0.1")
	f.until("failed", func(r Result) bool { return r.LivenessFailed })
	if took := time.Since(begun); took < 120*time.Millisecond || took > 5*time.Second {
		t.Errorf("three failures 40 ms apart took %s", took)
	}
}

func TestInitialDelay(t *testing.T) {
	f := newFixture(t, map[string][]string{"ready": {"ok"}})
	p := exec("ready")
	p.InitialDelaySeconds = 1
	begun := time.Now()
	f.Add(pod(""), &v1.Container{Name: "c", ReadinessProbe: p}, id, "127.0.0.1")
	f.until("ready", ready)
	if took := time.Since(begun); took < time.Second {
		t.Errorf("asked after %s", took)
	}
}
