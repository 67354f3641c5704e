package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/pressure"
	"tutti.dev/tutti/internal/agent/serve"
	"tutti.dev/tutti/internal/agent/translate"
)

// evictPatience is how long an evicted pod may take to end beyond its grace
// before the next is looked for.
const evictPatience = 10 * time.Second

// watchPressure makes what defends the machine against its pods; it is not
// running yet, but the gate asks it.
func (a *Agent) watchPressure() {
	m := pressure.New(pressure.Config{
		NodeName: a.NodeName, Thresholds: a.thresholds, Images: a.Images, Recorder: a.recorder, Log: a.log, Pods: evictor{a},
		Usage: &serve.Usage{NodeName: a.NodeName, Pods: a, Runtime: workloads{a}, Dir: a.DataDir},
	})
	a.mu.Lock()
	a.pressure = m
	a.mu.Unlock()
	a.gate.mu.Lock()
	defer a.gate.mu.Unlock()
	a.gate.rules = append([]lifecycle.PodAdmitHandler{m}, a.gate.rules...)
}

// short says whether the machine is short of what the condition is about.
func (a *Agent) short(kind v1.NodeConditionType) bool {
	a.mu.Lock()
	m := a.pressure
	a.mu.Unlock()
	return m != nil && m.Has(kind)
}

// evictor is the agent as package pressure needs it.
type evictor struct{ a *Agent }

func (e evictor) find(p *v1.Pod) *actor {
	e.a.mu.Lock()
	defer e.a.mu.Unlock()
	return e.a.actors[string(p.UID)]
}

// Active implements pressure.Pods.
func (e evictor) Active() []*v1.Pod {
	var list []*v1.Pod
	for _, x := range e.a.all() {
		x.mu.Lock()
		ends := x.o.Gone || x.o.Refusal != nil || x.o.Evicted != nil
		x.mu.Unlock()
		if p := x.desired(); !ends && !podutil.IsPodPhaseTerminal(p.Status.Phase) {
			list = append(list, p)
		}
	}
	return list
}

// Evict implements pressure.Pods.
func (e evictor) Evict(p *v1.Pod, _ bool, grace *int64, fn func(*v1.PodStatus)) error {
	x := e.find(p)
	if x == nil {
		return nil
	}
	status := x.desired().Status.DeepCopy()
	fn(status)
	eviction := &pod.Eviction{Reason: status.Reason, Message: status.Message, Grace: graceOf(p)}
	if grace != nil {
		eviction.Grace = time.Duration(*grace) * time.Second
	}
	_, eviction.Condition = podutil.GetPodCondition(status, v1.DisruptionTarget)
	e.a.log.Warn("evicting a pod", "pod", x.uid, "namespace", p.Namespace, "name", p.Name, "why", eviction.Message)
	x.change(func(o *pod.Observed) { o.Evicted = eviction })
	select {
	case <-x.still:
	case <-x.done:
	case <-time.After(eviction.Grace + evictPatience):
		return fmt.Errorf("evict pod %s/%s: it still runs", p.Namespace, p.Name)
	}
	return nil
}

// Closed implements pressure.Pods.
func (e evictor) Closed(p *v1.Pod) bool {
	x := e.find(p)
	if x == nil {
		return true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.o.Closed
}

// RemoveDead implements pressure.Pods.
func (e evictor) RemoveDead(context.Context) error {
	var errs []error
	for _, x := range e.a.all() {
		if p := x.desired(); podutil.IsPodPhaseTerminal(p.Status.Phase) && e.Closed(p) {
			errs = append(errs, x.removeLogs())
		}
	}
	return errors.Join(errs...)
}

func (x *actor) evicted() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.o.Evicted != nil
}

// removeLogs removes the logs of all the pod's containers.
func (x *actor) removeLogs() error {
	p := x.pod()
	if err := os.RemoveAll(translate.LogDir(x.a.DataDir, p.Namespace, p.Name, x.uid)); err != nil {
		return fmt.Errorf("remove logs: %w", err)
	}
	return nil
}
