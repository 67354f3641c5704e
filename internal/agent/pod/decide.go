package pod

import (
	"encoding/json"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"tutti.dev/tutti/internal/runtime"
)

// Action is a kind of step.
type Action string

const (
	// OpenGround attaches the pod's network and opens it in the runtime.
	OpenGround Action = "open ground"
	// PrepareVolumes makes the pod's volumes ready.
	PrepareVolumes Action = "prepare volumes"
	// GetImage finds, pulls if need be, and holds a container's image.
	GetImage Action = "get image"
	// Start starts the workload ID and runs its postStart hook.
	Start Action = "start"
	// BeginStop notes that ID is to end and runs its preStop hook.
	BeginStop Action = "begin stop"
	// Terminate sends the stop signal.
	Terminate Action = "terminate"
	// Kill sends SIGKILL.
	Kill Action = "kill"
	// Resize applies the container's resources to the running workload.
	Resize Action = "resize"
	// Remove forgets a run that nobody asks for any more.
	Remove Action = "remove"
	// Close removes everything of the pod from the machine but its logs.
	Close Action = "close"
	// Delete removes the pod from the API for good.
	Delete Action = "delete"
)

// Step is one thing to do. A step that is under way already is not begun
// again: deciding twice is harmless.
type Step struct {
	Do        Action
	Container string
	ID        runtime.ID
	Grace     time.Duration // of BeginStop
	Restart   bool          // of BeginStop
	Round     int           // of Start
	Why       string        // for the event of BeginStop
	// LessMemory says that a Resize lowers the memory limit.
	LessMemory bool
}

// Decision is what to do now, when to look again at the latest (zero: when
// something happens) and what to tell the API.
type Decision struct {
	Steps  []Step
	Wake   time.Time
	Status v1.PodStatus
	// Still says that nothing of the pod runs or is about to.
	Still bool
	// Done says that the pod is finished with: the API does not have it and
	// nothing of it is left here.
	Done bool
}

// end says whether and why a pod is not to run, or not any longer.
type end struct {
	is              bool
	failed          bool   // the phase is Failed whatever the containers say
	reason, message string // of the pod's status, when this machine gives one
}

type decider struct {
	o *Observed
	end
	Decision
}

// Decide says what to do next. It is level-triggered: the same observation
// gives the same decision, and steps done change the observation.
func Decide(o *Observed) Decision {
	d := &decider{o: o}
	d.end = d.ending()
	switch {
	case o.Halt:
		d.stopAll()
	case d.is:
		if d.stopAll() {
			d.finish()
		}
	default:
		d.run()
	}
	d.Still = !o.running() && !o.starting()
	d.Status = d.status()
	return d.Decision
}

func (d *decider) step(s Step) { d.Steps = append(d.Steps, s) }

func (d *decider) wake(t time.Time) {
	if d.Wake.IsZero() || t.Before(d.Wake) {
		d.Wake = t
	}
}

// ending says whether the pod is to stop, and why.
func (d *decider) ending() end {
	o := d.o
	switch {
	case o.Refusal != nil:
		return end{is: true, failed: true, reason: o.Refusal.Reason, message: "Pod was rejected: " + o.Refusal.Message}
	case o.Evicted != nil:
		return end{is: true, failed: true, reason: o.Evicted.Reason, message: o.Evicted.Message}
	case o.Gone, o.Pod.DeletionTimestamp != nil, podutil.IsPodPhaseTerminal(o.Pod.Status.Phase), podutil.IsPodPhaseTerminal(o.Prior.Phase):
		return end{is: true}
	}
	if s := o.Pod.Spec.ActiveDeadlineSeconds; s != nil && o.Prior.StartTime != nil {
		at := o.Prior.StartTime.Add(time.Duration(*s) * time.Second)
		if !o.Now.Before(at) {
			return end{is: true, failed: true, reason: ReasonDeadline, message: messageDeadline}
		}
		d.wake(at)
	}
	return end{is: d.finished()}
}

