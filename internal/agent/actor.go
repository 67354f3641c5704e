package agent

import (
	"context"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/runtime"
)

// underway is a step that is being carried out.
type underway struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// held is an image of one of the pod's containers.
type held struct {
	image.Image
	layers []string
}

// actor brings one pod forward. Its loop is the only one that decides; steps
// run on their own and report by change.
type actor struct {
	a      *Agent
	uid    string
	absent bool // the informer does not have the pod any more; guarded by a.mu

	wake  chan struct{}
	done  chan struct{} // closed when the loop has ended
	still chan struct{} // closed when the pod was halted or evicted and nothing runs

	mu     sync.Mutex
	o      pod.Observed
	rt     runtime.Runtime
	netns  string              // path of the pod\'s network namespace
	steps  map[string]underway // by key of the step
	images map[string]held     // by container

	resizing sync.Mutex // held while it is asked whether new resources fit

	status statusWriter
	halted func() // closes still, once
}

func newActor(a *Agent, p *v1.Pod, runs []pod.Run) *actor {
	x := &actor{
		a: a, uid: string(p.UID),
		wake: make(chan struct{}, 1), done: make(chan struct{}), still: make(chan struct{}),
		steps: map[string]underway{}, images: map[string]held{},
		o: pod.Observed{
			Pod: p, Prior: *p.Status.DeepCopy(),
			Containers: map[string]pod.Container{},
			Stops:      map[runtime.ID]pod.Stop{},
			Probes:     map[runtime.ID]pod.Probe{},
			HostIPs:    a.hostIPs(),
		},
	}
	x.status.init(x)
	x.halted = sync.OnceFunc(func() { close(x.still) })
	x.o.Runs = pod.Recover(p, runs, time.Now())
	for i := range x.o.Runs {
		x.readMessage(&x.o.Runs[i])
	}
	return x
}

// kick makes the loop look again.
func (x *actor) kick() {
	select {
	case x.wake <- struct{}{}:
	default:
	}
}

// change changes what is observed and makes the loop look at it.
func (x *actor) change(f func(o *pod.Observed)) {
	x.mu.Lock()
	f(&x.o)
	x.mu.Unlock()
	x.kick()
}

// container changes what is remembered of one attempt of a container; nothing
// if a later attempt has begun.
func (x *actor) container(id runtime.ID, f func(c *pod.Container)) {
	x.change(func(o *pod.Observed) {
		c := o.Containers[id.Name]
		if c.Attempt > id.Attempt {
			return
		}
		if c.Attempt < id.Attempt {
			c = pod.Container{Attempt: id.Attempt, Crash: c.Crash}
		}
		f(&c)
		o.Containers[id.Name] = c
	})
}

// setPod takes a newer version of the pod from the API.
func (x *actor) setPod(p *v1.Pod) {
	var changed bool
	x.change(func(o *pod.Observed) {
		if !newer(p, o.Pod) {
			return
		}
		if changed = p.Generation != o.Pod.Generation; changed {
			for name, c := range o.Containers {
				c.Unresized = nil
				o.Containers[name] = c
			}
			o.Considered++
		}
		if !maps.Equal(p.Labels, o.Pod.Labels) || !maps.Equal(p.Annotations, o.Pod.Annotations) {
			o.Volumes.Ready = false // some show labels and annotations
		}
		o.Pod = p
	})
	if changed {
		go x.considerResize()
	}
}

// considerResize asks whether the machine takes the pod with the resources
// that it has now. It may take long: others may have to be stopped first.
func (x *actor) considerResize() {
	x.resizing.Lock()
	defer x.resizing.Unlock()
	p := x.pod()
	refusal := x.a.gate.resize(p, x.a.node.Node())
	x.change(func(o *pod.Observed) { o.Resize, o.Considered = refusal, o.Considered-1 })
	if refusal == nil {
		x.a.room() // it may need less now
	}
}

// newer compares versions of one object; without versions (tests) the last
// to come counts.
func newer(p, than *v1.Pod) bool {
	a, errA := strconv.ParseUint(p.ResourceVersion, 10, 64)
	b, errB := strconv.ParseUint(than.ResourceVersion, 10, 64)
	return errA != nil || errB != nil || a >= b
}

// setRun takes what a runtime says of one workload. What has ended stays so.
func (x *actor) setRun(s runtime.Status) {
	r := pod.Run{Status: s}
	x.readMessage(&r)
	x.change(func(o *pod.Observed) {
		for i := range o.Runs {
			if o.Runs[i].ID != s.ID {
				continue
			}
			if o.Runs[i].State == runtime.Exited && s.State != runtime.Exited {
				return
			}
			o.Runs[i] = r
			return
		}
		o.Runs = append(o.Runs, r)
	})
	if s.State == runtime.Exited {
		x.a.Probes.Remove(s.ID)
	}
}

// setRuns takes everything that the pod's runtime has of it. What ran before
// it was asked and is not there any more has ended unseen.
func (x *actor) setRuns(before map[runtime.ID]bool, list []runtime.Status) {
	listed := map[runtime.ID]bool{}
	for _, s := range list {
		listed[s.ID] = true
		x.setRun(s)
	}
	x.change(func(o *pod.Observed) {
		for i := range o.Runs {
			if r := &o.Runs[i]; r.State == runtime.Running && before[r.ID] && !listed[r.ID] {
				r.State, r.Unknown, r.FinishedAt = runtime.Exited, true, time.Now()
				x.a.Probes.Remove(r.ID)
			}
		}
	})
}

