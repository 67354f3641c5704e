package e2e

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

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

// tutti is killed again and again at random moments while a Deployment rolls
// and a client writes. Nothing restarts because of it, nothing acknowledged is
// lost, everything converges.
func TestKillTutti(t *testing.T) {
	times := 20
	if testing.Short() {
		times = 3
	}
	n := running(t)
	const ns = "chaos"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	bystander(n, ns)
	container := containerOf(n, ns, "bystander")
	n.ok(n.Apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: roll, namespace: chaos}
spec:
  replicas: 3
  selector: {matchLabels: {app: roll}}
  template:
    metadata: {labels: {app: roll}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: main, image: "busybox:1", command: [sleep, "100000"], env: [{name: ROUND, value: "0"}]}
`))
	n.wait(ns, "deployment/roll", "condition=Available")

	// The client writes down what was acknowledged.
	var mu sync.Mutex
	var acknowledged []string
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			name := fmt.Sprintf("written-%d", i)
			if r := n.Kubectl("-n", ns, "create", "configmap", name, "--request-timeout=5s"); r.Err == nil {
				mu.Lock()
				acknowledged = append(acknowledged, name)
				mu.Unlock()
			}
		}
	}()
	defer func() {
		select {
		case <-stopped:
		default:
			close(stop)
			<-stopped
		}
	}()

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	dice := rand.New(rand.NewPCG(seed, 0))
	for round := 1; round <= times; round++ {
		n.kubectl("-n", ns, "set", "env", "deployment/roll", fmt.Sprintf("ROUND=%d", round))
		server, err := n.Server()
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(dice.Int64N(int64(1500 * time.Millisecond))))
		if err := server.Kill(); err != nil {
			t.Fatal(err)
		}
		if err := n.Up(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	close(stop)
	<-stopped
	n.kubectl("-n", ns, "rollout", "status", "deployment/roll", fmt.Sprintf("--timeout=%v", patience))
	n.until("three pods of the last round and no others", func() (bool, string) {
		rounds := n.Kubectl("-n", ns, "get", "pods", "-l", "app=roll", "-o",
			`jsonpath={range .items[*]}{.spec.containers[0].env[0].value}/{.status.containerStatuses[0].restartCount} {end}`).Stdout
		want := strings.Repeat(fmt.Sprintf("%d/0 ", times), 3)
		return rounds == want, rounds
	})
	kept := strings.Fields(n.kubectl("-n", ns, "get", "configmaps", "-o", "jsonpath={.items[*].metadata.name}"))
	for _, name := range acknowledged {
		if !slices.Contains(kept, name) {
			t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	t.Logf("%d writes acknowledged", len(acknowledged))
	unmoved(n, ns, container)
	oneEach(n, ns)
}

// oneEach checks that no workload runs twice: as many sleeping processes as
// pods that sleep.
func oneEach(n node, ns string) {
	n.t.Helper()
	n.until("one process for each pod", func() (bool, string) {
		processes, err := n.Processes()
		if err != nil {
			n.t.Fatal(err)
		}
		sleeping := 0
		for _, p := range processes {
			if slices.Equal(p.Args, []string{"sleep", "100000"}) {
				sleeping++
			}
		}
		pods := len(strings.Fields(n.kubectl("-n", ns, "get", "pods", "-l", "app=roll", "-o", "name")))
		return sleeping == pods, fmt.Sprintf("%d processes, %d pods", sleeping, pods)
	})
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
	kill := func() {
		keeper, err := n.Keeper()
		if err != nil {
			t.Fatal(err)
		}
		if err := keeper.Kill(); err != nil {
			t.Fatal(err)
		}
	}
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
	kill()
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
	server, err := n.Server()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	kill()
	if err := before.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := n.Up(); err != nil {
		t.Fatal(err)
	}
	n.until("a restart after an exit that nobody saw", func() (bool, string) {
		now := containerOf(n, ns, "bystander")
		return strings.HasSuffix(now, " 1"), now
	})
	if reason := n.field(ns, "pod/bystander", "{.status.containerStatuses[0].lastState.terminated.reason}"); !strings.Contains(reason, "Unknown") {
		t.Errorf("an exit that nobody saw is reported as %q", reason)
	}
	process() // exactly one
}
