// Package pod decides. It takes what the API wants of one pod and what is
// observed of it on this machine and says what to do next (Decide) and what to
// tell the API (Decision.Status). It does nothing itself: no clock, no
// goroutine, no input or output, so that every rule can be a row of a table.
//
// The rules are those of the kubelet, because clients and controllers rely on
// them: order of init containers and sidecars, restart policy and back-off,
// graceful termination, phases, conditions and reasons.
package pod

import (
	"net/netip"
	"sort"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"tutti.dev/tutti/internal/runtime"
)

// Scheme is what stands before a workload's name in the API's containerID.
const Scheme = "tutti://"

// Labels that the agent gives to workloads, so that what was asked for at
// their start is known after a restart of the agent.
const (
	LabelNamespace = "tutti.dev/pod-namespace"
	LabelPod       = "tutti.dev/pod-name"
	LabelImage     = "tutti.dev/image"     // as the pod's specification names it
	LabelImageID   = "tutti.dev/image-id"  // repository@digest
	LabelResources = "tutti.dev/resources" // ResourceKey at start
	LabelRound     = "tutti.dev/round"     // how often all containers had been restarted
	LabelGround    = "tutti.dev/ground"    // name of the ground it stands on
)

// Reasons that the API shows. They are part of the Kubernetes API in all but
// name: people and controllers match on them.
const (
	ReasonCreating      = "ContainerCreating"
	ReasonInitializing  = "PodInitializing"
	ReasonCrashLoop     = "CrashLoopBackOff"
	ReasonErrImagePull  = "ErrImagePull"
	ReasonImageBackOff  = "ImagePullBackOff"
	ReasonImageNever    = "ErrImageNeverPull"
	ReasonImageName     = "InvalidImageName"
	ReasonConfig        = "CreateContainerConfigError"
	ReasonCreate        = "CreateContainerError"
	ReasonRun           = "RunContainerError"
	ReasonPostStart     = "PostStartHookError"
	ReasonStart         = "StartError"
	ReasonUnknown       = "ContainerStatusUnknown"
	ReasonCompleted     = "Completed"
	ReasonError         = "Error"
	ReasonOOM           = "OOMKilled"
	ReasonDeadline      = "DeadlineExceeded"
	messageDeadline     = "Pod was active on the node longer than the specified deadline"
	messageLost         = "Nobody saw the container end: its exit code is not known"
	messageNotLocated   = "The container could not be located when the pod was terminated"
	exitCodeUnknown     = 137
	exitCodeNotStarted  = 128
	minimumGrace        = 2 * time.Second
	killAgain           = 10 * time.Second
	defaultGraceSeconds = 30
)

// Run is one run of one container: what the runtime knows of it, and what
// only the agent does.
type Run struct {
	runtime.Status
	// Reason replaces the usual reason of an end (StartError); "" keeps it.
	Reason string
	// Message is the termination message, or why the run could not start.
	Message string
}

// OtherImage says that the run is of another image than its container has
// now. How it ended then says nothing of the new one.
func (r *Run) OtherImage(c *v1.Container) bool {
	return r.Labels[LabelImage] != "" && r.Labels[LabelImage] != c.Image
}

// NotStarted is the run of a container that could not be executed: it counts
// as an attempt and ends at once, as the kubelet has it.
func NotStarted(id runtime.ID, at time.Time, labels map[string]string, message string) Run {
	return Run{
		Status: runtime.Status{ID: id, State: runtime.Exited, FinishedAt: at, ExitCode: exitCodeNotStarted, Labels: labels},
		Reason: ReasonStart, Message: message,
	}
}

// Fault says why a step failed last time and when to try again.
type Fault struct {
	Reason, Message string
	At, Retry       time.Time
	Count           int
}

// Next returns the fault that follows f (which may be nil): the delay doubles
// from first to most.
func (f *Fault) Next(now time.Time, reason, message string, first, most time.Duration) *Fault {
	n := &Fault{Reason: reason, Message: message, At: now, Count: 1}
	if f != nil && f.Reason == reason {
		n.Count = f.Count + 1
	}
	n.Retry = now.Add(doubled(first, most, n.Count-1))
	return n
}

// Lasts tells whether a fault is worth telling: what passes within a second
// is nobody's business.
func (f *Fault) Lasts() bool { return f != nil && f.Count > 3 }

func doubled(first, most time.Duration, times int) time.Duration {
	for ; times > 0 && first < most; times-- {
		first *= 2
	}
	return min(first, most)
}

// Part is something the pod needs before its containers can start.
type Part struct {
	Ready bool
	Fault *Fault
}

// Container is what the agent remembers of one container besides its runs.
type Container struct {
	// Attempt is the one that the fields up to Fault are about.
	Attempt  int
	Image    bool   // the image is here and held
	ImageID  string // repository@digest
	Starting bool   // the runtime has been asked to start it
	Hook     bool   // its postStart hook is running
	Fault    *Fault

	Crash Crash
	// Resources is the ResourceKey last applied to the running workload,
	// "" if nothing was since its start.
	Resources string
	// Unresized is why changed resources could not be applied, nil if they
	// were or have not been tried.
	Unresized *Fault
}

