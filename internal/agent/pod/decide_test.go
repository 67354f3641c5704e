package pod

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"tutti.dev/tutti/internal/runtime"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// A scene is built in words: names of init containers ("~" makes a sidecar,
// "+" gives a postStart hook, "-" a preStop hook), names of containers, and
// what is known of each ("main=run", "main=exit1").
type scene struct {
	*Observed
}

func newScene(init, regular string) *scene {
	grace := int64(30)
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "default", UID: "u1", Generation: 1},
		Spec:       v1.PodSpec{RestartPolicy: v1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace},
		Status:     v1.PodStatus{Phase: v1.PodPending},
	}
	parse := func(words string) (list []v1.Container) {
		for _, w := range strings.Fields(words) {
			c := v1.Container{Name: strings.Trim(w, "~+-"), Image: "app"}
			if strings.Contains(w, "~") {
				always := v1.ContainerRestartPolicyAlways
				c.RestartPolicy = &always
			}
			sleep := &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 1}}
			if strings.Contains(w, "+") {
				c.Lifecycle = &v1.Lifecycle{PostStart: sleep}
			}
			if strings.Contains(w, "-") {
				c.Lifecycle = &v1.Lifecycle{PreStop: sleep}
			}
			list = append(list, c)
		}
		return list
	}
	p.Spec.InitContainers, p.Spec.Containers = parse(init), parse(regular)
	return &scene{&Observed{
		Now: now, Pod: p, Ground: Part{Ready: true}, Volumes: Part{Ready: true},
		Containers: map[string]Container{}, Stops: map[runtime.ID]Stop{}, Probes: map[runtime.ID]Probe{},
	}}
}

func id(name string, attempt int) runtime.ID {
	return runtime.ID{Pod: "u1", Name: name, Attempt: attempt}
}

func (s *scene) add(r Run) *scene { s.Runs = append(s.Runs, r); return s }

// lost is a run that nobody saw end.
func (s *scene) lost(name string, attempt int) *scene {
	return s.add(Run{Status: runtime.Status{ID: id(name, attempt), State: runtime.Exited, Unknown: true, FinishedAt: now}})
}

func (s *scene) running(name string, attempt int) *scene {
	return s.add(Run{Status: runtime.Status{ID: id(name, attempt), State: runtime.Running, StartedAt: now.Add(-time.Minute), Labels: s.labels()}})
}

// again is a second run, after a restart of all.
func (s *scene) again(name string) *scene {
	s.running(name, 1)
	s.Runs[len(s.Runs)-1].Labels = round1
	return s
}

var round1 = map[string]string{LabelRound: "1"}

func (s *scene) exited(name string, attempt, code int, ago time.Duration) *scene {
	return s.add(Run{Status: runtime.Status{ID: id(name, attempt), State: runtime.Exited, ExitCode: code, StartedAt: now.Add(-time.Hour), FinishedAt: now.Add(-ago), Labels: s.labels()}})
}

// on gives the pod a ground by name; what ran so far ran on another.
func (s *scene) on(ground string) *scene {
	s.GroundName = ground
	return s
}

func (s *scene) labels() map[string]string {
	if s.GroundName == "" {
		return nil
	}
	return map[string]string{LabelGround: s.GroundName}
}

// imaged says that images are here for an attempt of the containers.
func (s *scene) imaged(attempt int, names ...string) *scene {
	for _, n := range names {
		c := s.Containers[n]
		c.Attempt, c.Image = attempt, true
		s.Containers[n] = c
	}
	return s
}

func (s *scene) with(f func(o *Observed)) *scene { f(s.Observed); return s }

func (s *scene) deleted(grace int64) *scene {
	t := metav1.NewTime(now)
	s.Pod.DeletionTimestamp, s.Pod.DeletionGracePeriodSeconds = &t, &grace
	return s
}

func (s *scene) stop(name string, f func(s *Stop)) *scene {
	i := id(name, 0)
	st := Stop{Begun: now.Add(-5 * time.Second), Grace: 30 * time.Second}
	f(&st)
	s.Stops[i] = st
	return s
}

