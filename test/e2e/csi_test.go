package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// csiDriver is a driver as charts install them: with the paths of a kubelet.
const csiDriver = `
apiVersion: storage.k8s.io/v1
kind: CSIDriver
metadata: {name: test.csi.tutti.dev}
spec: {attachRequired: true, podInfoOnMount: true, requiresRepublish: true, fsGroupPolicy: File, volumeLifecycleModes: [Persistent, Ephemeral]}
---
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: csi}
provisioner: test.csi.tutti.dev
allowVolumeExpansion: true
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: driver, namespace: csi}
spec:
  selector: {matchLabels: {app: driver}}
  template:
    metadata: {labels: {app: driver}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: driver
        image: csi:1
        command: [/bin/csidriver, /volumes, /csi/csi.sock, /registration/test.csi.tutti.dev-reg.sock, /var/lib/kubelet/plugins/test.csi.tutti.dev/csi.sock]
        env: [{name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]
        securityContext: {privileged: true}
        volumeMounts:
        - {name: socket, mountPath: /csi}
        - {name: registration, mountPath: /registration}
        - {name: pods, mountPath: /var/lib/kubelet/pods, mountPropagation: Bidirectional}
        - {name: plugins, mountPath: /var/lib/kubelet/plugins, mountPropagation: Bidirectional}
        - {name: volumes, mountPath: /volumes}
        - {name: dev, mountPath: /dev}
      volumes:
      - {name: socket, hostPath: {path: /var/lib/kubelet/plugins/test.csi.tutti.dev, type: DirectoryOrCreate}}
      - {name: registration, hostPath: {path: /var/lib/kubelet/plugins_registry, type: Directory}}
      - {name: pods, hostPath: {path: /var/lib/kubelet/pods, type: Directory}}
      - {name: plugins, hostPath: {path: /var/lib/kubelet/plugins, type: Directory}}
      - {name: volumes, hostPath: {path: %s, type: DirectoryOrCreate}}
      - {name: dev, hostPath: {path: /dev}}
`

// csiVolume is a volume of the driver and the claim to it.
const csiVolume = `
apiVersion: v1
kind: PersistentVolume
metadata: {name: %[1]s-pv}
spec:
  capacity: {storage: 1Mi}
  accessModes: [ReadWriteOnce]
  volumeMode: %[2]s
  storageClassName: csi
  persistentVolumeReclaimPolicy: Retain
  csi: {driver: test.csi.tutti.dev, volumeHandle: %[1]s}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: %[1]s, namespace: csi}
spec: {accessModes: [ReadWriteOnce], volumeMode: %[2]s, storageClassName: csi, volumeName: %[1]s-pv, resources: {requests: {storage: 1Mi}}}
---
`

// nfs gives a machine a program in the place of NFS's own: its servers are
// the machine itself.
const nfs = `
mkdir -p $0.bin $0.work $0
printf '%s\n' '#!/bin/sh' 'exec mount --bind "/${1#*:/}" "$2"' >$0.bin/mount.nfs
chmod +x $0.bin/mount.nfs
mount -t overlay nfs -o lowerdir=/usr/sbin,upperdir=$0.bin,workdir=$0.work /usr/sbin
`

// attachments are the volumes attached or to be attached, by name.
func (n node) attachments() []string {
	n.t.Helper()
	return strings.Fields(n.kubectl("get", "volumeattachments", "-o", "jsonpath={range .items[*]}{.metadata.name}={.spec.source.persistentVolumeName}={.status.attached} {end}"))
}

