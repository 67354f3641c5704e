package pod

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubestatus "k8s.io/kubernetes/pkg/kubelet/status"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"tutti.dev/tutti/internal/runtime"
)

const (
	// imageErrorShown is how long a failed pull shows as itself before it
	// shows as waiting for the next.
	imageErrorShown = time.Second
	// messageBytes is what the termination messages of one pod share.
	messageBytes = 12 * 1024
)

// status tells the pod as the API is to see it.
func (d *decider) status() v1.PodStatus {
	o := d.o
	pod := o.Pod
	s := v1.PodStatus{
		QOSClass:           pod.Status.QOSClass,
		NominatedNodeName:  pod.Status.NominatedNodeName,
		StartTime:          o.Prior.StartTime,
		PodIP:              o.Prior.PodIP,
		PodIPs:             o.Prior.PodIPs,
		ObservedGeneration: max(pod.Generation, o.Prior.ObservedGeneration),
		// Others own these.
		ResourceClaimStatuses:                pod.Status.ResourceClaimStatuses,
		ExtendedResourceClaimStatus:          pod.Status.ExtendedResourceClaimStatus,
		NodeAllocatableResourceClaimStatuses: pod.Status.NodeAllocatableResourceClaimStatuses,
	}
	if s.StartTime == nil {
		now := metav1.NewTime(o.Now)
		s.StartTime = &now
	}
	d.addresses(&s)
	waiting := ReasonCreating
	if len(pod.Spec.InitContainers) > 0 {
		waiting = ReasonInitializing
	}
	if o.Refusal == nil { // else there will be no containers: clients show the reason
		s.ContainerStatuses = d.statuses(pod.Spec.Containers, waiting, false)
		s.InitContainerStatuses = d.statuses(pod.Spec.InitContainers, waiting, true)
		s.EphemeralContainerStatuses = d.statuses(ephemeral(pod), waiting, false)
	}
	s.Resources = d.resources()
	s.AllocatedResources = allocated(pod, &s)
	d.phase(&s)
	d.conditions(&s)
	normalize(pod, &s)
	return s
}

// resources are those that the pod as a whole runs under, nil if it names none.
func (d *decider) resources() *v1.ResourceRequirements {
	o := d.o
	for c := range podutil.ContainerIter(&o.Pod.Spec, podutil.InitContainers|podutil.Containers) {
		if r := o.newest(c.Name); r != nil && r.State == runtime.Running {
			var now Applied
			if err := json.Unmarshal([]byte(o.applied(c, r)), &now); err == nil && now.Pod != nil {
				return now.Pod
			}
		}
	}
	return o.Pod.Spec.Resources.DeepCopy()
}

// allocated is what the pod as a whole is given: what it names for itself,
// and of the rest what its containers are given together.
func allocated(p *v1.Pod, s *v1.PodStatus) v1.ResourceList {
	given := func(containers []v1.Container, statuses []v1.ContainerStatus) []v1.Container {
		containers = slices.Clone(containers)
		for i := range containers {
			if status, ok := podutil.GetContainerStatus(statuses, containers[i].Name); ok && status.AllocatedResources != nil {
				containers[i].Resources.Requests = status.AllocatedResources
			}
		}
		return containers
	}
	requests := resourcehelper.PodRequests(&v1.Pod{Spec: v1.PodSpec{
		Containers: given(p.Spec.Containers, s.ContainerStatuses), InitContainers: given(p.Spec.InitContainers, s.InitContainerStatuses),
		Overhead: p.Spec.Overhead, Resources: s.Resources,
	}}, resourcehelper.PodResourcesOptions{})
	if len(requests) == 0 {
		return nil
	}
	return requests
}

func (d *decider) addresses(s *v1.PodStatus) {
	o := d.o
	ips := o.IPs
	if o.Pod.Spec.HostNetwork {
		ips = o.HostIPs
	}
	if len(ips) > 0 && (o.Ground.Ready || o.Pod.Spec.HostNetwork) {
		s.PodIP, s.PodIPs = ips[0].String(), nil
		for _, ip := range ips {
			s.PodIPs = append(s.PodIPs, v1.PodIP{IP: ip.String()})
		}
	}
	for _, ip := range o.HostIPs {
		s.HostIPs = append(s.HostIPs, v1.HostIP{IP: ip.String()})
	}
	if len(o.HostIPs) > 0 {
		s.HostIP = o.HostIPs[0].String()
	}
}

