package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// New resources of a container, and of a whole pod, are in force without a
// restart.
func TestResize(t *testing.T) {
	n := shared(t)
	ns := n.namespace("resized")
	n.ok(n.Apply(pod(ns, "small", one("command: [sleep, '1000']\nresources: {requests: {memory: 16Mi}, limits: {memory: 32Mi}}")+
		"resources: {requests: {memory: 16Mi}, limits: {memory: 64Mi}}\nterminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/small", "condition=Ready")
	n.kubectl("-n", ns, "patch", "pod", "small", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"limits":{"memory":"48Mi"}}}]}}`)
	n.wait(ns, "pod/small", "jsonpath={.status.containerStatuses[0].resources.limits.memory}=48Mi")
	n.kubectl("-n", ns, "patch", "pod", "small", "--subresource=resize", "-p", `{"spec":{"resources":{"limits":{"memory":"80Mi"}}}}`)
	n.wait(ns, "pod/small", "jsonpath={.status.resources.limits.memory}=80Mi")
	if restarts := n.field(ns, "pod/small", "{.status.containerStatuses[0].restartCount}"); restarts != "0" {
		t.Errorf("it was restarted %s times", restarts)
	}
}

// What a container gets when it starts anew, the pod must have: it is resized
// first. Nobody is killed to make a container fit a limit.
func TestResizeThatRestarts(t *testing.T) {
	n := shared(t)
	ns := n.namespace("resize")
	n.ok(n.Apply(pod(ns, "grow", restarting(one("command: [sleep, '1000']\nresources: {limits: {cpu: 50m, memory: 32Mi}}\n"+
		"resizePolicy: [{resourceName: cpu, restartPolicy: RestartContainer}]"))+"terminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/grow", "condition=Ready")
	n.kubectl("-n", ns, "patch", "pod", "grow", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"requests":{"cpu":"100m"},"limits":{"cpu":"100m"}}}]}}`)
	n.wait(ns, "pod/grow", "jsonpath={.status.containerStatuses[0].restartCount}=1")
	n.wait(ns, "pod/grow", "condition=Ready")
	quota := n.kubectl("-n", ns, "exec", "grow", "--", "sh", "-c", "cat /sys/fs/cgroup/cpu.max || cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us")
	if !strings.HasPrefix(quota, "10000") {
		t.Errorf("the container may use %q of 100000 microseconds, want 10000", quota)
	}
	n.kubectl("-n", ns, "patch", "pod", "grow", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"requests":{"memory":"10Ki"},"limits":{"memory":"10Ki"}}}]}}`)
	refused := `{.status.conditions[?(@.type=="PodResizeInProgress")]`
	n.wait(ns, "pod/grow", "jsonpath="+refused+".reason}=Error")
	var used int
	message := n.field(ns, "pod/grow", refused+".message}")
	if _, err := fmt.Sscanf(message, "memory limit (10240) below current usage (%d); set it higher", &used); err != nil || used < 10240 {
		t.Errorf("the limit is refused with %q: %v", message, err)
	}
	n.kubectl("-n", ns, "patch", "pod", "grow", "--subresource=resize", "-p",
		`{"spec":{"containers":[{"name":"main","resources":{"requests":{"memory":"24Mi"},"limits":{"memory":"24Mi"}}}]}}`)
	n.wait(ns, "pod/grow", "jsonpath={.status.containerStatuses[0].resources.limits.memory}=24Mi")
	if restarts := n.field(ns, "pod/grow", "{.status.containerStatuses[0].restartCount}"); restarts != "1" {
		t.Errorf("%s restarts, want 1", restarts)
	}
}
