package agent

import (
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

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
