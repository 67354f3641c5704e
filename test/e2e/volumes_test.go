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
	node := n.field("", "nodes", "{.items[0].metadata.name}")
	if told := n.kubectl("get", "--raw", "/api/v1/nodes/"+node+"/proxy/metrics"); !strings.Contains(told, `kubelet_volume_stats_capacity_bytes{namespace="stateful",persistentvolumeclaim="data-log-1"} `) {
		t.Errorf("the node does not tell of its volumes:\n%s", told)
	}
	n.kubectl("-n", ns, "patch", "pvc", "data-log-1", "-p", `{"spec":{"resources":{"requests":{"storage":"3Mi"}}}}`)
	n.wait(ns, "pvc/data-log-1", "jsonpath={.status.capacity.storage}=3Mi")
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

// What the machine mounts later reaches the containers that ask for it, what
// a container mounts the machine; a mount that is read-only to the bottom
// has nothing below it that can be written to.
func TestMountsWithinMounts(t *testing.T) {
	n := shared(t)
	ns := n.namespace("mounts")
	dir := filepath.Join(filepath.Dir(n.Dir), "mounts")
	n.ok(n.Run(patience, "sh", "-ec", "mkdir -p $0/before $0/later $0/made; mount -t tmpfs before $0/before", dir))
	t.Cleanup(func() {
		n.kubectl("-n", ns, "delete", "pods", "--all", "--force", "--grace-period=0", fmt.Sprintf("--timeout=%v", patience))
		n.ok(n.Run(patience, "sh", "-c", "umount $0/before $0/later $0/made 2>/dev/null; rm -r $0", dir))
	})
	var manifest []string
	for name, how := range map[string]string{
		"none": "", "slave": ", mountPropagation: HostToContainer", "both": ", mountPropagation: Bidirectional",
		"top": ", readOnly: true", "bottom": ", readOnly: true, recursiveReadOnly: Enabled",
	} {
		manifest = append(manifest, pod(ns, name, fmt.Sprintf(`
terminationGracePeriodSeconds: 0
containers:
- name: main
  image: busybox:1
  command: [sleep, "100000"]
  securityContext: {privileged: %v}
  volumeMounts: [{name: dir, mountPath: /dir%s}]
volumes: [{name: dir, hostPath: {path: %s}}]
`, name == "both", how, dir)))
	}
	n.ok(n.Apply(strings.Join(manifest, "\n---\n")))
	for _, name := range []string{"none", "slave", "both", "top", "bottom"} {
		n.wait(ns, "pod/"+name, "condition=Ready")
	}
	n.kubectl("-n", ns, "exec", "both", "--", "sh", "-ec", "mount -t tmpfs made /dir/made; touch /dir/made/file")
	n.ok(n.Run(patience, "sh", "-ec", "mount -t tmpfs later $0/later; touch $0/later/file; test -e $0/made/file", dir))
	for name, want := range map[string]string{"none": "", "slave": "later made ", "both": "later made ", "top": "", "bottom": ""} {
		if got := n.kubectl("-n", ns, "exec", name, "--", "sh", "-c", "for d in later made; do [ -e /dir/$d/file ] && echo -n \"$d \"; done; true"); got != want {
			t.Errorf("%s sees the mounts %q, want %q", name, got, want)
		}
	}
	for name, want := range map[string]string{"none": "top before ", "top": "before ", "bottom": ""} {
		if got := n.kubectl("-n", ns, "exec", name, "--", "sh", "-c",
			"touch /dir/f 2>/dev/null && echo -n 'top '; touch /dir/before/f 2>/dev/null && echo -n 'before '; true"); got != want {
			t.Errorf("%s can write to %q, want %q", name, got, want)
		}
	}
}

// The pod's group gets all files of a volume, or, if the pod prefers that,
// only those of one whose top it does not own yet.
func TestFSGroupChangePolicy(t *testing.T) {
	n := shared(t)
	ns := n.namespace("fsgroup")
	user := func(name, policy string) string {
		return pod(ns, name, fmt.Sprintf(`
restartPolicy: Never
securityContext: {fsGroup: 2000, fsGroupChangePolicy: %s}
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "touch /data/file; stat -c %%g /data/file; chgrp 0 /data/file"]
  volumeMounts: [{name: data, mountPath: /data}]
volumes: [{name: data, persistentVolumeClaim: {claimName: data}}]
`, policy))
	}
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: %s}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
`, ns)))
	for _, c := range []struct{ name, policy, want string }{
		{"first", "OnRootMismatch", "2000\n"}, // its own, made in a directory of the group
		{"second", "OnRootMismatch", "0\n"},   // what the first left
		{"third", "Always", "2000\n"},
	} {
		n.ok(n.Apply(user(c.name, c.policy)))
		n.wait(ns, "pod/"+c.name, "jsonpath={.status.phase}=Succeeded")
		if got := n.kubectl("-n", ns, "logs", c.name); got != c.want {
			t.Errorf("%s (%s): the file is of group %q, want %q", c.name, c.policy, got, c.want)
		}
	}
}
