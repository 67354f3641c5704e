package e2e

import (
	"fmt"
	"os"
	"path/filepath"
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

// The files of an image are a volume that cannot be written to.
func TestImageVolume(t *testing.T) {
	n := shared(t)
	ns := n.namespace("imagevolume")
	n.ok(n.Apply(pod(ns, "reader", `
restartPolicy: Never
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "cmp /bin/busybox /tools/bin/busybox; cmp /bin/busybox /bin2/busybox; ! touch /tools/mine; ! touch /bin2/mine; /tools/bin/busybox echo so it is"]
  volumeMounts: [{name: tools, mountPath: /tools}, {name: tools, mountPath: /bin2, subPath: bin}]
volumes: [{name: tools, image: {reference: "busybox:1", pullPolicy: Never}}]
`) + "\n---\n" + pod(ns, "absent", `
containers:
- {name: main, image: "busybox:1", command: [sleep, "1000"], volumeMounts: [{name: tools, mountPath: /tools}]}
volumes: [{name: tools, image: {reference: "nowhere:1", pullPolicy: Never}}]
`)))
	n.wait(ns, "pod/reader", "jsonpath={.status.phase}=Succeeded")
	if said := n.kubectl("-n", ns, "logs", "reader"); !strings.HasSuffix(said, "so it is\n") {
		t.Errorf("it said %q", said)
	}
	n.wait(ns, "pod/absent", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImageNeverPull")
}

// A block device of this machine is a device of the container: one that may
// only read it is kept by the kernel from writing.
func TestBlockVolume(t *testing.T) {
	n := shared(t)
	ns := n.namespace("block")
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	device := strings.TrimSpace(n.ok(n.Run(patience, "losetup", "--find", "--show", file)))
	t.Cleanup(func() { n.ok(n.Run(patience, "losetup", "--detach", device)) })
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolume
metadata: {name: block-disk}
spec:
  capacity: {storage: 1Mi}
  accessModes: [ReadWriteOnce]
  volumeMode: Block
  storageClassName: by-hand
  local: {path: %[2]s}
  nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/os, operator: Exists}]}]}}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: disk, namespace: %[1]s}
spec: {accessModes: [ReadWriteOnce], volumeMode: Block, storageClassName: by-hand, resources: {requests: {storage: 1Mi}}}
`, ns, device) + "\n---\n" + pod(ns, "writer", `
restartPolicy: Never
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "test -b /dev/xvda; echo raw bytes | dd of=/dev/xvda conv=fsync"]
  volumeDevices: [{name: disk, devicePath: /dev/xvda}]
volumes: [{name: disk, persistentVolumeClaim: {claimName: disk}}]
`) + "\n---\n" + pod(ns, "reader", `
restartPolicy: Never
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "head -c 512 /dev/xvda >/dev/null; ! dd if=/dev/zero of=/dev/xvda count=1"]
  volumeDevices: [{name: disk, devicePath: /dev/xvda}]
volumes: [{name: disk, persistentVolumeClaim: {claimName: disk, readOnly: true}}]
`)))
	t.Cleanup(func() { n.Kubectl("delete", "pv", "block-disk", "--wait=false", "--request-timeout=10s") })
	n.wait(ns, "pod/writer", "jsonpath={.status.phase}=Succeeded")
	n.wait(ns, "pod/reader", "jsonpath={.status.phase}=Succeeded")
	n.ok(n.Run(patience, "blockdev", "--flushbufs", device))
	if data, err := os.ReadFile(file); err != nil || !strings.HasPrefix(string(data), "raw bytes\n") {
		t.Errorf("the disk begins with %q, %v", data[:min(len(data), 16)], err)
	}
	n.kubectl("-n", ns, "delete", "pods", "--all", "--grace-period=0", "--force", fmt.Sprintf("--timeout=%v", patience))
}
