package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// Whatever ran, stop --purge leaves the machine as it was.
func TestPurgeLeavesNothing(t *testing.T) {
	n := empty(t)
	n.explainFailure()
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	n.up()
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	ns := "purge"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data, namespace: %[1]s}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
---
`, ns) + pod(ns, "web", restarting(one("command: [httpd, -f, -p, '8080', -h, /data]\nports: [{containerPort: 8080, hostPort: 18080}]\n"+
		"volumeMounts: [{name: data, mountPath: /data}, {name: tmp, mountPath: /m}]"))+
		"volumes: [{name: data, persistentVolumeClaim: {claimName: data}}, {name: tmp, emptyDir: {medium: Memory}}]\nterminationGracePeriodSeconds: 1\n") +
		"---\n" + pod(ns, "deaf", restarting(one(`command: [sh, -c, "trap '' TERM; while :; do sleep 0.1; done"]`))+"shareProcessNamespace: true\nterminationGracePeriodSeconds: 1\n") +
		"---\n" + pod(ns, "host", restarting(one("command: [sleep, '100000']\nsecurityContext: {privileged: true}"))+"hostNetwork: true\nhostPID: true\nterminationGracePeriodSeconds: 1\n")))
	for _, p := range []string{"web", "deaf", "host"} {
		n.wait(ns, "pod/"+p, "condition=Ready")
	}
	// What the comparison relies on can be seen at all.
	during, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"process", "mount", "link", "nft", "setting", "cgroup", "data directory"} {
		if !slices.ContainsFunc(machine.Left(before, during), func(l string) bool { return strings.HasPrefix(l, "+ "+kind) }) {
			t.Errorf("a running machine shows no %s of its own", kind)
		}
	}
	n.ok(n.Tutti("stop", "--purge"))
	untouched(n, before)
	n.ok(n.Tutti("stop", "--purge")) // nothing to do is no error
}

// It does so when the server is dead, too: also what is mounted for the users
// of a pod, outside the data directory.
func TestPurgeWithoutServer(t *testing.T) {
	n := empty(t)
	n.explainFailure()
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	n.up()
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	n.kubectl("wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.ok(n.Apply(pod("default", "own-users", restarting(one("command: [sleep, '100000']"))+"hostUsers: false\n")))
	n.wait("default", "pod/own-users", "condition=Ready")
	n.kill(n.Server)
	n.ok(n.Tutti("stop", "--purge"))
	untouched(n, before)
}

// untouched waits for the machine to be as it was: the kernel takes its time
// to remove some things.
func untouched(n node, before []string) {
	n.t.Helper()
	n.until("the machine is as it was", func() (bool, string) {
		after, err := n.State()
		if err != nil {
			n.t.Fatal(err)
		}
		left := machine.Left(before, after)
		return len(left) == 0, strings.Join(left, "\n")
	})
}

// Stop keeps the data and what is declared; up brings it back, and what must
// come first comes first again.
func TestStopKeepsTheData(t *testing.T) {
	n := running(t)
	ns := "kept"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.ok(n.Apply(pod(ns, "box", restarting(one("command: [sleep, '100000']\nvolumeMounts: [{name: data, mountPath: /data}]"))+`
terminationGracePeriodSeconds: 0
initContainers:
- name: first
  image: busybox:1
  command: [sh, -c, "echo here >>/data/file"]
  volumeMounts: [{name: data, mountPath: /data}]
volumes: [{name: data, emptyDir: {}}]
`)))
	for _, name := range []string{"a", "b", "c"} {
		n.ok(n.Apply(pod(ns, name, restarting(one("command: [sleep, '100000']"))+"terminationGracePeriodSeconds: 0\n")))
	}
	n.kubectl("-n", ns, "wait", "pods", "--all", "--for=condition=Ready", "--timeout=90s")
	addresses := func() string {
		return n.kubectl("-n", ns, "get", "pods", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.podIP}{"\n"}{end}`)
	}
	uid, had := n.field(ns, "pod/box", "{.metadata.uid}"), addresses()
	n.ok(n.Tutti("stop"))
	nothingRuns(n)
	n.up()
	n.kubectl("-n", ns, "wait", "pods", "--all", "--for=jsonpath={.status.containerStatuses[0].restartCount}=1", "--timeout=90s")
	n.kubectl("-n", ns, "wait", "pods", "--all", "--for=condition=Ready", "--timeout=90s")
	if has := addresses(); has != had {
		t.Errorf("pods came back with the addresses\n%s and had\n%s", has, had)
	}
	if again := n.field(ns, "pod/box", "{.metadata.uid}"); again != uid {
		t.Errorf("the pod is another one: %s, was %s", again, uid)
	}
	if out := n.kubectl("-n", ns, "exec", "box", "--", "cat", "/data/file"); out != "here\nhere\n" {
		t.Errorf("after a restart the volume has %q", out)
	}
}