// phase sets the phase and what goes with it. A terminal phase is told only
// when nothing runs, and never taken back.
func (d *decider) phase(s *v1.PodStatus) {
	o := d.o
	settled := d.settled()
	s.Phase = phase(o.Pod, s, settled, d.initialized())
	if !d.is && o.restarting() {
		s.Phase = o.Prior.Phase // as it was before all began anew
	}
	if settled && (d.failed || !podutil.IsPodPhaseTerminal(s.Phase)) {
		// A pod that must end without an outcome of its own has failed.
		d.lost(s)
		if s.Phase != v1.PodSucceeded || d.failed {
			s.Phase = v1.PodFailed
		}
	}
	if !settled && podutil.IsPodPhaseTerminal(s.Phase) {
		s.Phase = v1.PodRunning
		if o.Prior.Phase == v1.PodPending {
			s.Phase = v1.PodPending
		}
	}
	for _, was := range []v1.PodPhase{o.Prior.Phase, o.Pod.Status.Phase} {
		if podutil.IsPodPhaseTerminal(was) {
			s.Phase = was
		}
	}
	switch {
	case s.Phase == v1.PodFailed && d.reason != "":
		s.Reason, s.Message = d.reason, d.message
	case s.Phase == o.Prior.Phase:
		s.Reason, s.Message = o.Prior.Reason, o.Prior.Message
	case s.Phase == o.Pod.Status.Phase:
		s.Reason, s.Message = o.Pod.Status.Reason, o.Pod.Status.Message
	}
}

// settled says that the pod has ended and nothing of it runs.
func (d *decider) settled() bool { return d.is && !d.o.running() && !d.o.starting() }

// lost tells containers of an initialized pod that were never seen to end as
// failed: what is not known must not look like success.
func (d *decider) lost(s *v1.PodStatus) {
	if !d.initialized() {
		return
	}
	for i := range s.ContainerStatuses {
		c := &s.ContainerStatuses[i]
		if c.State.Terminated == nil && c.LastTerminationState.Terminated == nil {
			c.State = v1.ContainerState{Terminated: &v1.ContainerStateTerminated{
				Reason: ReasonUnknown, Message: messageNotLocated, ExitCode: exitCodeUnknown,
			}}
		}
	}
}

// phase follows the rules of the kubelet's getPhase: Pending until every init
// container has had its turn and every container has been started; Running as
// long as one runs or is to run again; then by the exit codes.
func phase(pod *v1.Pod, s *v1.PodStatus, ending, initialized bool) v1.PodPhase {
	for i := range pod.Spec.InitContainers {
		c := &pod.Spec.InitContainers[i]
		st, ok := podutil.GetContainerStatus(s.InitContainerStatuses, c.Name)
		t := ended(st)
		switch {
		case !ok:
			return v1.PodPending
		case sidecar(c):
			notStarted := st.State.Running != nil && (st.Started == nil || !*st.Started) || st.State.Waiting != nil && t == nil
			if notStarted && !initialized {
				return v1.PodPending
			}
		case t == nil:
			return v1.PodPending
		case t.ExitCode != 0 && !restarts(pod, c, int(t.ExitCode)):
			return v1.PodFailed
		}
	}
	var running, stopped, succeeded, final int
	for i := range pod.Spec.Containers {
		c := &pod.Spec.Containers[i]
		st, ok := podutil.GetContainerStatus(s.ContainerStatuses, c.Name)
		t := ended(st)
		switch {
		case ok && st.State.Running != nil:
			running++
		case t != nil:
			stopped++
			if t.ExitCode == 0 {
				succeeded++
			}
			if ending || !restarts(pod, c, int(t.ExitCode)) {
				final++
			}
		default:
			return v1.PodPending
		}
	}
	for i := range s.InitContainerStatuses {
		if sidecar(&pod.Spec.InitContainers[i]) && s.InitContainerStatuses[i].State.Running != nil {
			running++
		}
	}
	switch {
	case running > 0, stopped > final:
		return v1.PodRunning
	case stopped == 0:
		return v1.PodPending
	case stopped == succeeded:
		return v1.PodSucceeded
	}
	return v1.PodFailed
}

