package agent

import (
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tutti.dev/tutti/internal/agent/probe"
)

// What this machine cannot give to a pod it does not leave out in silence.
func TestRefusals(t *testing.T) {
	g, err := newGate(t.Context(), func() *v1.Node {
		return &v1.Node{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{v1.LabelOSStable: "linux"}}, Status: v1.NodeStatus{
			Allocatable: v1.ResourceList{v1.ResourceCPU: resource.MustParse("1"), v1.ResourcePods: resource.MustParse("9")},
		}}
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(p *v1.Pod)
		reason string
		want   string
	}{
		"nothing": {func(*v1.Pod) {}, "", ""},
		"too much": {func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: resource.MustParse("2")}
		}, "OutOfcpu", "Node didn't have enough resource: cpu"},
		"os": {func(p *v1.Pod) { p.Spec.OS = &v1.PodOS{Name: v1.Windows} }, "PodOSNotSupported", "Failed to admit pod as the OS field doesn't match node OS"},
		"resourceClaims": {func(p *v1.Pod) { p.Spec.ResourceClaims = []v1.PodResourceClaim{{Name: "gpu"}} }, "PodFeatureUnsupported",
			"devices of resource claims are not supported by tutti yet; leave resourceClaims out"},
		"sysctls": {func(p *v1.Pod) {
			p.Spec.SecurityContext = &v1.PodSecurityContext{Sysctls: []v1.Sysctl{{Name: "kernel.msgmax", Value: "1"}}}
		}, "SysctlForbidden", `forbidden sysctl: "kernel.msgmax" not allowlisted`},
		"period": {func(p *v1.Pod) { p.Annotations = map[string]string{probe.PeriodAnnotation: "soon"} }, "PodFeatureUnsupported",
			`annotation probes.tutti.dev/period is "soon"; give a duration of at least 10ms, such as 100ms`},
		"period of nobody": {func(p *v1.Pod) { p.Annotations = map[string]string{"db.probes.tutti.dev/period": "1s"} }, "PodFeatureUnsupported",
			"annotation db.probes.tutti.dev/period is for a container that the pod does not have; use one of its names, or probes.tutti.dev/period for all"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "1", Namespace: "default", Name: "web"}, Spec: v1.PodSpec{Containers: []v1.Container{container("main")}}}
			test.change(p)
			defer g.release("1")
			r := g.take(p, false)
			switch {
			case r == nil && test.want != "":
				t.Errorf("it was taken, want %q", test.want)
			case r != nil && (test.want == "" || r.Reason != test.reason || !strings.HasPrefix(r.Message, test.want)):
				t.Errorf("refused with %s: %q, want %s: %q", r.Reason, r.Message, test.reason, test.want)
			}
		})
	}
	t.Run("seLinuxOptions", func(t *testing.T) {
		p := &v1.Pod{Spec: v1.PodSpec{Containers: []v1.Container{{SecurityContext: &v1.SecurityContext{SELinuxOptions: &v1.SELinuxOptions{Level: "s0"}}}}}}
		if err := cannot(p, true); err == nil || err.Error() != "SELinux labels are not supported by tutti yet; leave seLinuxOptions out" {
			t.Errorf("where SELinux is on: %v", err)
		}
		if err := cannot(p, false); err != nil {
			t.Errorf("where SELinux is off: %v", err)
		}
	})
}

// Pods may set what is safe, and what the setting allows besides.
func TestSysctlsOfPods(t *testing.T) {
	node := &v1.Node{Status: v1.NodeStatus{Allocatable: v1.ResourceList{v1.ResourcePods: resource.MustParse("9")}}}
	g, err := newGate(t.Context(), func() *v1.Node { return node }, []string{"net.core.somaxconn", "kernel.msg*"})
	if err != nil {
		t.Fatal(err)
	}
	for name, allowed := range map[string]bool{
		"kernel.shm_rmid_forced": true, "net.core.somaxconn": true, "kernel.msgmax": true, "net/core/somaxconn": true,
		"net.core.rmem_max": false, "kernel.sem": false, "vm.swappiness": false,
	} {
		r := g.take(&v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u", Name: "p"}, Spec: v1.PodSpec{
			SecurityContext: &v1.PodSecurityContext{Sysctls: []v1.Sysctl{{Name: name, Value: "1"}}},
		}}, false)
		if allowed && r != nil || !allowed && (r == nil || r.Reason != "SysctlForbidden") {
			t.Errorf("%s: %+v, allowed %t", name, r, allowed)
		}
	}
	if _, err := newGate(t.Context(), func() *v1.Node { return node }, []string{"vm.*"}); err == nil {
		t.Error("a setting of the machine is allowed")
	}
}