// A CSI driver that was made for kubelets registers itself and provides
// volumes of all kinds. They outlive the server, grow, and leave nothing
// behind, as do those of file servers. The test attaches and grows them in the place of upstream's sidecars,
// which say no more to the API than it does.
func TestCSI(t *testing.T) {
	n := empty(t)
	n.explainFailure()
	// The name that drivers know is one for the whole of a machine.
	n.ok(n.Run(patience, "mount", "-t", "tmpfs", "lib", "/var/lib"))
	volumes := filepath.Join(filepath.Dir(n.Dir), "volumes")
	n.ok(n.Run(patience, "sh", "-ec", nfs, volumes))
	n.up()
	program := filepath.Join(n.Repo, "dist", "tools", "csidriver")
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("run make tools: %v", err)
	}
	if err := importImage(n.Machine, "csi:1", "csidriver="+program); err != nil {
		t.Fatal(err)
	}
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	ns := n.namespace("csi")
	n.ok(n.Apply(fmt.Sprintf(csiDriver, volumes)))
	n.kubectl("-n", ns, "rollout", "status", "daemonset/driver", fmt.Sprintf("--timeout=%v", patience))
	name := n.field("", "nodes", "{.items[0].metadata.name}")
	n.until("the driver registered", func() (bool, string) {
		limit := n.Kubectl("get", "csinode", name, "-o", `jsonpath={.spec.drivers[?(@.name=="test.csi.tutti.dev")].allocatable.count}`).Stdout
		return limit == "2", limit
	})

	n.ok(n.Run(patience, "sh", "-ec", "mkdir $0/files; echo hello >$0/files/greeting; truncate -s 1M $0/disk", volumes))
	n.ok(n.Apply(fmt.Sprintf(csiVolume, "files", "Filesystem") + fmt.Sprintf(csiVolume, "disk", "Block") + pod(ns, "user", `
terminationGracePeriodSeconds: 0
securityContext: {runAsUser: 1000, runAsGroup: 1000, fsGroup: 2000}
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "echo kept >/files/mine; touch /tmp/done; sleep 1000000"]
  readinessProbe: {exec: {command: [test, -e, /tmp/done]}, periodSeconds: 1}
  volumeMounts: [{name: files, mountPath: /files}, {name: inline, mountPath: /inline}, {name: files, mountPath: /part, subPath: a/b}]
volumes:
- {name: files, persistentVolumeClaim: {claimName: files}}
- {name: inline, csi: {driver: test.csi.tutti.dev, volumeAttributes: {says: hello}}}
`) + "\n---\n" + pod(ns, "raw", `
restartPolicy: Never
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "test -b /dev/xvda; echo raw bytes | dd of=/dev/xvda conv=fsync; head -c 9 /dev/xvda"]
  volumeDevices: [{name: disk, devicePath: /dev/xvda}]
volumes: [{name: disk, persistentVolumeClaim: {claimName: disk}}]
`) + "\n---\n" + pod(ns, "nfs", fmt.Sprintf(`
restartPolicy: Never
containers:
- name: main
  image: busybox:1
  command: [sh, -ec, "cat /share/greeting; ! touch /share/mine"]
  volumeMounts: [{name: share, mountPath: /share}]
volumes: [{name: share, nfs: {server: nas.example, path: %s/files, readOnly: true}}]
`, volumes))))
	n.until("two volumes to be attached", func() (bool, string) {
		all := n.attachments()
		return len(all) == 2, fmt.Sprint(all)
	})
	if phase := n.field(ns, "pod/user", "{.status.phase}"); phase != "Pending" {
		t.Errorf("before its volume is attached the pod is %s", phase)
	}
	for _, a := range n.attachments() {
		a, _, _ := strings.Cut(a, "=")
		n.kubectl("patch", "volumeattachment", a, "--subresource=status", "--type=merge", "-p", `{"status":{"attached":true,"attachmentMetadata":{"attached":"`+name+`"}}}`)
	}
	n.wait(ns, "pod/user", "condition=Ready")
	n.wait(ns, "pod/raw", "jsonpath={.status.phase}=Succeeded")
	n.wait(ns, "pod/nfs", "jsonpath={.status.phase}=Succeeded")
	if got := n.kubectl("-n", ns, "logs", "nfs"); !strings.HasPrefix(got, "hello\n") {
		t.Errorf("the file server has %q", got)
	}
	inside := func(script string) string {
		t.Helper()
		return n.kubectl("-n", ns, "exec", "user", "--", "sh", "-ec", script)
	}
	if got := inside("cat /files/mine /inline/who; stat -c %g /files /files/mine /inline/who; touch /part/x; ls /files/a/b"); got != "kept\nuser hello\n2000\n2000\n2000\nx\n" {
		t.Errorf("the volumes have %q", got)
	}
	n.until("only what is used attached", func() (bool, string) {
		all := n.attachments()
		return len(all) == 1 && strings.HasSuffix(all[0], "=files-pv=true"), fmt.Sprint(all)
	})

	n.until("the driver asked what of the volume is used", func() (bool, string) {
		told := n.kubectl("get", "--raw", "/api/v1/nodes/"+name+"/proxy/metrics")
		return strings.Contains(told, `kubelet_volume_stats_used_bytes{namespace="csi",persistentvolumeclaim="files"} 1024`), told
	})

	n.kubectl("-n", ns, "patch", "pvc", "files", "-p", `{"spec":{"resources":{"requests":{"storage":"2Mi"}}}}`)
	n.kubectl("patch", "pv", "files-pv", "-p", `{"spec":{"capacity":{"storage":"2Mi"}}}`)
	n.kubectl("-n", ns, "patch", "pvc", "files", "--subresource=status", "-p",
		`{"status":{"allocatedResources":{"storage":"2Mi"},"allocatedResourceStatuses":{"storage":"NodeResizePending"}}}`)
	n.until("the volume grown while it is used", func() (bool, string) {
		got := n.Kubectl("-n", ns, "get", "pvc/files", "-o", "jsonpath={.status.capacity.storage}").Stdout
		return got == "2Mi", got
	})
	if got := inside("cat /files/grown"); got != "2097152\n" {
		t.Errorf("the driver was asked to grow it to %q", got)
	}

	n.until("the driver asked to publish a volume again", func() (bool, string) {
		calls := n.Kubectl("-n", ns, "logs", "daemonset/driver", "-c", "driver").Stdout
		return strings.Count(calls, "NodePublishVolume csi-") > 1, calls
	})

	// Who made the volumes dies; another unmakes them.
	n.kill(n.Server)
	n.up()
	if got := inside("cat /files/mine /inline/who"); got != "kept\nuser hello\n" {
		t.Errorf("after a restart the volumes have %q", got)
	}
	n.kubectl("-n", ns, "delete", "pods", "user", "raw", "nfs", fmt.Sprintf("--timeout=%v", patience))
	n.until("nothing attached", func() (bool, string) {
		all := n.attachments()
		return len(all) == 0, fmt.Sprint(all)
	})
	// Those that lived with the pod have gone with it, the others not.
	if got := n.ok(n.Run(patience, "ls", volumes)); got != "disk\nfiles\n" {
		t.Errorf("the driver keeps %q", got)
	}
	left := n.ok(n.Run(patience, "find", n.Dir+"/kubelet/pods", n.Dir+"/kubelet/plugins/kubernetes.io", "-mindepth", "1", "!", "-type", "d"))
	if mounts := n.ok(n.Run(patience, "cat", "/proc/mounts")); left != "" || strings.Contains(mounts, n.Dir+"/kubelet/p") {
		t.Errorf("left behind: %s%s", left, mounts)
	}

	if err := n.Purge(); err != nil {
		t.Fatal(err)
	}
	if left := n.ok(n.Run(patience, "ls", "-A", "/var/lib")); left != "" {
		t.Errorf("purged, /var/lib has %s", left)
	}
}