// run is the actor's loop; it ends with ctx or with the pod.
func (x *actor) run(ctx context.Context) {
	defer close(x.done)
	x.resume()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		x.mu.Lock()
		d, before := x.decide()
		p, halt, gone, evicted := x.o.Pod, x.o.Halt, x.o.Gone, x.o.Evicted != nil
		x.mu.Unlock()
		told := p
		if kubetypes.IsStaticPod(p) {
			told = x.a.mirrorOf(p)
		}
		written := told == nil || equality.Semantic.DeepEqual(told.Status, d.Status)

		if !halt && !gone {
			x.a.report(p, &before, &d.Status)
			if !written {
				x.status.put(ctx, d.Status)
			}
		}
		if d.Still && (halt || evicted) {
			x.halted()
		}
		if podutil.IsPodPhaseTerminal(d.Status.Phase) {
			x.a.leave(x.uid)
		}
		for _, s := range d.Steps {
			x.begin(ctx, s)
		}
		if d.Done {
			x.a.forget(x)
			return
		}
		timer.Reset(time.Hour)
		if !d.Wake.IsZero() {
			timer.Reset(max(time.Until(d.Wake), time.Millisecond))
		}
		select {
		case <-ctx.Done():
			return
		case <-x.wake:
		case <-timer.C:
		}
	}
}

// decide asks what follows from what is observed now and returns it with the
// status decided before. x.mu is held.
func (x *actor) decide() (pod.Decision, v1.PodStatus) {
	x.o.Now = time.Now()
	for i := range x.o.Runs {
		if r := &x.o.Runs[i]; r.State == runtime.Running {
			p := x.a.Probes.Result(r.ID)
			x.o.Probes[r.ID] = pod.Probe{Started: p.Started, Ready: p.Ready, LivenessFailed: p.LivenessFailed, StartupFailed: p.StartupFailed}
		} else {
			delete(x.o.Probes, r.ID)
		}
	}
	before := x.o.Prior
	d := pod.Decide(&x.o)
	x.o.Prior = d.Status
	return d, before
}

func (x *actor) gone() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.o.Gone
}

// desired is the pod as the API wants it, with the status as it is here, so
// that what reads addresses from it reads the true ones.
func (x *actor) desired() *v1.Pod {
	x.mu.Lock()
	defer x.mu.Unlock()
	p := *x.o.Pod
	p.Status = x.o.Prior
	return &p
}

// resume takes up what ran before this agent did: probes of what runs, and
// the decision whether the machine takes the pod at all.
func (x *actor) resume() {
	p := x.desired()
	for c, kind := range containersOf(p) {
		for _, r := range x.runs() {
			if r.Name == c.Name && r.State == runtime.Running && kind != initContainer {
				x.a.Probes.Add(p, c, r.ID, p.Status.PodIP)
			}
		}
	}
	if x.gone() {
		return
	}
	if refusal := x.a.gate.take(p, len(x.runs()) > 0); refusal != nil {
		x.a.event(p, "", v1.EventTypeWarning, refusal.Reason, refusal.Message)
		x.change(func(o *pod.Observed) { o.Refusal = refusal })
	}
}

func (x *actor) runs() []pod.Run {
	x.mu.Lock()
	defer x.mu.Unlock()
	return append([]pod.Run(nil), x.o.Runs...)
}

// begin carries a step out on its own, unless the same is under way.
func (x *actor) begin(ctx context.Context, s pod.Step) {
	key := key(s.Do, s.ID)
	ctx, cancel := context.WithCancel(ctx)
	x.mu.Lock()
	if _, ok := x.steps[key]; ok {
		x.mu.Unlock()
		cancel()
		return
	}
	done := make(chan struct{})
	x.steps[key] = underway{cancel, done}
	if s.Do == pod.Start {
		c := x.o.Containers[s.Container]
		c.Starting = true
		x.o.Containers[s.Container] = c
	}
	x.mu.Unlock()
	go func() {
		x.carryOut(ctx, s)
		cancel()
		x.mu.Lock()
		delete(x.steps, key)
		x.mu.Unlock()
		close(done)
		x.kick()
	}()
}

// cancel ends a step that is under way.
func (x *actor) cancel(do pod.Action, id runtime.ID) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if u, ok := x.steps[key(do, id)]; ok {
		u.cancel()
	}
}

// othersUnderWay says whether the same is being done to others of the pod.
func (x *actor) othersUnderWay(s pod.Step) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for k := range x.steps {
		if k != key(s.Do, s.ID) && strings.HasPrefix(k, string(s.Do)+" ") {
			return true
		}
	}
	return false
}

// cancelOthers ends every other step that is under way and waits for that:
// what one of them still made would be left behind.
func (x *actor) cancelOthers(ctx context.Context, but string) error {
	x.mu.Lock()
	var others []underway
	for k, u := range x.steps {
		if k != but {
			u.cancel()
			others = append(others, u)
		}
	}
	x.mu.Unlock()
	for _, u := range others {
		select {
		case <-u.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func key(do pod.Action, id runtime.ID) string { return string(do) + " " + id.String() }