// ended is how a container that does not run ended, nil if it has not.
func ended(s v1.ContainerStatus) *v1.ContainerStateTerminated {
	switch {
	case s.State.Running != nil:
		return nil
	case s.State.Terminated != nil:
		return s.State.Terminated
	}
	return s.LastTerminationState.Terminated
}

// statuses tells the containers of one list.
func (d *decider) statuses(list []v1.Container, waiting string, init bool) []v1.ContainerStatus {
	var out []v1.ContainerStatus
	for i := range list {
		out = append(out, d.containerStatus(&list[i], waiting, init))
	}
	if !init {
		slices.SortFunc(out, func(a, b v1.ContainerStatus) int { return compare(a.Name, b.Name) })
	}
	return out
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

func (d *decider) containerStatus(c *v1.Container, waiting string, init bool) v1.ContainerStatus {
	o := d.o
	s := v1.ContainerStatus{
		Name: c.Name, Image: c.Image,
		State:        v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: waiting, Message: d.held()}},
		VolumeMounts: mountStatuses(c),
	}
	if p := o.prior(c.Name); p != nil {
		s.RestartCount = p.RestartCount
		s.LastTerminationState = p.LastTerminationState
	}
	r := o.newest(c.Name)
	if r != nil {
		d.runStatus(&s, c, r)
	}
	if w := d.waitingFor(c, r, init && !sidecar(c), waiting); w != nil {
		if s.State.Terminated != nil {
			s.LastTerminationState = s.State
		}
		s.State = v1.ContainerState{Waiting: w}
	}
	started := o.started(c, r)
	s.Started = &started
	if init && !sidecar(c) {
		s.Ready = s.State.Terminated != nil && s.State.Terminated.ExitCode == 0
	} else {
		s.Ready = o.ready(c, r)
	}
	return s
}

// held says what keeps the pod from starting its first container, "" when
// nothing does. The kubelet tells it by events only, which are gone in an hour.
func (d *decider) held() string {
	for _, p := range []Part{d.o.Ground, d.o.Volumes} {
		if p.Fault.Lasts() {
			return p.Fault.Reason + ": " + p.Fault.Message
		}
	}
	return ""
}

// runStatus tells the newest run, and the one before as the last state.
func (d *decider) runStatus(s *v1.ContainerStatus, c *v1.Container, r *Run) {
	o := d.o
	s.RestartCount = int32(r.Attempt)
	s.ContainerID = ContainerID(r.ID)
	s.ImageID = r.Labels[LabelImageID]
	if image := r.Labels[LabelImage]; image != "" {
		s.Image = image
	}
	if p := o.prior(c.Name); s.ImageID == "" && p != nil && p.ContainerID == s.ContainerID {
		s.ImageID = p.ImageID
	}
	if u := r.User; u != nil {
		s.User = &v1.ContainerUser{Linux: &v1.LinuxContainerUser{UID: u.UID, GID: u.GID, SupplementalGroups: u.Groups}}
	}
	s.Resources = c.Resources.DeepCopy()
	if applied := o.applied(c, r); applied != "" && r.State == runtime.Running {
		var was v1.ResourceRequirements
		if err := json.Unmarshal([]byte(applied), &was); err == nil {
			s.Resources = &was
		}
	}
	s.AllocatedResources = s.Resources.DeepCopy().Requests
	if last := o.nth(c.Name, 1); last != nil {
		s.LastTerminationState = v1.ContainerState{Terminated: terminated(last)}
	} else if s.LastTerminationState.Terminated != nil && s.LastTerminationState.Terminated.ContainerID == s.ContainerID {
		s.LastTerminationState = v1.ContainerState{}
	}
	switch {
	case r.State == runtime.Exited:
		s.State = v1.ContainerState{Terminated: terminated(r)}
	case o.container(c.Name, r.Attempt).Hook:
		// Not running, as far as the API goes, before the postStart hook ends.
	default:
		s.State = v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.NewTime(r.StartedAt)}}
	}
}

