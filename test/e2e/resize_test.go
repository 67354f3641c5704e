package e2e

import "testing"

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
