package pod

import (
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"tutti.dev/tutti/internal/runtime"
)

// brief writes a status in one line: phase, reason, the conditions that are
// true, then each container.
func brief(s v1.PodStatus) string {
	var b strings.Builder
	b.WriteString(string(s.Phase))
	if s.Reason != "" {
		b.WriteString("(" + s.Reason + ")")
	}
	for _, c := range s.Conditions {
		if c.Status == v1.ConditionTrue && c.Type != v1.PodScheduled {
			b.WriteString(" " + map[v1.PodConditionType]string{
				v1.PodReadyToStartContainers: "ground", v1.PodInitialized: "init", v1.ContainersReady: "containers", v1.PodReady: "ready",
				v1.PodResizeInProgress: "resizing", v1.PodResizePending: "resize-" + c.Reason, v1.AllContainersRestarting: "all-restart",
			}[c.Type])
		}
	}
	state := func(c v1.ContainerState) string {
		switch {
		case c.Running != nil:
			return "running"
		case c.Terminated != nil:
			return "terminated:" + c.Terminated.Reason
		case c.Waiting != nil:
			return "waiting:" + c.Waiting.Reason
		}
		return ""
	}
	for _, list := range [][]v1.ContainerStatus{s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses} {
		for _, c := range list {
			b.WriteString("; " + c.Name + " " + state(c.State))
			if last := state(c.LastTerminationState); last != "" {
				b.WriteString(" last " + last)
			}
			if c.Ready {
				b.WriteString(" ready")
			}
			if c.RestartCount > 0 {
				b.WriteString(" x" + string(rune('0'+c.RestartCount)))
			}
		}
	}
	return b.String()
}

