package e2e

import (
	"fmt"
	"strings"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// bystander makes a pod that has nothing to do with the trouble around it and
// counts, in its log and once every tenth of a second.
func bystander(n node, ns string) {
	n.t.Helper()
	n.ok(n.Apply(pod(ns, "bystander", restarting(one(`command: [sh, -c, "i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done"]`))+
		"terminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/bystander", "condition=Ready")
}

// unmoved checks that the bystander runs in its first container and has not
// lost a line of its log.
func unmoved(n node, ns, container string) {
	n.t.Helper()
	if got := containerOf(n, ns, "bystander"); got != container {
		n.t.Errorf("the bystander was restarted: %s, was %s", got, container)
	}
	lines := strings.Fields(n.kubectl("-n", ns, "logs", "bystander"))
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			n.t.Errorf("line %d of the bystander's log is %s", i+1, l)
			break
		}
	}
	// It goes on counting.
	n.until("another line in the log", func() (bool, string) {
		now := strings.Fields(n.kubectl("-n", ns, "logs", "--tail=1", "bystander"))
		return len(now) == 1 && len(lines) > 0 && now[0] != lines[len(lines)-1], fmt.Sprint(now)
	})
}

func containerOf(n node, ns, pod string) string {
	n.t.Helper()
	return n.field(ns, "pod/"+pod, "{.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}")
}

// The keeper is killed: what it holds keeps running, is found again by the
// next keeper, and is not started twice.
func TestKillKeeper(t *testing.T) {
	n := running(t)
	const ns = "keeper"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	bystander(n, ns)
	container := containerOf(n, ns, "bystander")
	process := func() machine.Process {
		processes, err := n.Processes()
		if err != nil {
			t.Fatal(err)
		}
		var found []machine.Process
		for _, p := range processes {
			if len(p.Args) == 3 && strings.Contains(p.Args[2], "echo $i") {
				found = append(found, p)
			}
		}
		if len(found) != 1 {
			t.Fatalf("the bystander is %d processes", len(found))
		}
		return found[0]
	}
	before := process()
	n.kill(n.Keeper)
	n.until("another keeper", func() (bool, string) {
		_, err := n.Keeper()
		return err == nil, fmt.Sprint(err)
	})
	if after := process(); after.PID != before.PID {
		t.Errorf("the bystander is process %d, was %d", after.PID, before.PID)
	}
	n.until("exec through the new keeper", func() (bool, string) {
		r := n.Kubectl("-n", ns, "exec", "bystander", "--", "echo", "here")
		return r.Stdout == "here\n", r.String()
	})
	unmoved(n, ns, container)

	// An exit that nobody can have seen: both that hold the process are gone.
	n.kill(n.Server)
	n.kill(n.Keeper)
	if err := before.Kill(); err != nil {
		t.Fatal(err)
	}
	n.up()
	n.until("a restart after an exit that nobody saw", func() (bool, string) {
		now := containerOf(n, ns, "bystander")
		return strings.HasSuffix(now, " 1"), now
	})
	if reason := n.field(ns, "pod/bystander", "{.status.containerStatuses[0].lastState.terminated.reason}"); !strings.Contains(reason, "Unknown") {
		t.Errorf("an exit that nobody saw is reported as %q", reason)
	}
	process() // exactly one
}
