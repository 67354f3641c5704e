package agent

import (
	"context"
	"iter"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/runtime"
)

type containerKind int

const (
	regularContainer containerKind = iota
	initContainer
	sidecarContainer
	ephemeralContainer
)

// containersOf goes through all containers of a pod.
func containersOf(p *v1.Pod) iter.Seq2[*v1.Container, containerKind] {
	return func(yield func(*v1.Container, containerKind) bool) {
		for i := range p.Spec.InitContainers {
			c, kind := &p.Spec.InitContainers[i], initContainer
			if podutil.IsRestartableInitContainer(c) {
				kind = sidecarContainer
			}
			if !yield(c, kind) {
				return
			}
		}
		for i := range p.Spec.Containers {
			if !yield(&p.Spec.Containers[i], regularContainer) {
				return
			}
		}
		for i := range p.Spec.EphemeralContainers {
			if !yield((*v1.Container)(&p.Spec.EphemeralContainers[i].EphemeralContainerCommon), ephemeralContainer) {
				return
			}
		}
	}
}

func containerOf(p *v1.Pod, name string) (*v1.Container, containerKind) {
	for c, kind := range containersOf(p) {
		if c.Name == name {
			return c, kind
		}
	}
	return nil, regularContainer
}

func graceOf(p *v1.Pod) time.Duration {
	if s := p.Spec.TerminationGracePeriodSeconds; s != nil {
		return time.Duration(*s) * time.Second
	}
	return v1.DefaultTerminationGracePeriodSeconds * time.Second
}

// readMessage adds to an ended run what its container left to say.
func (x *actor) readMessage(r *pod.Run) {
	p := x.pod()
	c, _ := containerOf(p, r.Name)
	if r.State != runtime.Exited || r.Message != "" || c == nil {
		return
	}
	message, err := x.a.Volumes.TerminationMessage(context.Background(), p, c, r.Attempt, r.Log, r.ExitCode != 0)
	if err != nil {
		message = "Error on reading termination message: " + err.Error()
	}
	if r.CoreDumped {
		message = strings.TrimPrefix(message+"\n"+r.Signal.String()+", memory dumped to where /proc/sys/kernel/core_pattern says", "\n")
	}
	r.Message = message
}