func TestStatus(t *testing.T) {
	fault := func(reason string, ago time.Duration) func(*Observed) {
		return func(o *Observed) {
			o.Containers["main"] = Container{Fault: &Fault{Reason: reason, Message: "why", At: now.Add(-ago), Retry: now.Add(time.Minute)}}
		}
	}
	probes := func(o *Observed) { o.Pod.Spec.Containers[0].ReadinessProbe = &v1.Probe{} }
	tests := []struct {
		name string
		s    *scene
		want string
	}{
		{"new", newScene("", "main").with(func(o *Observed) { o.Ground = Part{} }), "Pending init; main waiting:ContainerCreating"},
		{"ground is there", newScene("", "main"), "Pending ground init; main waiting:ContainerCreating"},
		{"init to come", newScene("i", "main"), "Pending ground; i waiting:PodInitializing; main waiting:PodInitializing"},
		{"init runs", newScene("i", "main").running("i", 0), "Pending ground; i running; main waiting:PodInitializing"},
		{"init done", newScene("i", "main").exited("i", 0, 0, 0), "Pending ground init; i terminated:Completed ready; main waiting:PodInitializing"},
		{"init failed", newScene("i", "main").exited("i", 0, 1, 0), "Pending ground; i terminated:Error; main waiting:PodInitializing"},
		{"init failed for good", newScene("i", "main").exited("i", 0, 1, 0).with(never), "Failed; i terminated:Error; main waiting:PodInitializing"},
		{"sidecar, init to come", newScene("s~ i", "main").running("s", 0), "Pending ground; s running ready; i waiting:PodInitializing; main waiting:PodInitializing"},
		{"sidecar and main", newScene("s~", "main").running("s", 0).running("main", 0), "Running ground init ready containers; s running ready; main running ready"},
		{"sidecar restarts", newScene("s~", "main").exited("s", 0, 1, 0).running("main", 0), "Running ground init; s terminated:Error; main running ready"},

		{"runs", newScene("", "main").running("main", 0), "Running ground init ready containers; main running ready"},
		{"postStart hook", newScene("", "main+").running("main", 0).with(func(o *Observed) { o.Containers["main"] = Container{Hook: true} }),
			"Pending ground init; main waiting:ContainerCreating"},
		{"one of two", newScene("", "a b").running("a", 0), "Pending ground init; a running ready; b waiting:ContainerCreating"},
		{"not ready", newScene("", "main").running("main", 0).with(probes), "Running ground init; main running"},
		{"probe says ready", newScene("", "main").running("main", 0).with(probes).with(func(o *Observed) { o.Probes[id("main", 0)] = Probe{Started: true, Ready: true} }),
			"Running ground init ready containers; main running ready"},
		{"readiness gate", newScene("", "main").running("main", 0).with(func(o *Observed) { o.Pod.Spec.ReadinessGates = []v1.PodReadinessGate{{ConditionType: "x"}} }),
			"Running ground init containers; main running ready"},

		{"pull failed", newScene("", "main").with(fault(ReasonErrImagePull, 0)), "Pending ground init; main waiting:ErrImagePull"},
		{"pull backs off", newScene("", "main").with(fault(ReasonErrImagePull, time.Second)), "Pending ground init; main waiting:ImagePullBackOff"},
		{"no image", newScene("", "main").with(fault(ReasonImageNever, time.Hour)), "Pending ground init; main waiting:ErrImageNeverPull"},
		{"bad config", newScene("", "main").with(fault(ReasonConfig, time.Hour)), "Pending ground init; main waiting:CreateContainerConfigError"},

		{"all restart", newScene("i", "a b").exited("i", 0, 0, time.Hour).exited("a", 0, 42, 0).running("b", 0).with(allOn42).with(func(o *Observed) { o.Prior.Phase = v1.PodRunning }),
			"Running all-restart ground init; i waiting:PodInitializing last terminated:Completed; a waiting:PodInitializing last terminated:Error; b running ready"},
		{"all have stopped to restart", newScene("i", "a b").exited("i", 0, 0, time.Hour).exited("a", 0, 42, 0).exited("b", 0, 137, 0).with(allOn42).with(func(o *Observed) { o.Prior.Phase = v1.PodRunning }),
			"Running all-restart ground; i waiting:PodInitializing last terminated:Completed; a waiting:PodInitializing last terminated:Error; b waiting:PodInitializing last terminated:Error"},
		{"all have restarted", newScene("", "a b").exited("a", 0, 42, 0).again("a").exited("b", 0, 137, 0).again("b").with(allOn42),
			"Running ground init ready containers; a running last terminated:Error ready x1; b running last terminated:Error ready x1"},
		{"ended, starts again", newScene("", "main").exited("main", 0, 1, 0), "Running ground init; main terminated:Error"},
		{"backs off", newScene("", "main").exited("main", 1, 1, 0).exited("main", 0, 0, time.Hour).with(func(o *Observed) {
			o.Containers["main"] = Container{Attempt: 1, Crash: Crash{Delay: 10 * time.Second, At: now.Add(-time.Second)}}
		}), "Running ground init; main waiting:CrashLoopBackOff last terminated:Error x1"},
		{"again, with a past", newScene("", "main").running("main", 1).exited("main", 0, 137, 0), "Running ground init ready containers; main running last terminated:Error ready x1"},
		{"out of memory", newScene("", "main").with(never).add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Exited, ExitCode: 137, OOMKilled: true}}),
			"Failed init; main terminated:OOMKilled"},
		{"unseen", newScene("", "main").with(never).add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Exited, Unknown: true}}),
			"Failed init; main terminated:ContainerStatusUnknown"},
		{"could not start", newScene("", "main").with(never).add(NotStarted(id("main", 0), now, nil, "no such file")), "Failed init; main terminated:StartError"},
		{"succeeded", newScene("", "a b").with(never).exited("a", 0, 0, 0).exited("b", 0, 0, 0), "Succeeded init; a terminated:Completed; b terminated:Completed"},
		{"failed", newScene("", "a b").with(never).exited("a", 0, 0, 0).exited("b", 0, 1, 0), "Failed init; a terminated:Completed; b terminated:Error"},
		{"one still runs", newScene("", "a b").with(never).running("a", 0).exited("b", 0, 1, 0), "Running ground init; a running ready; b terminated:Error"},
		{"done but for its sidecar", newScene("s~", "main").with(never).running("s", 0).exited("main", 0, 0, 0), "Running ground init; s running ready; main terminated:Completed"},

		{"deleted, still runs", newScene("", "main").running("main", 0).deleted(30), "Running ground init ready containers; main running ready"},
		{"deleted, ended well", newScene("", "main").exited("main", 0, 0, 0).deleted(30), "Succeeded init; main terminated:Completed"},
		{"deleted, ended by signal", newScene("", "main").exited("main", 0, 143, 0).deleted(30), "Failed init; main terminated:Error"},
		{"deleted before it ran", newScene("", "main").deleted(30), "Failed init; main waiting:ContainerCreating"},
		{"deleted, one never ran", newScene("", "a b").exited("a", 0, 0, 0).deleted(30), "Failed init; a terminated:Completed; b terminated:ContainerStatusUnknown"},
		{"refused", newScene("", "main").with(func(o *Observed) {
			o.Ground, o.Refusal = Part{}, &Refusal{Reason: "OutOfcpu", Message: "no"}
		}), "Failed(OutOfcpu) init"},
		{"deadline, still runs", newScene("", "main").running("main", 0).with(deadline(time.Second)), "Running ground init ready containers; main running ready"},
		{"deadline", newScene("", "main").exited("main", 0, 143, 0).with(deadline(time.Second)), "Failed(DeadlineExceeded) init; main terminated:Error"},
		{"terminal never reverts", newScene("", "main").exited("main", 0, 0, 0).with(func(o *Observed) {
			o.Pod.Status.Phase, o.Pod.Status.Reason = v1.PodFailed, "Evicted"
		}), "Failed(Evicted) init; main terminated:Completed"},
		{"resizing", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}),
			"Running resizing ground init ready containers; main running ready"},
		{"resize not considered yet", newScene("", "main").with(func(o *Observed) { o.Considered = 1 }).
			add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}),
			"Running ground init ready containers; main running ready"},
		{"resize put off", newScene("", "main").with(func(o *Observed) { o.Resize = &Refusal{Reason: "Deferred"} }).
			add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}),
			"Running resize-Deferred ground init ready containers; main running ready"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := Decide(tt.s.Observed).Status
			if got := brief(s); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if podutil.IsPodPhaseTerminal(s.Phase) && (podutil.IsPodReadyConditionTrue(s) || podutil.IsContainersReadyConditionTrue(s)) {
				t.Error("ready in a terminal phase")
			}
			if s.StartTime == nil || s.ObservedGeneration != 1 {
				t.Errorf("start time %v, observed generation %d", s.StartTime, s.ObservedGeneration)
			}
			for _, c := range s.Conditions {
				if c.ObservedGeneration != 1 {
					t.Errorf("condition %s observed generation %d", c.Type, c.ObservedGeneration)
				}
			}
			// What was decided is what comes back: deciding again changes
			// nothing.
			tt.s.Prior = s
			if again := brief(Decide(tt.s.Observed).Status); again != tt.want {
				t.Errorf("decided again: %s", again)
			}
		})
	}
}

