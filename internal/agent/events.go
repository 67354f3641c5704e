package agent

import (
	"fmt"
	"strings"

	v1 "k8s.io/api/core/v1"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"tutti.dev/tutti/internal/agent/pod"
)

// event tells the pod's owner something about the pod, or one container of
// it.
func (a *Agent) event(p *v1.Pod, container, kind, reason, message string) {
	if p.Name == "" {
		return // known only by what was left of it
	}
	if c, _ := containerOf(p, container); c != nil {
		if ref, err := kubecontainer.GenerateContainerRef(p, c); err == nil {
			a.recorder.Event(ref, kind, reason, message)
			return
		}
	}
	a.recorder.Event(p, kind, reason, message)
}

// outOfMemory are the runs that ended for want of memory, by container, as far
// as a status knows.
func outOfMemory(s *v1.PodStatus) map[string]string {
	m := map[string]string{}
	for _, list := range [][]v1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			for _, state := range []v1.ContainerState{list[i].LastTerminationState, list[i].State} {
				if t := state.Terminated; t != nil && t.Reason == pod.ReasonOOM {
					m[list[i].Name] = t.ContainerID
				}
			}
		}
	}
	return m
}

// report tells of what shows only as a change of status: that a container is
// being held back, or was killed for its memory.
func (a *Agent) report(p *v1.Pod, before, after *v1.PodStatus) {
	waiting := func(s *v1.PodStatus) map[string]string {
		m := map[string]string{}
		for _, list := range [][]v1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses} {
			for i := range list {
				if w := list[i].State.Waiting; w != nil {
					m[list[i].Name] = w.Reason
				}
			}
		}
		return m
	}
	killed := outOfMemory(before)
	for name, run := range outOfMemory(after) {
		if run != killed[name] {
			a.event(p, name, v1.EventTypeWarning, pod.ReasonOOM, fmt.Sprintf("Container %s was killed: it wanted more memory than its limit", name))
		}
	}
	was := waiting(before)
	for name, reason := range waiting(after) {
		if reason == was[name] {
			continue
		}
		switch reason {
		case pod.ReasonCrashLoop:
			a.event(p, name, v1.EventTypeWarning, events.BackOffStartContainer, fmt.Sprintf(
				"Back-off restarting failed container %s in pod %s_%s(%s)", name, p.Name, p.Namespace, p.UID))
		case pod.ReasonImageBackOff:
			if c, _ := containerOf(p, name); c != nil {
				a.event(p, name, v1.EventTypeNormal, events.BackOffPullImage, fmt.Sprintf("Back-off pulling image %q", c.Image))
			}
			a.event(p, name, v1.EventTypeWarning, events.FailedToPullImage, "Error: "+pod.ReasonImageBackOff)
		}
	}
}

// withName puts a container's name into a message that has a place for it.
func withName(message, name string) string {
	return strings.Replace(message, "%s", name, 1)
}
