package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/console"

	"tutti.dev/tutti/test/e2e/machine"
)

func runtimeClass(name string) string {
	return fmt.Sprintf("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: %s}\nhandler: %[1]s\n", name)
}

// An OCI runtime that is found on the machine makes the containers of pods
// whose RuntimeClass names it, and they are pods like all others.
func TestOtherRuntime(t *testing.T) {
	// Where the machine has none, docker's has come with it.
	fetched, err := filepath.Abs("../../dist/tools/debian/usr/sbin")
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", os.Getenv("PATH")+":"+fetched)
	if _, err := exec.LookPath("runc"); err != nil {
		t.Fatal("make tools: ", err)
	}
	n := running(t)
	const ns = "classes"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	if has := n.kubectl("get", "nodes", "-o", "jsonpath={.items[0].status.runtimeHandlers[*].name}"); !strings.Contains(has, "container") || !strings.Contains(has, "runc") {
		t.Errorf("the node tells of the runtimes %q", has)
	}
	n.ok(n.Apply(runtimeClass("runc") + "---\n" + runtimeClass("runsc")))
	const class = "runtimeClassName: runc\nterminationGracePeriodSeconds: 0\n"
	n.ok(n.Apply(pod(ns, "stays", one("command: [sleep, '100000']")+class)))
	n.wait(ns, "pod/stays", "condition=Ready")
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}

	n.ok(n.Apply(strings.Join([]string{
		pod(ns, "bystander", restarting(one(`command: [sh, -c, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"]
readinessProbe: {exec: {command: ['true']}, periodSeconds: 1}
livenessProbe: {exec: {command: [sh, -c, 'kill -0 1']}, periodSeconds: 1}`))+class),
		pod(ns, "hungry", one("command: [tail, /dev/zero]\nresources: {limits: {memory: 16Mi}}")+class),
		pod(ns, "together", one("command: [sh, -c, 'ps | grep -c init; echo last words >/dev/termination-log']")+class+"shareProcessNamespace: true\n"),
		pod(ns, "sandboxed", one("command: ['true']")+"runtimeClassName: runsc\n"),
		pod(ns, "own-users", one("command: ['true']")+class+"hostUsers: false\n"),
	}, "---\n")))
	n.wait(ns, "pod/bystander", "condition=Ready")
	uid := n.field(ns, "pod/bystander", "{.metadata.uid}")
	if states, _ := filepath.Glob(filepath.Join(n.Dir, "keeper", "workloads", uid+"_main_0", "bundle", "state", uid+"_main_0", "*")); len(states) == 0 {
		t.Error("runc does not know the container")
	}
	n.wait(ns, "pod/hungry", "jsonpath={.status.containerStatuses[0].state.terminated.reason}=OOMKilled")
	n.wait(ns, "pod/together", "jsonpath={.status.containerStatuses[0].state.terminated.message}=last words\n")
	if log := n.kubectl("-n", ns, "logs", "together"); log == "0\n" {
		t.Error("a pod's processes do not see each other")
	}
	for name, why := range map[string]string{
		"sandboxed": `this machine has no runtime "runsc"; use a RuntimeClass of one that it has (container, `,
		"own-users": "the pod's RuntimeClass has no user namespaces; use the class container, or leave hostUsers out",
	} {
		n.until(name+" is told why it does not start", func() (bool, string) {
			events := n.kubectl("-n", ns, "get", "events", "--field-selector=involvedObject.name="+name, "-o", "jsonpath={.items[*].message}")
			return strings.Contains(events, why), events
		})
	}

	container := containerOf(n, ns, "bystander")
	s := talk(t, n.Command(t.Context(), n.Binary(), "kubectl", "-n", ns, "exec", "-it", "bystander", "--", "sh"), console.WinSize{Height: 40, Width: 100})
	s.enter("stty size; tty")
	s.await(`40 100\s+/dev/pts/`)
	s.enter("exit 7")
	if code := s.end(); code != 7 {
		t.Errorf("exit status %d: %s", code, s.text())
	}

	// Whoever holds or watches it is killed.
	keeper, err := n.Keeper()
	if err != nil {
		t.Fatal(err)
	}
	server, err := n.Server()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []machine.Process{server, keeper} {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Up(); err != nil {
		t.Fatal(err)
	}
	n.until("exec through the new keeper", func() (bool, string) {
		r := n.Kubectl("-n", ns, "exec", "bystander", "--", "echo", "here")
		return r.Stdout == "here\n", r.String()
	})
	unmoved(n, ns, container)

	n.kubectl("-n", ns, "delete", "pod", "--selector=app!=stays", fmt.Sprintf("--timeout=%v", patience))
	n.leavesNothing(before)
	if left, err := os.ReadDir(filepath.Join(n.Dir, "keeper", "workloads")); err != nil || len(left) != 1 {
		t.Errorf("%d workloads are left, %v", len(left), err)
	}
}