// Crash is the back-off of a container that keeps ending.
type Crash struct {
	Delay time.Duration
	At    time.Time // last restart
}

const (
	crashFirst = 10 * time.Second
	crashMost  = 300 * time.Second
	crashReset = 2 * crashMost
)

// Until says when a container that ended at the given time may start again.
func (c Crash) Until(ended time.Time) time.Time {
	if c.At.IsZero() || ended.Sub(c.At) > crashReset {
		return ended
	}
	return ended.Add(c.Delay)
}

// Next is the back-off after one more restart of a container that ended at
// the given time.
func (c Crash) Next(ended, now time.Time) Crash {
	if c.At.IsZero() || ended.Sub(c.At) > crashReset {
		return Crash{Delay: crashFirst, At: now}
	}
	return Crash{Delay: min(2*c.Delay, crashMost), At: now}
}

// Stop is how far the graceful end of one run has come.
type Stop struct {
	Begun time.Time
	Grace time.Duration
	// Hook says that its preStop hook is running.
	Hook       bool
	Terminated time.Time // when the stop signal was sent
	Killed     time.Time // when SIGKILL was sent last
	// Restart says that the container is to run again whatever its policy.
	Restart bool
}

// Probe is what the probes of one run say. The zero value knows nothing yet.
type Probe struct {
	Started, Ready                bool
	LivenessFailed, StartupFailed bool
}

// Refusal says why this machine does not take the pod.
type Refusal struct{ Reason, Message string }

// Eviction says why and how the machine no longer bears the pod.
type Eviction struct {
	Reason, Message string
	Grace           time.Duration // at most
	// Condition is told with it, if any.
	Condition *v1.PodCondition
}

// Observed is everything known of one pod at one moment.
type Observed struct {
	Now time.Time
	// Pod is what the API wants; its status is the last the API told.
	Pod *v1.Pod
	// Gone says that the API no longer has the pod.
	Gone bool
	// Halt says that this machine stops its workloads and will go on with them
	// later; HaltGrace bounds the grace of every pod.
	Halt      bool
	HaltGrace time.Duration
	Refusal   *Refusal
	Evicted   *Eviction

	// Runs are all runs the machine knows, in no order.
	Runs       []Run
	Containers map[string]Container
	Stops      map[runtime.ID]Stop
	Probes     map[runtime.ID]Probe

	Ground Part // network and namespaces
	// GroundName tells the pod's ground from those it had before the machine
	// was started again; "" when it is not known.
	GroundName string
	Volumes    Part
	IPs        []netip.Addr // of the pod
	HostIPs    []netip.Addr // of the machine
	// Closed says that nothing of the pod is left on the machine but its logs.
	Closed bool
	// Resize is why a change of resources is put off or refused, nil when it
	// fits.
	Resize *Refusal

	// Prior is the status decided last, or the API's when there is none.
	Prior v1.PodStatus
}

// newest returns the last run of a container, nil if it never ran.
func (o *Observed) newest(name string) *Run { return o.nth(name, 0) }

// asksForAll says whether the end of a run is to restart all containers of the
// pod (KEP-5532).
func (o *Observed) asksForAll(c *v1.Container, r *Run) bool {
	if r.State != runtime.Exited {
		return false
	}
	rule, ok := podutil.FindMatchingContainerRestartRule(*c, int32(exitCode(r)))
	return ok && rule.Action == v1.ContainerRestartRuleActionRestartAllContainers
}

// roundOf is the round that a run belongs to: how often all containers had been
// restarted when it started.
func roundOf(r *Run) int {
	n, _ := strconv.Atoi(r.Labels[LabelRound]) // none is the first
	return n
}

// round is the one that the pod is in. It is told by labels and not by times:
// clocks jump.
func (o *Observed) round() (n int) {
	for c := range podutil.ContainerIter(&o.Pod.Spec, podutil.InitContainers|podutil.Containers) {
		for i := range o.Runs {
			r := &o.Runs[i]
			if r.Name != c.Name {
				continue
			}
			n = max(n, roundOf(r))
			if o.asksForAll(c, r) {
				n = max(n, roundOf(r)+1)
			}
		}
	}
	return n
}

// current returns the newest run of a container in this round, nil if it has
// none yet.
func (o *Observed) current(name string) *Run {
	if r := o.newest(name); r != nil && roundOf(r) == o.round() {
		return r
	}
	return nil
}

// here returns the last run of a container in this round and on the ground that
// the pod has now, nil if it has none yet.
func (o *Observed) here(name string) *Run {
	r := o.current(name)
	if r != nil && r.State == runtime.Exited && o.GroundName != "" && r.Labels[LabelGround] != o.GroundName {
		return nil
	}
	return r
}

