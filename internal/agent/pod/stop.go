package pod

import (
	"time"

	v1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/runtime"
)

// stopAll stops everything that runs: regular and init containers at once,
// sidecars after them and in reverse order. It says whether nothing runs any
// more and nothing is about to.
func (d *decider) stopAll() bool {
	const why = "Stopping container %s"
	o := d.o
	grace := o.grace()
	busy := false
	stopOne := func(c *v1.Container, turn bool) bool {
		running := false
		for i := range o.Runs {
			if r := &o.Runs[i]; r.Name == c.Name && r.State == runtime.Running {
				d.stop(r, c, grace, turn, false, why)
				running = true
			}
		}
		return running
	}
	named := map[string]bool{}
	for _, list := range [][]v1.Container{o.Pod.Spec.Containers, ephemeral(o.Pod)} {
		for i := range list {
			named[list[i].Name] = true
			busy = stopOne(&list[i], true) || busy
		}
	}
	inits := o.Pod.Spec.InitContainers
	for i := len(inits) - 1; i >= 0; i-- {
		named[inits[i].Name] = true
		busy = stopOne(&inits[i], !sidecar(&inits[i]) || !busy) || busy
	}
	// What the specification does not name (a pod known only by what runs of
	// it) stops too.
	for i := range o.Runs {
		if r := &o.Runs[i]; !named[r.Name] && r.State == runtime.Running {
			d.stop(r, &v1.Container{Name: r.Name}, grace, true, false, why)
			busy = true
		}
	}
	return !busy && !o.starting()
}

// stop brings the graceful end of one run forward: preStop hook, stop signal
// when its turn has come, SIGKILL at the end of the grace. The hook counts in
// the grace; between signal and SIGKILL are never less than two seconds.
func (d *decider) stop(r *Run, c *v1.Container, grace time.Duration, turn, restart bool, why string) {
	o := d.o
	s, begun := o.Stops[r.ID]
	if !begun {
		d.step(Step{Do: BeginStop, Container: c.Name, ID: r.ID, Grace: grace, Restart: restart, Why: why})
		return
	}
	deadline := s.Begun.Add(min(grace, s.Grace))
	expired := !o.Now.Before(deadline)
	if s.Terminated.IsZero() {
		if (s.Hook || !turn) && !expired {
			d.wake(deadline)
			return
		}
		d.step(Step{Do: Terminate, Container: c.Name, ID: r.ID})
		return
	}
	kill := s.Terminated.Add(minimumGrace)
	if deadline.After(kill) {
		kill = deadline
	}
	if !s.Killed.IsZero() {
		kill = s.Killed.Add(killAgain)
	}
	if o.Now.Before(kill) {
		d.wake(kill)
		return
	}
	d.step(Step{Do: Kill, Container: c.Name, ID: r.ID})
}

func ephemeral(pod *v1.Pod) []v1.Container {
	list := make([]v1.Container, 0, len(pod.Spec.EphemeralContainers))
	for i := range pod.Spec.EphemeralContainers {
		list = append(list, v1.Container(pod.Spec.EphemeralContainers[i].EphemeralContainerCommon))
	}
	return list
}
