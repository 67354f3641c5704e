package agent

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/apis/scheduling"
)

// asking makes a pod that asks for so much of the processors, less than all of
// them by so many thousandths of one.
func (b *bench) asking(name string, less int64, critical bool) {
	b.Helper()
	b.create(func(p *v1.Pod) {
		p.Name, p.UID, p.Status.QOSClass = name, types.UID("uid-"+name), v1.PodQOSBurstable
		p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: b.processors(less)}
		if critical {
			p.Spec.Priority = new(int32(scheduling.SystemCriticalPriority))
		}
	})
}

func (b *bench) processors(less int64) resource.Quantity {
	all := b.agent.node.Node().Status.Allocatable[v1.ResourceCPU]
	return *resource.NewMilliQuantity(all.MilliValue()-less, resource.DecimalSI)
}

// named is a pod's status, empty while there is none.
func (b *bench) named(name string) v1.PodStatus {
	p, err := b.client.CoreV1().Pods("default").Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		return v1.PodStatus{}
	}
	return p.Status
}

func (b *bench) runs(name string) {
	b.Helper()
	b.until(name+" is ready", func() bool {
		s := b.named(name)
		_, ready := podutil.GetPodCondition(&s, v1.PodReady)
		return ready != nil && ready.Status == v1.ConditionTrue
	})
}

func (b *bench) fails(name, reason, message string) {
	b.Helper()
	b.until(name+" has failed", func() bool { return b.named(name).Phase == v1.PodFailed })
	if s := b.named(name); s.Reason != reason || !strings.HasPrefix(s.Message, message) {
		b.Errorf("%s failed with %s: %s", name, s.Reason, s.Message)
	}
}

// A critical pod that does not fit has others stopped, as few as will do, but
// none that is critical too.
func TestCriticalPodMakesRoom(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	b.asking("big", 200, false)
	b.runs("big")
	b.asking("late", 200, false)
	b.fails("late", "OutOfcpu", "Pod was rejected: Node didn't have enough resource: cpu")

	b.asking("critical", 100, true)
	b.runs("critical")
	b.fails("big", "Preempting", "Preempted in order to admit critical pod")
	s := b.named("big")
	if _, c := podutil.GetPodCondition(&s, v1.DisruptionTarget); c == nil || c.Status != v1.ConditionTrue || c.Reason != v1.PodReasonTerminationByKubelet {
		t.Errorf("the pod that was stopped has %+v", s.Conditions)
	}
	if s := b.named("web"); s.Phase != v1.PodRunning {
		t.Errorf("a pod that takes nothing is %s: %s", s.Phase, s.Message)
	}
	b.asking("another", 200, true)
	b.fails("another", "UnexpectedAdmissionError", "Pod was rejected: Unexpected error while attempting to recover from admission failure: preemption: ")
	if s := b.named("critical"); s.Phase != v1.PodRunning {
		t.Errorf("the first critical pod is %s: %s", s.Phase, s.Message)
	}
}

// Static pods are critical.
func TestStaticPodMakesRoom(t *testing.T) {
	b := newBench(t)
	b.asking("big", 200, false)
	b.runs("big")
	cpu := b.processors(100)
	manifest := "apiVersion: v1\nkind: Pod\nmetadata: {name: static}\nspec:\n  containers:\n" +
		"  - {name: main, image: app, imagePullPolicy: IfNotPresent, resources: {requests: {cpu: " + cpu.String() + "}}}\n"
	if err := os.WriteFile(filepath.Join(b.dir, "new"), []byte(manifest), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(b.dir, "new"), filepath.Join(Manifests(b.dir), "static.yaml")); err != nil {
		t.Fatal(err)
	}
	b.fails("big", "Preempting", "Preempted in order to admit critical pod")
	static := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "static-here"}}
	b.until("the static pod is ready", func() bool {
		x := b.agent.staticOf(static)
		return x != nil && podutil.IsPodReady(x.desired())
	})
}