// The status tells the resources that are in force, not those that are wanted.
func TestPodResourcesInStatus(t *testing.T) {
	list := func(s string) v1.ResourceRequirements {
		return v1.ResourceRequirements{Requests: v1.ResourceList{v1.ResourceMemory: resource.MustParse(s)}}
	}
	was, wanted := list("1Gi"), list("2Gi")
	s := newScene("", "main").with(func(o *Observed) {
		o.Pod.Spec.Resources, o.Pod.Spec.Containers[0].Resources = &was, was
	})
	s.add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: ResourceKey(s.Pod, &s.Pod.Spec.Containers[0])}}})
	s.Pod.Spec.Resources, s.Pod.Spec.Containers[0].Resources = &wanted, wanted
	got := Decide(s.Observed).Status
	c := got.ContainerStatuses[0]
	for _, memory := range []*resource.Quantity{
		got.Resources.Requests.Memory(), got.AllocatedResources.Memory(), c.Resources.Requests.Memory(), c.AllocatedResources.Memory(),
	} {
		if memory.String() != "1Gi" {
			t.Errorf("status is %+v", got)
		}
	}
	s.Containers["main"] = Container{Resources: ResourceKey(s.Pod, &s.Pod.Spec.Containers[0])}
	if got := Decide(s.Observed).Status; got.Resources.Requests.Memory().String() != "2Gi" {
		t.Errorf("applied, and the status is %+v", got.Resources)
	}

	// A pod that names nothing for itself is given what its containers are.
	s = newScene("", "main side").with(func(o *Observed) {
		for i := range o.Pod.Spec.Containers {
			o.Pod.Spec.Containers[i].Resources = was
		}
	})
	if got := Decide(s.Observed).Status; got.Resources != nil || got.AllocatedResources.Memory().String() != "2Gi" {
		t.Errorf("of two containers of 1Gi, the status is %+v", got)
	}
}

func TestStatusKeepsWhatOthersOwn(t *testing.T) {
	s := newScene("", "main").running("main", 0)
	since := metav1.NewTime(now.Add(-time.Hour))
	s.Pod.Status.QOSClass = v1.PodQOSBurstable
	s.Pod.Status.Conditions = []v1.PodCondition{{Type: "example.com/gate", Status: v1.ConditionTrue}, {Type: v1.PodScheduled, Status: v1.ConditionTrue, LastTransitionTime: since}}
	s.Pod.Status.ResourceClaimStatuses = []v1.PodResourceClaimStatus{{Name: "claim"}}
	s.Prior = s.Pod.Status
	got := Decide(s.Observed).Status
	if _, c := podutil.GetPodConditionFromList(got.Conditions, "example.com/gate"); c == nil {
		t.Error("a foreign condition is gone")
	}
	if _, c := podutil.GetPodConditionFromList(got.Conditions, v1.PodScheduled); c == nil || !c.LastTransitionTime.Equal(&since) {
		t.Errorf("PodScheduled is %+v", c)
	}
	if got.QOSClass != v1.PodQOSBurstable || len(got.ResourceClaimStatuses) != 1 {
		t.Errorf("status is %+v", got)
	}
}

func TestTerminationMessagesShareTheirSpace(t *testing.T) {
	s := newScene("", "a b c").with(never)
	for _, name := range []string{"a", "b", "c"} {
		s.add(Run{Status: runtime.Status{ID: id(name, 0), State: runtime.Exited}, Message: strings.Repeat("x", 8192)})
	}
	for _, c := range Decide(s.Observed).Status.ContainerStatuses {
		if n := len(c.State.Terminated.Message); n != 4096 {
			t.Errorf("message of %s has %d bytes", c.Name, n)
		}
	}
}

// What holds a pod up is told when it lasts.
func TestHeldUp(t *testing.T) {
	for count, want := range map[int]string{1: "", 4: "FailedMount: gone"} {
		o := newScene("", "main").with(func(o *Observed) {
			o.Volumes = Part{Fault: &Fault{Reason: "FailedMount", Message: "gone", Count: count}}
		})
		if got := Decide(o.Observed).Status.ContainerStatuses[0].State.Waiting.Message; got != want {
			t.Errorf("after %d times: %q, want %q", count, got, want)
		}
	}
}