// finished says whether the pod has come to its own end: an init container
// failed for good, or no regular container runs or is to run again.
func (d *decider) finished() bool {
	o := d.o
	initialized := d.initialized()
	for i := range o.Pod.Spec.InitContainers {
		c := &o.Pod.Spec.InitContainers[i]
		r := o.current(c.Name)
		if !initialized && !sidecar(c) && r != nil && r.State == runtime.Exited && exitCode(r) != 0 && !d.again(c, r) {
			return true
		}
	}
	for i := range o.Pod.Spec.Containers {
		c := &o.Pod.Spec.Containers[i]
		if r := o.current(c.Name); r == nil || r.State == runtime.Running || d.again(c, r) {
			return false
		}
	}
	return len(o.Pod.Spec.Containers) > 0
}

// again says whether a run that ended is to be followed by another.
func (d *decider) again(c *v1.Container, r *Run) bool {
	return d.o.Stops[r.ID].Restart || restarts(d.o.Pod, c, exitCode(r))
}

// initialized says whether any regular container has run on the pod's ground:
// init containers have then all had their turn. On a new ground they have it
// again.
func (d *decider) initialized() bool {
	for i := range d.o.Pod.Spec.Containers {
		if d.o.here(d.o.Pod.Spec.Containers[i].Name) != nil {
			return true
		}
	}
	return false
}

// finish clears up after everything has stopped.
func (d *decider) finish() {
	o := d.o
	switch {
	case !o.Closed && d.mayForget():
		d.step(Step{Do: Close})
	case !o.Closed:
	case o.Gone:
		d.Done = true
	case o.Pod.DeletionTimestamp != nil && podutil.IsPodPhaseTerminal(o.Pod.Status.Phase):
		// Only what the API itself shows as finished may go: whoever waits for
		// the outcome has then had a chance to see it.
		d.step(Step{Do: Delete})
	}
}

// mayForget says whether the machine may forget what ran. When a pod has come
// to its end that is not before the API knows: an agent that starts in between
// would find a pod that has yet to run. The others are not run again, or must
// make room for the API to write anything at all; of a static pod it tells only.
func (d *decider) mayForget() bool {
	o := d.o
	return podutil.IsPodPhaseTerminal(o.Pod.Status.Phase) || o.Gone || o.Pod.DeletionTimestamp != nil ||
		o.Refusal != nil || o.Evicted != nil || kubetypes.IsStaticPod(o.Pod)
}

// run brings the pod forward.
func (d *decider) run() {
	o := d.o
	d.part(o.Ground, OpenGround)
	d.part(o.Volumes, PrepareVolumes)
	d.removeOld()
	for i := range o.Pod.Spec.EphemeralContainers {
		c := (*v1.Container)(&o.Pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)
		if o.newest(c.Name) == nil {
			d.want(c, 0)
		}
	}
	if d.clearing() || !d.initContainers() {
		return
	}
	for i := range o.Pod.Spec.Containers {
		c := &o.Pod.Spec.Containers[i]
		d.advance(c)
		if d.holdsBack(c) {
			return
		}
	}
}

// clearing stops what is left of an earlier round, at once, and says whether
// the next must wait: for that, or for the back-off of the container that
// asked for it.
func (d *decider) clearing() bool {
	o := d.o
	waits := false
	for c := range podutil.ContainerIter(&o.Pod.Spec, podutil.InitContainers|podutil.Containers) {
		r := o.newest(c.Name)
		switch {
		case r == nil || o.current(c.Name) != nil:
		case r.State == runtime.Running:
			d.stop(r, c, 0, true, false, "Container %s is restarted with all containers of the pod")
			waits = true
		case o.asksForAll(c, r) && o.Now.Before(d.crashUntil(c, r)):
			d.wake(d.crashUntil(c, r))
			waits = true
		}
	}
	return waits
}

func (d *decider) part(p Part, do Action) {
	switch {
	case p.Ready:
	case p.Fault != nil && d.o.Now.Before(p.Fault.Retry):
		d.wake(p.Fault.Retry)
	default:
		d.step(Step{Do: do})
	}
}