// waitingFor says why a container that is to run does not, if that is known.
// What ran in an earlier round or on an earlier ground waits for its turn, for
// the usual reason.
func (d *decider) waitingFor(c *v1.Container, r *Run, init bool, usual string) *v1.ContainerStateWaiting {
	o := d.o
	earlier, anew := d.earlier(c, r), r != nil && o.here(c.Name) == nil
	again := r == nil || r.State != runtime.Running && (earlier || d.again(c, r))
	if init && anew && r.State != runtime.Running {
		again = !d.initialized()
	}
	if !again || d.is {
		return nil
	}
	if r != nil && (!earlier || o.asksForAll(c, r)) {
		if at := d.crashUntil(c, r); o.Now.Before(at) {
			return &v1.ContainerStateWaiting{Reason: ReasonCrashLoop, Message: fmt.Sprintf(
				"back-off %s restarting failed container=%s pod=%s_%s(%s)",
				o.Containers[c.Name].Crash.Delay, c.Name, o.Pod.Name, o.Pod.Namespace, o.Pod.UID)}
		}
	}
	f := o.container(c.Name, d.nextAttempt(c.Name)).Fault
	if f == nil && anew {
		return &v1.ContainerStateWaiting{Reason: usual}
	}
	if f == nil {
		return nil
	}
	if f.Reason == ReasonErrImagePull && !o.Now.Before(f.At.Add(imageErrorShown)) {
		return &v1.ContainerStateWaiting{Reason: ReasonImageBackOff, Message: fmt.Sprintf("Back-off pulling image %q: %s: %s", c.Image, f.Reason, f.Message)}
	}
	return &v1.ContainerStateWaiting{Reason: f.Reason, Message: f.Message}
}

// earlier says whether a container's newest run is of an earlier round, and so
// will be followed by another whatever its end.
func (d *decider) earlier(c *v1.Container, r *Run) bool {
	return r != nil && !d.is && d.o.current(c.Name) == nil
}

func imageFault(f *Fault) bool { return f.Reason == ReasonErrImagePull }

func exitCode(r *Run) int {
	if r.Unknown {
		return exitCodeUnknown
	}
	return r.ExitCode
}

func terminated(r *Run) *v1.ContainerStateTerminated {
	t := &v1.ContainerStateTerminated{
		ExitCode: int32(exitCode(r)), Signal: 0,
		Reason: ReasonError, Message: r.Message,
		FinishedAt: metav1.NewTime(r.FinishedAt), ContainerID: ContainerID(r.ID),
	}
	if !r.StartedAt.IsZero() {
		t.StartedAt = metav1.NewTime(r.StartedAt)
	}
	switch {
	case r.Reason != "":
		t.Reason = r.Reason
	case r.Unknown:
		t.Reason = ReasonUnknown
		if t.Message == "" {
			t.Message = messageLost
		}
	case r.OOMKilled:
		t.Reason = ReasonOOM
	case r.ExitCode == 0:
		t.Reason = ReasonCompleted
	}
	return t
}

func mountStatuses(c *v1.Container) []v1.VolumeMountStatus {
	var out []v1.VolumeMountStatus
	for _, m := range c.VolumeMounts {
		s := v1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := v1.RecursiveReadOnlyDisabled
			if m.RecursiveReadOnly != nil && *m.RecursiveReadOnly != v1.RecursiveReadOnlyDisabled {
				mode = v1.RecursiveReadOnlyEnabled
			}
			s.RecursiveReadOnly = &mode
		}
		out = append(out, s)
	}
	return out
}

