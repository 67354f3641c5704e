package e2e

import (
	"fmt"
	"strings"
	"testing"
)

// A member of a StatefulSet keeps its name, its address in the DNS and its
// volume when it is replaced.
func TestStatefulSetKeepsItsState(t *testing.T) {
	n := shared(t)
	ns := n.namespace("stateful")
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: log, namespace: %[1]s}
spec: {clusterIP: None, selector: {app: log}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: log, namespace: %[1]s}
spec:
  serviceName: log
  replicas: 2
  selector: {matchLabels: {app: log}}
  template:
    metadata: {labels: {app: log}}
    spec:
      terminationGracePeriodSeconds: 0
      securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 1000}
      containers:
      - name: log
        image: busybox:1
        command: [sh, -ec, "echo $HOSTNAME >>/data/starts; exec httpd -f -p 8080 -h /data"]
        env: [{name: HOSTNAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]
        readinessProbe: {httpGet: {path: /starts, port: 8080}, periodSeconds: 1}
        volumeMounts: [{name: data, mountPath: /data}]
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
`, ns)))
	n.kubectl("-n", ns, "rollout", "status", "statefulset/log", fmt.Sprintf("--timeout=%v", patience))
	first := n.field(ns, "pod/log-1", "{.metadata.uid}")
	n.kubectl("-n", ns, "delete", "pod", "log-1", "--wait=false")
	n.until("another log-1", func() (bool, string) {
		uid := n.Kubectl("-n", ns, "get", "pod/log-1", "-o", "jsonpath={.metadata.uid}").Stdout
		return uid != "" && uid != first, uid
	})
	n.wait(ns, "pod/log-1", "condition=Ready")
	n.until("its own data at its own name", func() (bool, string) {
		got := n.Kubectl("-n", ns, "exec", "log-0", "--", "sh", "-c", fetch+"fetch log-1.log.stateful.svc.cluster.local 8080 /starts").Stdout
		return got == "log-1\nlog-1\n", got
	})
	// Deleting the claims deletes the volumes and what is in them.
	volume := n.field(ns, "pvc/data-log-1", "{.spec.volumeName}")
	n.kubectl("-n", ns, "delete", "statefulset/log", fmt.Sprintf("--timeout=%v", patience))
	n.kubectl("-n", ns, "delete", "pvc", "--all", fmt.Sprintf("--timeout=%v", patience))
	n.kubectl("wait", "--for=delete", "pv/"+volume, fmt.Sprintf("--timeout=%v", patience))
	if left := n.ok(n.Run(patience, "ls", n.Dir+"/volumes")); strings.Contains(left, volume) {
		t.Errorf("volumes still holds %s", left)
	}
}