// holdsBack says whether the containers after this one must wait: its
// postStart hook has yet to end. Service meshes rely on it. A container that
// cannot start now holds nobody back.
func (d *decider) holdsBack(c *v1.Container) bool {
	o := d.o
	if c.Lifecycle == nil || c.Lifecycle.PostStart == nil {
		return false
	}
	r := o.current(c.Name)
	switch {
	case r == nil:
		return o.container(c.Name, d.nextAttempt(c.Name)).Fault == nil
	case r.State == runtime.Running:
		return o.container(c.Name, r.Attempt).Hook
	}
	return d.again(c, r) && !o.Now.Before(d.crashUntil(c, r)) && o.container(c.Name, r.Attempt+1).Fault == nil
}

// initContainers brings the init containers forward and says whether the
// regular ones may run.
func (d *decider) initContainers() bool {
	o := d.o
	list := o.Pod.Spec.InitContainers
	initialized := d.initialized()
	// Those up to the last that has run have had their turn.
	last := -1
	for i := range list {
		if o.here(list[i].Name) != nil {
			last = i
		}
	}
	for i := range list {
		c := &list[i]
		r := o.here(c.Name)
		if sidecar(c) {
			d.advance(c)
			if !initialized && i >= last && !o.started(c, r) {
				return false
			}
			continue
		}
		switch {
		case initialized:
		case r == nil && i > last:
			d.want(c, d.nextAttempt(c.Name))
			return false
		case r != nil && r.State == runtime.Exited && exitCode(r) != 0:
			d.advance(c)
			return false
		case r != nil && r.State == runtime.Running:
			d.advance(c)
			return false
		}
	}
	return true
}

// advance starts, restarts, stops or resizes one container.
func (d *decider) advance(c *v1.Container) {
	o := d.o
	r := o.current(c.Name)
	switch {
	case r == nil:
		d.want(c, d.nextAttempt(c.Name))
	case r.State == runtime.Running:
		d.keep(c, r)
	case d.again(c, r):
		if at := d.crashUntil(c, r); o.Now.Before(at) {
			d.wake(at)
			return
		}
		d.want(c, r.Attempt+1)
	}
}

// crashUntil says when a container that ended may run again.
func (d *decider) crashUntil(c *v1.Container, r *Run) time.Time {
	if d.o.Stops[r.ID].Restart || r.OtherImage(c) {
		return r.FinishedAt
	}
	return d.o.Containers[c.Name].Crash.Until(r.FinishedAt)
}

// firstAttempt is the attempt of a container without runs: 0, unless the API
// counts more than this machine remembers.
func (d *decider) firstAttempt(name string) int {
	if s := d.o.prior(name); s != nil {
		return int(s.RestartCount)
	}
	return 0
}

// nextAttempt is the one that follows all that were.
func (d *decider) nextAttempt(name string) int {
	if r := d.o.newest(name); r != nil {
		return r.Attempt + 1
	}
	return d.firstAttempt(name)
}

// want starts an attempt as soon as all it needs is there.
func (d *decider) want(c *v1.Container, attempt int) {
	o := d.o
	k := o.container(c.Name, attempt)
	if k.Starting {
		return
	}
	if k.Fault != nil && o.Now.Before(k.Fault.Retry) {
		d.wake(k.Fault.Retry)
		if imageFault(k.Fault) && o.Now.Before(k.Fault.At.Add(imageErrorShown)) {
			d.wake(k.Fault.At.Add(imageErrorShown))
		}
		return
	}
	id := runtime.ID{Pod: string(o.Pod.UID), Name: c.Name, Attempt: attempt}
	switch {
	case !k.Image:
		d.step(Step{Do: GetImage, Container: c.Name, ID: id})
	case o.Ground.Ready && o.Volumes.Ready:
		d.step(Step{Do: Start, Container: c.Name, ID: id, Round: o.round()})
	}
}