// conditions keeps what others own and tells what the node does.
func (d *decider) conditions(s *v1.PodStatus) {
	o := d.o
	pod := o.Pod
	for _, c := range pod.Status.Conditions {
		if !kubetypes.PodConditionByKubelet(c.Type) {
			s.Conditions = append(s.Conditions, c)
		}
	}
	if e := o.Evicted; e != nil && e.Condition != nil {
		condition := *e.Condition
		podutil.UpdatePodCondition(s, &condition)
	}
	generation := s.ObservedGeneration
	status := func(b bool) v1.ConditionStatus {
		if b {
			return v1.ConditionTrue
		}
		return v1.ConditionFalse
	}
	all := slices.Concat(s.InitContainerStatuses, s.ContainerStatuses)
	s.Conditions = append(s.Conditions, d.resizeConditions(generation)...)
	if podutil.AllContainersCouldRestart(&pod.Spec) {
		c := v1.PodCondition{Type: v1.AllContainersRestarting, Status: status(!d.is && o.restarting()), ObservedGeneration: generation}
		if c.Status == v1.ConditionTrue {
			c.Reason, c.Message = kubestatus.RestartAllContainersStarted, "container exited with restart policy rule"
		}
		s.Conditions = append(s.Conditions, c)
	}
	s.Conditions = append(s.Conditions,
		v1.PodCondition{Type: v1.PodReadyToStartContainers, Status: status((o.Ground.Ready || o.running()) && !d.settled()), ObservedGeneration: generation},
		kubestatus.GeneratePodInitializedCondition(pod, &o.Prior, all, s.Phase))
	s.Conditions = append(s.Conditions,
		kubestatus.GeneratePodReadyCondition(pod, &o.Prior, s.Conditions, all, s.Phase),
		kubestatus.GenerateContainersReadyCondition(pod, &o.Prior, all, s.Phase),
		v1.PodCondition{Type: v1.PodScheduled, Status: v1.ConditionTrue, ObservedGeneration: generation})
	for i := range s.Conditions {
		c := &s.Conditions[i]
		if !kubetypes.PodConditionByKubelet(c.Type) {
			continue
		}
		c.LastTransitionTime = metav1.NewTime(o.Now)
		if _, was := podutil.GetPodConditionFromList(o.Prior.Conditions, c.Type); was != nil && was.Status == c.Status {
			c.LastTransitionTime = was.LastTransitionTime
		}
	}
}

// resizeConditions says how far a change of resources has come.
func (d *decider) resizeConditions(generation int64) []v1.PodCondition {
	o := d.o
	changed := false
	progress := v1.PodCondition{Type: v1.PodResizeInProgress, Status: v1.ConditionTrue, ObservedGeneration: generation}
	for _, list := range [][]v1.Container{o.Pod.Spec.Containers, o.Pod.Spec.InitContainers} {
		for i := range list {
			c := &list[i]
			if r := o.newest(c.Name); r != nil && r.State == runtime.Running {
				applied := o.applied(c, r)
				changed = changed || applied != "" && applied != ResourceKey(o.Pod, c)
				if f := o.container(c.Name, r.Attempt).Unresized; f != nil {
					progress.Reason, progress.Message = v1.PodReasonError, f.Message
				}
			}
		}
	}
	switch {
	case !changed:
		return nil
	case o.Resize != nil:
		return []v1.PodCondition{{Type: v1.PodResizePending, Status: v1.ConditionTrue, Reason: o.Resize.Reason, Message: o.Resize.Message, ObservedGeneration: generation}}
	case o.Considered > 0:
		return nil // not known yet
	}
	return []v1.PodCondition{progress}
}

// normalize makes the status what the API gives back: times in seconds,
// messages within their share.
func normalize(pod *v1.Pod, s *v1.PodStatus) {
	share := messageBytes / max(1, len(pod.Spec.Containers)+len(pod.Spec.InitContainers)+len(pod.Spec.EphemeralContainers))
	state := func(c *v1.ContainerState) {
		if c.Running != nil {
			r := *c.Running
			r.StartedAt = r.StartedAt.Rfc3339Copy()
			c.Running = &r
		}
		if c.Terminated != nil {
			t := *c.Terminated
			t.StartedAt, t.FinishedAt = t.StartedAt.Rfc3339Copy(), t.FinishedAt.Rfc3339Copy()
			if len(t.Message) > share {
				t.Message = t.Message[:share]
			}
			c.Terminated = &t
		}
	}
	start := s.StartTime.Rfc3339Copy()
	s.StartTime = &start
	for i := range s.Conditions {
		c := &s.Conditions[i]
		c.LastTransitionTime, c.LastProbeTime = c.LastTransitionTime.Rfc3339Copy(), c.LastProbeTime.Rfc3339Copy()
	}
	for _, list := range [][]v1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			state(&list[i].State)
			state(&list[i].LastTerminationState)
		}
	}
}
