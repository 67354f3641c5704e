package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Pods that write more than they said they would are evicted, and tell why.
func TestLimitsOfDisk(t *testing.T) {
	n := shared(t)
	ns := n.namespace("disk-limits")
	const write = `command: [sh, -c, "dd if=/dev/zero of=$FILE bs=1M count=16; sleep 100000"]` + "\n"
	const toDir = write + "env: [{name: FILE, value: /dir/f}]\nvolumeMounts: [{name: dir, mountPath: /dir}]\n"
	cases := map[string]struct{ spec, message string }{
		"emptydir": {
			one(toDir) +
				"volumes: [{name: dir, emptyDir: {sizeLimit: 8Mi}}]\n",
			`Usage of EmptyDir volume "dir" exceeds the limit "8Mi".`,
		},
		"layer": {
			one(write + "env: [{name: FILE, value: /f}]\nresources: {limits: {ephemeral-storage: 8Mi}}\n"),
			`Pod ephemeral local storage usage exceeds the total limit of containers 8Mi.`,
		},
		"within": {
			one(toDir+"resources: {limits: {ephemeral-storage: 64Mi}}\n") +
				"volumes: [{name: dir, emptyDir: {sizeLimit: 64Mi}}]\n",
			"",
		},
	}
	var all []string
	for name, c := range cases {
		all = append(all, pod(ns, name, c.spec+"terminationGracePeriodSeconds: 0\n"))
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))
	for name, c := range cases {
		if c.message == "" {
			continue
		}
		n.wait(ns, "pod/"+name, "jsonpath={.status.reason}=Evicted")
		if got := n.field(ns, "pod/"+name, "{.status.phase} {.status.message}"); strings.TrimSpace(got) != "Failed "+c.message {
			t.Errorf("%s: %q, want %q", name, got, c.message)
		}
	}
	// The others have been looked at too, in the same rounds.
	if got := n.field(ns, "pod/within", "{.status.phase}"); got != "Running" {
		t.Errorf("a pod within its limits is %s", got)
	}
}

// onDisk makes a machine whose data directory is a disk of its own.
func onDisk(t *testing.T, size int64) node {
	t.Helper()
	n := empty(t)
	n.explainFailure()
	image := filepath.Join(filepath.Dir(n.Dir), "disk")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	n.ok(n.Run(time.Minute, "mkfs.ext4", "-q", "-m", "0", image))
	n.ok(n.Run(time.Minute, "mkdir", "-m", "700", n.Dir))
	n.ok(n.Run(time.Minute, "mount", "-o", "loop", image, n.Dir))
	n.ok(n.Run(time.Minute, "rmdir", n.Dir+"/lost+found"))
	return n
}

// A pod fills the disk; it goes, what does not write stays, nobody new comes
// while it lasts, and then all is as before.
func TestDiskPressure(t *testing.T) {
	n := onDisk(t, 2<<30)
	n.up()
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	ns := n.namespace("full")
	watched(n, ns)
	container := containerOf(n, ns, "watched")
	n.ok(n.Apply(pod(ns, "filler", one(`command: [sh, -c, "i=0; while dd if=/dev/zero of=/f$i bs=1M count=16 2>/dev/null; do i=$((i+1)); sleep 0.1; done; sleep 100000"]`))))
	n.wait(ns, "pod/filler", "jsonpath={.status.reason}=Evicted")
	if got := n.field(ns, "pod/filler", `{.status.phase} {.status.conditions[?(@.type=="DisruptionTarget")].reason} {.status.message}`); !strings.HasPrefix(got,
		"Failed TerminationByKubelet The node was low on resource: ephemeral-storage. Threshold quantity: ") || !strings.Contains(got, "Container main was using ") {
		t.Errorf("the filler: %s", got)
	}
	self := "node/" + n.field("", "node", "{.items[0].metadata.name}")
	n.wait("", self, "condition=DiskPressure")
	n.until("a taint", func() (bool, string) {
		taints := n.field("", self, "{.spec.taints[*].key}")
		return strings.Contains(taints, "node.kubernetes.io/disk-pressure"), taints
	})
	// Past the scheduler, which knows of the taint.
	name := strings.TrimPrefix(self, "node/")
	n.ok(n.Apply(pod(ns, "refused", one("command: [sleep, '100000']")+"nodeName: "+name+"\n")))
	n.wait(ns, "pod/refused", "jsonpath={.status.phase}=Failed")
	if got := n.field(ns, "pod/refused", "{.status.reason}: {.status.message}"); strings.TrimSpace(got) != "Evicted: Pod was rejected: The node had condition: [DiskPressure]." {
		t.Errorf("a pod past the scheduler: %q", got)
	}
	n.undisturbed(ns, container)
	if testing.Short() {
		return // it lasts a minute
	}
	n.ok(n.Apply(pod(ns, "later", one("command: [sleep, '100000']"))))
	n.wait(ns, "pod/later", "condition=Ready")
	n.wait("", self, "condition=DiskPressure=false")
	n.undisturbed(ns, container)
}