func steps(d Decision) []string {
	var out []string
	for _, s := range d.Steps {
		w := string(s.Do)
		if s.Container != "" {
			w += fmt.Sprintf(" %s/%d", s.Container, s.ID.Attempt)
		}
		if s.Restart {
			w += " restart"
		}
		if s.LessMemory {
			w += " less memory"
		}
		out = append(out, w)
	}
	return out
}

func TestDecide(t *testing.T) {
	memory := func(s string) v1.ResourceRequirements {
		return v1.ResourceRequirements{Limits: v1.ResourceList{v1.ResourceMemory: resource.MustParse(s)}}
	}
	tests := []struct {
		name string
		s    *scene
		want []string
		wake time.Duration // from now; 0: none
	}{
		{"everything at once", newScene("", "main").with(func(o *Observed) { o.Ground, o.Volumes = Part{}, Part{} }),
			[]string{"open ground", "prepare volumes", "get image main/0"}, 0},
		{"start waits for the ground", newScene("", "main").imaged(0, "main").with(func(o *Observed) { o.Ground = Part{} }),
			[]string{"open ground"}, 0},
		{"start waits for volumes", newScene("", "main").imaged(0, "main").with(func(o *Observed) {
			o.Volumes = Part{Fault: &Fault{Retry: now.Add(time.Second)}}
		}), nil, time.Second},
		{"fault is over", newScene("", "main").imaged(0, "main").with(func(o *Observed) {
			o.Volumes = Part{Fault: &Fault{Retry: now}}
		}), []string{"prepare volumes"}, 0},
		{"start", newScene("", "main").imaged(0, "main"), []string{"start main/0"}, 0},
		{"two at once", newScene("", "a b").imaged(0, "a", "b"), []string{"start a/0", "start b/0"}, 0},
		{"starting already", newScene("", "main").imaged(0, "main").with(func(o *Observed) {
			o.Containers["main"] = Container{Image: true, Starting: true}
		}), nil, 0},
		{"runs", newScene("", "main").running("main", 0), nil, 0},

		{"postStart holds the next back until started", newScene("", "a+ b").imaged(0, "a", "b"), []string{"start a/0"}, 0},
		{"postStart holds the next back while it runs", newScene("", "a+ b").imaged(0, "b").running("a", 0).with(func(o *Observed) {
			o.Containers["a"] = Container{Hook: true}
		}), nil, 0},
		{"postStart is over", newScene("", "a+ b").imaged(0, "b").running("a", 0), []string{"start b/0"}, 0},
		{"postStart of one that cannot start", newScene("", "a+ b").imaged(0, "b").with(func(o *Observed) {
			o.Containers["a"] = Container{Fault: &Fault{Reason: ReasonErrImagePull, At: now.Add(-5 * time.Second), Retry: now.Add(time.Second)}}
		}), []string{"start b/0"}, time.Second},

		{"init first", newScene("i j", "main").imaged(0, "i", "j", "main"), []string{"start i/0"}, 0},
		{"init runs", newScene("i j", "main").imaged(0, "j", "main").running("i", 0), nil, 0},
		{"init done", newScene("i j", "main").imaged(0, "j", "main").exited("i", 0, 0, 0), []string{"start j/0"}, 0},
		{"inits done", newScene("i j", "main").imaged(0, "main").exited("i", 0, 0, 0).exited("j", 0, 0, 0), []string{"start main/0"}, 0},
		{"init failed", newScene("i", "main").imaged(1, "i").exited("i", 0, 1, 0), []string{"start i/1"}, 0},
		{"init failed twice", newScene("i", "main").imaged(2, "i").exited("i", 1, 1, time.Second).with(func(o *Observed) {
			o.Containers["i"] = Container{Attempt: 1, Crash: Crash{Delay: 10 * time.Second, At: now.Add(-2 * time.Second)}}
		}), nil, 9 * time.Second},
		{"init failed for good", newScene("i", "main").exited("i", 0, 1, 0).with(never), []string{"tell Failed"}, 0},
		{"init does not run again", newScene("i", "main").running("main", 0), nil, 0},

		{"machine started again: init first", newScene("i j", "main").imaged(1, "i", "j", "main").exited("i", 0, 0, 0).exited("j", 0, 0, 0).lost("main", 0).on("new"), []string{"start i/1"}, 0},
		{"machine started again: init on failure", newScene("i", "main").imaged(1, "i", "main").exited("i", 0, 0, 0).lost("main", 0).with(onFailure).on("new"), []string{"start i/1"}, 0},
		{"machine started again: next init", newScene("i j", "main").imaged(1, "j", "main").exited("i", 0, 0, 0).exited("j", 0, 0, 0).lost("main", 0).on("new").exited("i", 1, 0, 0),
			[]string{"start j/1"}, 0},
		{"machine started again: inits done", newScene("i", "main").imaged(1, "main").exited("i", 0, 0, 0).lost("main", 0).on("new").exited("i", 1, 0, 0), []string{"start main/1"}, 0},
		{"machine started again: init failed then", newScene("i", "main").imaged(1, "i").lost("i", 0).on("new"), []string{"start i/1"}, 0},
		{"machine started again: init does not run twice", newScene("i", "main").imaged(2, "main").exited("i", 0, 0, 0).lost("main", 0).on("new").exited("i", 1, 0, 0).exited("main", 1, 1, 0),
			[]string{"start main/2"}, 0},
		{"machine started again: sidecar first", newScene("s~ i", "main").imaged(1, "s", "i", "main").lost("s", 0).exited("i", 0, 0, 0).lost("main", 0).on("new"), []string{"start s/1"}, 0},
		{"machine started again: init after its sidecar", newScene("s~ i", "main").imaged(1, "i", "main").lost("s", 0).exited("i", 0, 0, 0).lost("main", 0).on("new").running("s", 1),
			[]string{"start i/1"}, 0},
		{"machine started again: never", newScene("i", "main").exited("i", 0, 0, 0).lost("main", 0).with(never).on("new"), []string{"tell Failed"}, 0},
		{"machine started again: success is final", newScene("i", "a b").imaged(1, "i", "b").exited("i", 0, 0, 0).exited("a", 0, 0, 0).lost("b", 0).with(onFailure).on("new").exited("i", 1, 0, 0),
			[]string{"start b/1"}, 0},
		{"agent started again: what runs is here", newScene("i", "main").exited("i", 0, 0, 0).running("main", 0).on("same"), nil, 0},

		{"sidecar first", newScene("s~ i", "main").imaged(0, "s", "i"), []string{"start s/0"}, 0},
		{"sidecar not started", newScene("s~ i", "main").imaged(0, "i").running("s", 0).with(startupProbe), nil, 0},
		{"sidecar started", newScene("s~ i", "main").imaged(0, "i").running("s", 0).with(startupProbe).with(func(o *Observed) {
			o.Probes[id("s", 0)] = Probe{Started: true}
		}), []string{"start i/0"}, 0},
		{"sidecar's startup failed", newScene("s~ i", "main").running("s", 0).with(startupProbe).with(func(o *Observed) {
			o.Probes[id("s", 0)] = Probe{StartupFailed: true}
		}), []string{"begin stop s/0"}, 0},
		{"sidecar and init done", newScene("s~ i", "main").imaged(0, "main").running("s", 0).exited("i", 0, 0, 0), []string{"start main/0"}, 0},
		{"sidecar comes back while an init runs", newScene("s~ i", "main").imaged(1, "s").exited("s", 0, 1, 0).running("i", 0), []string{"start s/1"}, 0},
		{"sidecar comes back", newScene("s~", "main").imaged(1, "s").exited("s", 0, 0, 0).running("main", 0).with(never), []string{"start s/1"}, 0},
		{"sidecar does not keep a finished pod", newScene("s~", "main").running("s", 0).exited("main", 0, 0, 0).with(never), []string{"begin stop s/0"}, 0},
		{"sidecar does not come back to a finished pod", newScene("s~", "main").exited("s", 0, 0, 0).exited("main", 0, 0, 0).with(never), []string{"tell Succeeded"}, 0},

		{"restart at once", newScene("", "main").imaged(1, "main").exited("main", 0, 1, 0), []string{"start main/1"}, 0},
		{"restart gets the image anew", newScene("", "main").imaged(0, "main").exited("main", 0, 1, 0), []string{"get image main/1"}, 0},
		{"back-off", newScene("", "main").exited("main", 1, 1, 4*time.Second).with(func(o *Observed) {
			o.Containers["main"] = Container{Attempt: 1, Crash: Crash{Delay: 10 * time.Second, At: now.Add(-20 * time.Second)}}
		}), nil, 6 * time.Second},
		{"back-off is forgotten after ten minutes", newScene("", "main").imaged(2, "main").exited("main", 1, 1, 0).with(func(o *Observed) {
			o.Containers["main"] = Container{Attempt: 2, Image: true, Crash: Crash{Delay: 300 * time.Second, At: now.Add(-11 * time.Minute)}}
		}), []string{"start main/2"}, 0},
		{"back-off is not that of another image", newScene("", "main").imaged(2, "main").add(Run{Status: runtime.Status{ID: id("main", 1), State: runtime.Exited,
			ExitCode: 1, FinishedAt: now, Labels: map[string]string{LabelImage: "old"}}}).with(func(o *Observed) {
			o.Containers["main"] = Container{Attempt: 2, Image: true, Crash: Crash{Delay: 300 * time.Second, At: now.Add(-time.Minute)}}
		}), []string{"start main/2"}, 0},
		{"on failure: success is final", newScene("", "main").exited("main", 0, 0, 0).with(onFailure), []string{"tell Succeeded"}, 0},
		{"on failure: failure is not", newScene("", "main").imaged(1, "main").exited("main", 0, 2, 0).with(onFailure), []string{"start main/1"}, 0},
		{"never", newScene("", "main").exited("main", 0, 2, 0).with(never), []string{"tell Failed"}, 0},
		{"never, another runs", newScene("", "a b").exited("a", 0, 2, 0).running("b", 0).with(never), nil, 0},
		{"unseen end counts as failure", newScene("", "main").imaged(1, "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Exited, Unknown: true}}).with(onFailure),
			[]string{"start main/1"}, 0},
		{"old runs go", newScene("", "main").running("main", 3).exited("main", 2, 1, 0).exited("main", 1, 1, 0).exited("main", 0, 1, 0),
			[]string{"remove main/1", "remove main/0"}, 0},
		{"attempts go on from what the API counts", newScene("", "main").imaged(4, "main").with(func(o *Observed) {
			o.Prior.ContainerStatuses = []v1.ContainerStatus{{Name: "main", RestartCount: 4}}
		}), []string{"start main/4"}, 0},

		{"liveness failed", newScene("", "main").running("main", 0).with(func(o *Observed) { o.Probes[id("main", 0)] = Probe{Started: true, LivenessFailed: true} }),
			[]string{"begin stop main/0"}, 0},
		{"stopping one container", newScene("", "main").running("main", 0).stop("main", func(s *Stop) {}), []string{"terminate main/0"}, 0},
		{"image changed", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelImage: "old"}}}),
			[]string{"begin stop main/0 restart"}, 0},
		{"image changed, never", newScene("", "main").imaged(1, "main").exited("main", 0, 143, 0).with(never).stop("main", func(s *Stop) { s.Restart = true }),
			[]string{"start main/1"}, 0},
		{"resources changed", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) { o.Pod.Spec.Containers[0].Resources = memory("2Gi") }), []string{"resize main/0"}, 0},
		{"resources changed to less", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) { o.Pod.Spec.Containers[0].Resources = memory("512Mi") }), []string{"resize main/0 less memory"}, 0},
		{"resources could not be changed", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) {
				o.Pod.Spec.Containers[0].Resources = memory("512Mi")
				o.Containers["main"] = Container{Unresized: &Fault{Retry: now.Add(time.Second)}}
			}), nil, time.Second},
		{"resources changed, put off", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) {
				o.Pod.Spec.Containers[0].Resources = memory("2Gi")
				o.Resize = &Refusal{Reason: v1.PodReasonDeferred}
			}), nil, 0},
		{"resources changed, restart wanted", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) {
				o.Pod.Spec.Containers[0].Resources = memory("2Gi")
				o.Pod.Spec.Containers[0].ResizePolicy = []v1.ContainerResizePolicy{{ResourceName: v1.ResourceMemory, RestartPolicy: v1.RestartContainer}}
			}), []string{"begin stop main/0 restart"}, 0},
		{"resources as they were", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"limits":{"memory":"1Gi"}}`}}}).
			with(func(o *Observed) { o.Pod.Spec.Containers[0].Resources = memory("1Gi") }), nil, 0},

		{"resources of the pod changed", newScene("", "main").add(Run{Status: runtime.Status{ID: id("main", 0), State: runtime.Running, Labels: map[string]string{LabelResources: `{"pod":{"limits":{"memory":"1Gi"}}}`}}}).
			with(func(o *Observed) { r := memory("2Gi"); o.Pod.Spec.Resources = &r }), []string{"resize main/0"}, 0},

		{"restart of all stops the others at once", newScene("i s~", "a b").exited("i", 0, 0, time.Hour).running("s", 0).exited("a", 0, 42, 0).running("b", 0).with(allOn42),
			[]string{"begin stop s/0", "begin stop b/0"}, 0},
		{"restart of all begins with the first", newScene("i s~", "a b").imaged(1, "i").exited("i", 0, 0, time.Hour).exited("s", 0, 137, 0).exited("a", 0, 42, 0).exited("b", 0, 137, 0).with(allOn42),
			[]string{"start i/1"}, 0},
		{"restart of all goes on", newScene("i", "a b").imaged(1, "a", "b").exited("i", 0, 0, time.Hour).add(Run{Status: runtime.Status{ID: id("i", 1), State: runtime.Exited, FinishedAt: now, Labels: round1}}).
			exited("a", 0, 42, time.Minute).exited("b", 0, 137, time.Minute).with(allOn42), []string{"start a/1", "start b/1"}, 0},
		{"restart of all is over", newScene("", "a b").exited("a", 0, 42, 0).again("a").exited("b", 0, 137, 0).again("b").with(allOn42), nil, 0},
		{"restart of all is over and its cause forgotten", newScene("", "a b").exited("a", 1, 1, 0).again("a").again("b").with(allOn42).with(func(o *Observed) { o.Runs[0].Labels = round1 }), nil, 0},
		{"restart of all backs off", newScene("", "a b").exited("a", 1, 42, 4*time.Second).exited("b", 1, 137, 2*time.Second).with(allOn42).with(func(o *Observed) {
			o.Containers["a"] = Container{Attempt: 1, Crash: Crash{Delay: 10 * time.Second, At: now.Add(-time.Minute)}}
		}), nil, 6 * time.Second},
		{"restart by a rule", newScene("", "a").imaged(1, "a").exited("a", 0, 42, 0).with(never).with(func(o *Observed) {
			rule(&o.Pod.Spec.Containers[0], v1.ContainerRestartRuleActionRestart)
		}), []string{"start a/1"}, 0},
		{"deleted", newScene("", "a b").running("a", 0).running("b", 0).deleted(30), []string{"begin stop a/0", "begin stop b/0"}, 0},
		{"deleted before it started", newScene("", "main").imaged(0, "main").deleted(30), []string{"close"}, 0},
		{"deleted while it starts", newScene("", "main").deleted(30).with(func(o *Observed) { o.Containers["main"] = Container{Starting: true} }), nil, 0},
		{"preStop runs", newScene("", "main-").running("main", 0).deleted(30).stop("main", func(s *Stop) { s.Hook = true }), nil, 25 * time.Second},
		{"preStop overruns", newScene("", "main-").running("main", 0).deleted(30).stop("main", func(s *Stop) { s.Hook, s.Begun = true, now.Add(-30*time.Second) }),
			[]string{"terminate main/0"}, 0},
		{"terminated", newScene("", "main").running("main", 0).deleted(30).stop("main", func(s *Stop) { s.Terminated = now.Add(-5 * time.Second) }), nil, 25 * time.Second},
		{"grace over", newScene("", "main").running("main", 0).deleted(30).stop("main", func(s *Stop) { s.Begun, s.Terminated = now.Add(-30*time.Second), now.Add(-30*time.Second) }),
			[]string{"kill main/0"}, 0},
		{"grace shortened", newScene("", "main").running("main", 0).deleted(5).stop("main", func(s *Stop) { s.Terminated = now.Add(-5 * time.Second) }),
			[]string{"kill main/0"}, 0},
		{"never less than two seconds", newScene("", "main").running("main", 0).deleted(0).stop("main", func(s *Stop) { s.Terminated = now.Add(-time.Second) }), nil, time.Second},
		{"killed", newScene("", "main").running("main", 0).deleted(0).stop("main", func(s *Stop) { s.Terminated, s.Killed = now.Add(-4*time.Second), now.Add(-2*time.Second) }), nil, 8 * time.Second},
		{"killed to no effect", newScene("", "main").running("main", 0).deleted(0).stop("main", func(s *Stop) { s.Terminated, s.Killed = now.Add(-14*time.Second), now.Add(-11*time.Second) }),
			[]string{"kill main/0"}, 0},
		{"sidecars last", newScene("s~ t~", "main").running("s", 0).running("t", 0).running("main", 0).deleted(30).
			stop("main", func(s *Stop) {}).stop("s", func(s *Stop) {}).stop("t", func(s *Stop) {}), []string{"terminate main/0"}, 25 * time.Second},
		{"sidecars in reverse", newScene("s~ t~", "main").running("s", 0).running("t", 0).exited("main", 0, 0, 0).deleted(30).
			stop("s", func(s *Stop) {}).stop("t", func(s *Stop) {}), []string{"terminate t/0"}, 25 * time.Second},
		{"sidecars when the grace is over", newScene("s~", "main").running("s", 0).running("main", 0).deleted(30).
			stop("main", func(s *Stop) {
				s.Begun, s.Terminated, s.Killed = now.Add(-30*time.Second), now.Add(-30*time.Second), now
			}).
			stop("s", func(s *Stop) { s.Begun = now.Add(-30 * time.Second) }), []string{"terminate s/0"}, 10 * time.Second},
		{"deletion waits for the terminal phase", newScene("", "main").exited("main", 0, 0, 0).deleted(30).with(func(o *Observed) { o.Closed = true }), []string{"tell Succeeded"}, 0},
		{"deletion", newScene("", "main").exited("main", 0, 0, 0).deleted(30).with(func(o *Observed) { o.Closed, o.Pod.Status.Phase = true, v1.PodFailed }), []string{"delete"}, 0},
		{"gone", newScene("", "main").running("main", 0).with(func(o *Observed) { o.Gone = true }), []string{"begin stop main/0"}, 0},
		{"gone and unknown", newScene("", "").running("main", 0).with(func(o *Observed) { o.Gone = true }), []string{"begin stop main/0"}, 0},
		{"gone and stopped", newScene("", "").exited("main", 0, 0, 0).with(func(o *Observed) { o.Gone = true }), []string{"close"}, 0},

		{"finished, and the API knows", newScene("", "main").exited("main", 0, 2, 0).with(never).with(func(o *Observed) { o.Pod.Status.Phase = v1.PodFailed }), []string{"close"}, 0},
		{"refused", newScene("", "main").imaged(0, "main").with(func(o *Observed) { o.Refusal = &Refusal{Reason: "OutOfcpu"} }), []string{"close"}, 0},
		{"terminal stays so", newScene("", "main").imaged(0, "main").with(func(o *Observed) { o.Pod.Status.Phase, o.Closed = v1.PodFailed, true }), nil, 0},
		{"deadline to come", newScene("", "main").running("main", 0).with(deadline(90 * time.Second)), nil, 30 * time.Second},
		{"deadline", newScene("", "main").running("main", 0).with(deadline(60 * time.Second)), []string{"begin stop main/0"}, 0},
		{"halt", newScene("", "main").imaged(1, "main").exited("main", 0, 1, 0).with(func(o *Observed) { o.Halt = true }), nil, 0},
		{"halt stops", newScene("", "main").running("main", 0).with(func(o *Observed) { o.Halt, o.HaltGrace = true, time.Second }), []string{"begin stop main/0"}, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := Decide(tt.s.Observed)
			got := steps(d)
			// The step is the status's writer's.
			if phase := d.Status.Phase; len(got) == 0 && podutil.IsPodPhaseTerminal(phase) && !podutil.IsPodPhaseTerminal(tt.s.Pod.Status.Phase) {
				got = []string{"tell " + string(phase)}
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("steps %q, want %q", got, tt.want)
			}
			wake := time.Duration(0)
			if !d.Wake.IsZero() {
				wake = d.Wake.Sub(now)
			}
			if wake != tt.wake {
				t.Errorf("wake in %s, want %s", wake, tt.wake)
			}
		})
	}
}

func never(o *Observed)     { o.Pod.Spec.RestartPolicy = v1.RestartPolicyNever }
func onFailure(o *Observed) { o.Pod.Spec.RestartPolicy = v1.RestartPolicyOnFailure }

func startupProbe(o *Observed) {
	for i := range o.Pod.Spec.InitContainers {
		if sidecar(&o.Pod.Spec.InitContainers[i]) {
			o.Pod.Spec.InitContainers[i].StartupProbe = &v1.Probe{}
		}
	}
}

// deadline gives a pod that started a minute ago so long to live.
func deadline(d time.Duration) func(o *Observed) {
	return func(o *Observed) {
		seconds := int64(d / time.Second)
		start := metav1.NewTime(now.Add(-time.Minute))
		o.Pod.Spec.ActiveDeadlineSeconds, o.Prior.StartTime = &seconds, &start
	}
}

// rule makes a container's exit with 42 have a consequence; any other is final.
func rule(c *v1.Container, action v1.ContainerRestartRuleAction) {
	never := v1.ContainerRestartPolicyNever
	c.RestartPolicy = &never
	c.RestartPolicyRules = []v1.ContainerRestartRule{{Action: action, ExitCodes: &v1.ContainerRestartRuleOnExitCodes{
		Operator: v1.ContainerRestartRuleOnExitCodesOpIn, Values: []int32{42}}}}
}

// allOn42 makes the exit of container a with 42 restart all; the pod is not
// restarted otherwise.
func allOn42(o *Observed) {
	o.Pod.Spec.RestartPolicy = v1.RestartPolicyNever
	rule(&o.Pod.Spec.Containers[0], v1.ContainerRestartRuleActionRestartAllContainers)
}

func TestGraceOfStop(t *testing.T) {
	s := newScene("", "main").running("main", 0).deleted(7)
	if d := Decide(s.Observed); d.Steps[0].Grace != 7*time.Second {
		t.Errorf("grace %s, want that of the deletion", d.Steps[0].Grace)
	}
	grace := int64(3)
	s = newScene("", "main").running("main", 0).with(func(o *Observed) {
		o.Pod.Spec.Containers[0].LivenessProbe = &v1.Probe{TerminationGracePeriodSeconds: &grace}
		o.Probes[id("main", 0)] = Probe{LivenessFailed: true}
	})
	if d := Decide(s.Observed); d.Steps[0].Grace != 3*time.Second {
		t.Errorf("grace %s, want that of the probe", d.Steps[0].Grace)
	}
}

func TestCrash(t *testing.T) {
	var c Crash
	at := now
	for i, want := range []time.Duration{10, 20, 40, 80, 160, 300, 300} {
		c = c.Next(at, at)
		if c.Delay != want*time.Second {
			t.Errorf("delay %d is %s, want %s", i, c.Delay, want*time.Second)
		}
		if got := c.Until(at); got != at.Add(c.Delay) {
			t.Errorf("may start again at %s", got)
		}
	}
	if c = c.Next(at.Add(11*time.Minute), at.Add(11*time.Minute)); c.Delay != 10*time.Second {
		t.Errorf("delay after a long run is %s", c.Delay)
	}
}

func TestRecover(t *testing.T) {
	p := newScene("", "a b c").Pod
	p.Status.ContainerStatuses = []v1.ContainerStatus{
		{Name: "a", ContainerID: ContainerID(id("a", 2)), RestartCount: 2, State: v1.ContainerState{Running: &v1.ContainerStateRunning{}},
			LastTerminationState: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ContainerID: ContainerID(id("a", 1)), ExitCode: 5, Reason: "Error"}}},
		{Name: "b", ContainerID: ContainerID(id("b", 0)), State: v1.ContainerState{Running: &v1.ContainerStateRunning{}}},
		{Name: "c", State: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ContainerID: ContainerID(id("c", 0)), ExitCode: 0, Reason: "Completed"}}},
	}
	runs := Recover(p, []Run{{Status: runtime.Status{ID: id("b", 0), State: runtime.Running}}}, now)
	got := map[string]string{}
	for _, r := range runs {
		got[r.ID.String()] = fmt.Sprintf("%s %d %v", r.State, r.ExitCode, r.Unknown)
	}
	want := map[string]string{
		"u1_a_2": "exited 0 true", "u1_a_1": "exited 5 false", "u1_b_0": "running 0 false", "u1_c_0": "exited 0 false",
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("recovered %v, want %v", got, want)
	}
}

// An evicted pod ends within the eviction's grace, says why, and stays so.
func TestEvicted(t *testing.T) {
	condition := v1.PodCondition{Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonTerminationByKubelet, Message: "no room"}
	evicted := func(o *Observed) {
		o.Evicted = &Eviction{Reason: "Evicted", Message: "no room", Grace: time.Second, Condition: &condition}
	}
	s := newScene("", "main").running("main", 0).with(evicted)
	d := Decide(s.Observed)
	if got := steps(d); !slices.Equal(got, []string{"begin stop main/0"}) || d.Steps[0].Grace != time.Second {
		t.Errorf("%q within %v", got, d.Steps[0].Grace)
	}
	if d.Status.Phase == v1.PodFailed {
		t.Error("failed while it runs")
	}

	s = newScene("", "main").exited("main", 0, 0, time.Second).with(evicted)
	d = Decide(s.Observed)
	if got := steps(d); !slices.Equal(got, []string{"close"}) {
		t.Errorf("%q", got)
	}
	told := func(status v1.PodStatus) {
		t.Helper()
		if status.Phase != v1.PodFailed || status.Reason != "Evicted" || status.Message != "no room" {
			t.Errorf("told %s, %s, %s", status.Phase, status.Reason, status.Message)
		}
		found := 0
		for _, c := range status.Conditions {
			if c.Type == v1.DisruptionTarget && c.Reason == v1.PodReasonTerminationByKubelet && c.Message == "no room" && !c.LastTransitionTime.IsZero() {
				found++
			}
		}
		if found != 1 {
			t.Errorf("conditions %+v", status.Conditions)
		}
	}
	told(d.Status)
	// Once told it needs no reminder: the agent may have been restarted.
	s.Prior, s.Pod.Status, s.Evicted = d.Status, d.Status, nil
	told(Decide(s.Observed).Status)

	// What had come to its own end before is left at that.
	s = newScene("", "main").exited("main", 0, 0, time.Second).with(func(o *Observed) { o.Prior.Phase = v1.PodSucceeded }).with(evicted)
	if got := Decide(s.Observed).Status.Phase; got != v1.PodSucceeded {
		t.Errorf("finished before, told %s", got)
	}
}
