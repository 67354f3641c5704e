package e2e

import (
	"fmt"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/api/resource"
)

// A busy pod is seen by kubectl top, by those who may view pods and nobody
// else, and its autoscaler gives it company.
func TestMetrics(t *testing.T) {
	n := shared(t)
	ns := n.namespace("metrics")
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: busy, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: busy}}
  template:
    metadata: {labels: {app: busy}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: busy
        image: busybox:1
        command: [sh, -c, "while :; do :; done"]
        resources: {requests: {cpu: 50m}, limits: {cpu: 200m, memory: 32Mi}}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: busy, namespace: %[1]s}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: busy}
  maxReplicas: 2
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 50}}}]
`, ns)))
	n.wait(ns, "deployment/busy", "condition=available")

	n.until("kubectl top pod shows a busy pod", func() (bool, string) {
		r := n.Kubectl("-n", ns, "top", "pod", "-l", "app=busy", "--no-headers")
		f := strings.Fields(r.Stdout)
		if r.Err != nil || len(f) != 3 || !strings.HasPrefix(f[0], "busy-") {
			return false, r.String()
		}
		cpu, err := resource.ParseQuantity(f[1])
		return err == nil && cpu.MilliValue() > 100 && cpu.MilliValue() < 300, r.Stdout
	})
	f := strings.Fields(n.kubectl("top", "node", "--no-headers"))
	if len(f) != 5 {
		t.Fatalf("kubectl top node: %q", f)
	}
	for i, least := range map[int]string{1: "100m", 3: "50Mi"} {
		if q, err := resource.ParseQuantity(f[i]); err != nil || q.Cmp(resource.MustParse(least)) < 0 {
			t.Errorf("kubectl top node: %q, want %s at least: %v", f[i], least, err)
		}
	}

	n.kubectl("-n", ns, "create", "rolebinding", "sees", "--clusterrole=view", "--user=viewer")
	n.until("a viewer may see what pods use", func() (bool, string) {
		r := n.Kubectl("-n", ns, "--as=viewer", "top", "pod")
		return r.Err == nil, r.String()
	})
	if r := n.Kubectl("-n", ns, "--as=stranger", "top", "pod"); r.Err == nil || !strings.Contains(r.Stderr, `cannot list resource "pods" in API group "metrics.k8s.io"`) {
		t.Errorf("a stranger asks: %v", r)
	}

	n.wait(ns, "horizontalpodautoscaler/busy", "condition=ScalingActive")
	n.wait(ns, "deployment/busy", "jsonpath={.status.readyReplicas}=2")
}