// restarting says whether a round has begun in which not all containers that
// ran before have run again.
func (o *Observed) restarting() bool {
	for c := range podutil.ContainerIter(&o.Pod.Spec, podutil.InitContainers|podutil.Containers) {
		if o.newest(c.Name) != nil && o.current(c.Name) == nil {
			return true
		}
	}
	return false
}

// nth returns the run n before the newest.
func (o *Observed) nth(name string, n int) *Run {
	var runs []*Run
	for i := range o.Runs {
		if o.Runs[i].Name == name {
			runs = append(runs, &o.Runs[i])
		}
	}
	if len(runs) <= n {
		return nil
	}
	sort.Slice(runs, func(i, j int) bool { return runs[i].Attempt > runs[j].Attempt })
	return runs[n]
}

// container returns what is remembered for the given attempt.
func (o *Observed) container(name string, attempt int) Container {
	c := o.Containers[name]
	if c.Attempt != attempt {
		return Container{Attempt: attempt, Crash: c.Crash}
	}
	return c
}

// starting says whether any container is on its way.
func (o *Observed) starting() bool {
	for _, c := range o.Containers {
		if c.Starting {
			return true
		}
	}
	return false
}

func (o *Observed) running() bool {
	for i := range o.Runs {
		if o.Runs[i].State == runtime.Running {
			return true
		}
	}
	return false
}

// grace is how long the pod's containers have between the stop signal, or
// their preStop hook, and SIGKILL.
func (o *Observed) grace() time.Duration {
	seconds := int64(defaultGraceSeconds)
	if s := o.Pod.Spec.TerminationGracePeriodSeconds; s != nil {
		seconds = *s
	}
	if s := o.Pod.DeletionGracePeriodSeconds; s != nil && (o.Gone || o.Pod.DeletionTimestamp != nil) {
		seconds = *s
	}
	g := time.Duration(seconds) * time.Second
	if o.Evicted != nil {
		g = min(g, o.Evicted.Grace)
	}
	if o.Halt {
		g = min(g, o.HaltGrace)
	}
	return g
}

// started says whether a running container has passed its startup probe.
func (o *Observed) started(c *v1.Container, r *Run) bool {
	if r == nil || r.State != runtime.Running || o.container(c.Name, r.Attempt).Hook {
		return false
	}
	return c.StartupProbe == nil || o.Probes[r.ID].Started
}

// ready says whether a running container is ready.
func (o *Observed) ready(c *v1.Container, r *Run) bool {
	return o.started(c, r) && (c.ReadinessProbe == nil || o.Probes[r.ID].Ready)
}

func (o *Observed) prior(name string) *v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{o.Prior.ContainerStatuses, o.Prior.InitContainerStatuses, o.Prior.EphemeralContainerStatuses} {
		for i := range list {
			if list[i].Name == name {
				return &list[i]
			}
		}
	}
	return nil
}

// sidecar says whether an init container keeps running.
func sidecar(c *v1.Container) bool { return podutil.IsRestartableInitContainer(c) }

func restarts(pod *v1.Pod, c *v1.Container, exitCode int) bool {
	return podutil.ContainerShouldRestart(*c, pod.Spec, int32(exitCode))
}

// ContainerID is how the API names a run.
func ContainerID(id runtime.ID) string { return Scheme + id.String() }

// ParseContainerID is the inverse of ContainerID.
func ParseContainerID(s string) (runtime.ID, bool) {
	s, ok := strings.CutPrefix(s, Scheme)
	parts := strings.Split(s, "_")
	if !ok || len(parts) != 3 {
		return runtime.ID{}, false
	}
	attempt, err := strconv.Atoi(parts[2])
	return runtime.ID{Pod: parts[0], Name: parts[1], Attempt: attempt}, err == nil
}

// Recover adds to the runs that the runtime knows those that only the API
// remembers. One that the API believes running and the runtime does not know
// has ended unseen.
func Recover(pod *v1.Pod, runs []Run, now time.Time) []Run {
	known := map[string]bool{}
	for _, r := range runs {
		known[r.ID.String()] = true
	}
	add := func(containerID string, t *v1.ContainerStateTerminated) {
		id, ok := ParseContainerID(containerID)
		if !ok || known[id.String()] || id.Pod != string(pod.UID) {
			return
		}
		known[id.String()] = true
		r := Run{Status: runtime.Status{ID: id, State: runtime.Exited, FinishedAt: now, Unknown: true}}
		if t != nil {
			r = Run{
				Status: runtime.Status{
					ID: id, State: runtime.Exited, ExitCode: int(t.ExitCode),
					StartedAt: t.StartedAt.Time, FinishedAt: t.FinishedAt.Time,
				},
				Reason: t.Reason, Message: t.Message,
			}
		}
		runs = append(runs, r)
	}
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		for _, s := range list {
			switch {
			case s.State.Running != nil:
				add(s.ContainerID, nil)
			case s.State.Terminated != nil:
				add(s.State.Terminated.ContainerID, s.State.Terminated)
			}
			if t := s.LastTerminationState.Terminated; t != nil {
				add(t.ContainerID, t)
			}
		}
	}
	return runs
}