// keep looks after a running container.
func (d *decider) keep(c *v1.Container, r *Run) {
	o := d.o
	p := o.Probes[r.ID]
	willRestart := ""
	policy := o.Pod.Spec.RestartPolicy != v1.RestartPolicyNever
	if c.RestartPolicy != nil {
		policy = *c.RestartPolicy != v1.ContainerRestartPolicyNever
	}
	if policy {
		willRestart = ", will be restarted"
	}
	if s, ok := o.Stops[r.ID]; ok {
		d.stop(r, c, s.Grace, true, s.Restart, "")
		return
	}
	switch {
	case r.OtherImage(c):
		d.stop(r, c, o.grace(), true, true, "Container %s definition changed, will be restarted")
	case p.LivenessFailed:
		d.stop(r, c, probeGrace(c.LivenessProbe, o.grace()), true, false, "Container %s failed liveness probe"+willRestart)
	case p.StartupFailed:
		d.stop(r, c, probeGrace(c.StartupProbe, o.grace()), true, false, "Container %s failed startup probe"+willRestart)
	default:
		d.resize(c, r)
	}
}

func probeGrace(p *v1.Probe, grace time.Duration) time.Duration {
	if p != nil && p.TerminationGracePeriodSeconds != nil {
		return time.Duration(*p.TerminationGracePeriodSeconds) * time.Second
	}
	return grace
}

// resize applies changed resources to a running container, restarting it only
// where its policy wants that.
func (d *decider) resize(c *v1.Container, r *Run) {
	o := d.o
	applied := o.applied(c, r)
	if o.Resize != nil || applied == "" || applied == ResourceKey(o.Pod, c) {
		return
	}
	var was Applied
	if err := json.Unmarshal([]byte(applied), &was); err == nil {
		for _, p := range c.ResizePolicy {
			if p.RestartPolicy == v1.RestartContainer && (!was.Requests[p.ResourceName].Equal(c.Resources.Requests[p.ResourceName]) ||
				!was.Limits[p.ResourceName].Equal(c.Resources.Limits[p.ResourceName])) {
				d.stop(r, c, o.grace(), true, true, "Container %s resize requires restart")
				return
			}
		}
	}
	if f := o.container(c.Name, r.Attempt).Unresized; f != nil && o.Now.Before(f.Retry) {
		d.wake(f.Retry)
		return
	}
	before, now := memoryLimit(was), memoryLimit(Applied{c.Resources, o.Pod.Spec.Resources})
	d.step(Step{Do: Resize, Container: c.Name, ID: r.ID, LessMemory: now > 0 && (before == 0 || now < before)})
}

// memoryLimit is in bytes, 0 for none. That of the pod stands in for one that
// the container does not have.
func memoryLimit(a Applied) int64 {
	if own := a.Limits.Memory(); !own.IsZero() || a.Pod == nil {
		return own.Value()
	}
	return a.Pod.Limits.Memory().Value()
}

// applied is the ResourceKey that a running container is under.
func (o *Observed) applied(c *v1.Container, r *Run) string {
	if k := o.container(c.Name, r.Attempt); k.Resources != "" {
		return k.Resources
	}
	return r.Labels[LabelResources]
}

// Applied are the resources that a container runs under.
type Applied struct {
	v1.ResourceRequirements
	// Pod is what the pod says of all its containers together.
	Pod *v1.ResourceRequirements `json:"pod,omitempty"`
}

// ResourceKey writes what Applied is to be for a container, so that two can be
// compared.
func ResourceKey(pod *v1.Pod, c *v1.Container) string {
	b, err := json.Marshal(Applied{c.Resources, pod.Spec.Resources})
	if err != nil {
		panic(fmt.Sprintf("marshal resources of container %s: %v", c.Name, err)) // plain data
	}
	return string(b)
}

// removeOld forgets all runs of a container but the newest two: the one
// before shows in lastState and in the previous log.
func (d *decider) removeOld() {
	for i := range d.o.Runs {
		r := &d.o.Runs[i]
		if keep := d.o.nth(r.Name, 1); keep != nil && r.Attempt < keep.Attempt && r.State == runtime.Exited {
			d.step(Step{Do: Remove, Container: r.Name, ID: r.ID})
		}
	}
}
