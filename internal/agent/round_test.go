package agent

import (
	"slices"
	"testing"

	v1 "k8s.io/api/core/v1"
)

// All containers are restarted once, and a new agent knows that they were.
func TestRestartOfAll(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) {
		never := v1.ContainerRestartPolicyNever
		p.Spec.RestartPolicy = v1.RestartPolicyNever
		p.Spec.InitContainers = []v1.Container{container("first")}
		p.Spec.Containers[0].RestartPolicy = &never
		p.Spec.Containers[0].RestartPolicyRules = []v1.ContainerRestartRule{{
			Action:    v1.ContainerRestartRuleActionRestartAllContainers,
			ExitCodes: &v1.ContainerRestartRuleOnExitCodes{Operator: v1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}},
		}}
		p.Spec.Containers = append(p.Spec.Containers, container("other"))
	})
	b.until("first runs", func() bool { return slices.Contains(b.m.notes(), "start first 0") })
	b.m.exit(b.id("first", 0), 0)
	b.ready()
	b.m.exit(b.id("main", 0), 42)
	b.until("first runs again", func() bool { return slices.Contains(b.m.notes(), "start first 1") })
	if phase := b.pod().Status.Phase; phase != v1.PodRunning {
		t.Errorf("phase %s while all restart", phase)
	}
	b.m.exit(b.id("first", 1), 0)
	b.ready()
	b.stop()
	b.start()
	b.m.exit(b.id("main", 1), 0)
	b.m.exit(b.id("other", 1), 0)
	b.until("pod has succeeded", func() bool { return b.pod().Status.Phase == v1.PodSucceeded })
	b.until("pod is closed", func() bool { return slices.Contains(b.m.notes(), "close") })
	notes := b.m.notes()
	slices.Sort(notes)
	if want := []string{"close", "start first 0", "start first 1", "start main 0", "start main 1", "start other 0", "start other 1", "terminated other"}; !slices.Equal(notes[len(notes)-len(want):], want) {
		t.Errorf("did %q, want %q", notes, want)
	}
}
