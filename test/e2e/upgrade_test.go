package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// A newer tutti, with another keeper inside, takes the place of the one that
// runs, at the worst of moments: a terminal is in use, a log's pipe is full, a
// pod is about to run out of memory. The keeper stays the same process and
// executes the newer program; no pod notices.
func TestUpgradeTutti(t *testing.T) {
	n := running(t)
	const ns = "upgrade"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	signs := filepath.Join(filepath.Dir(n.Dir), "signs")
	if err := os.Mkdir(signs, 0o755); err != nil {
		t.Fatal(err)
	}
	const volumes = "volumeMounts: [{name: signs, mountPath: /signs}]\n"
	source := fmt.Sprintf("volumes:\n- {name: signs, hostPath: {path: %s}}\nterminationGracePeriodSeconds: 0\n", signs)
	bystander(n, ns)
	n.ok(n.Apply(pod(ns, "flood", one(`command: [sh, -c, "seq 1 100; while [ ! -e /signs/flood ]; do sleep 0.1; done; seq 101 60000; exec sleep 100000"]`+"\n"+volumes)+source)))
	n.ok(n.Apply(pod(ns, "hungry", one(`command: [sh, -c, "while [ ! -e /signs/eat ]; do sleep 0.1; done; exec tail /dev/zero"]`+"\nresources: {limits: {memory: 24Mi}}\n"+volumes)+source)))
	n.ok(n.Apply(pod(ns, "terminal", one(`command: [sh, -c, "while read line; do echo got $line; done"]`+"\ntty: true\nstdin: true\n")+"terminationGracePeriodSeconds: 0\n")))
	n.kubectl("-n", ns, "wait", "pod", "--all", "--for=condition=Ready", fmt.Sprintf("--timeout=%v", patience))
	says := func(word string) {
		t.Helper()
		n.until("the terminal says "+word, func() (bool, string) {
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			defer cancel()
			machine.Finish(n.Command(ctx, n.Binary(), "kubectl", "-n", ns, "attach", "-i", "terminal"), word+"\n")
			log := n.Kubectl("-n", ns, "logs", "terminal").Stdout
			return strings.Contains(log, "got "+word), log
		})
	}
	says("before")
	was := map[string]string{}
	for _, name := range []string{"bystander", "flood", "hungry", "terminal"} {
		was[name] = containerOf(n, ns, name)
	}
	keeper, err := n.Keeper()
	if err != nil {
		t.Fatal(err)
	}
	newer := newerTutti(n)

	// Nobody reads: the flood fills its pipe and waits.
	n.kill(n.Server)
	if err := syscall.Kill(keeper.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	sign := func(name string) {
		if err := os.WriteFile(filepath.Join(signs, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	sign("flood")
	n.until("a full pipe", func() (bool, string) {
		io := floodIO(n)
		return io >= 60000, fmt.Sprintf("%d bytes written", io)
	})
	up := make(chan machine.Result, 1)
	go func() { up <- n.Run(3*time.Minute, newer, "up") }()
	n.until("the newer server", func() (bool, string) {
		_, err := n.Server()
		return err == nil, fmt.Sprint(err)
	})
	if err := syscall.Kill(keeper.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	n.ok(<-up)

	now, err := n.Keeper()
	if err != nil {
		t.Fatal(err)
	}
	if now.PID != keeper.PID || now.Args[0] == keeper.Args[0] {
		t.Errorf("the keeper is process %d running %s, was %d running %s", now.PID, now.Args[0], keeper.PID, keeper.Args[0])
	}
	if programs, _ := filepath.Glob(filepath.Join(n.Dir, "bin", "*")); len(programs) != 1 {
		t.Errorf("keepers in the data directory: %v", programs)
	}
	for name, container := range was {
		if now := containerOf(n, ns, name); now != container {
			t.Errorf("%s was restarted: %s, was %s", name, now, container)
		}
	}
	unmoved(n, ns, was["bystander"])
	says("after")
	n.until("the whole flood", func() (bool, string) {
		last := n.Kubectl("-n", ns, "logs", "--tail=1", "flood").Stdout
		return last == "60000\n", last
	})
	lines := strings.Fields(n.kubectl("-n", ns, "logs", "flood"))
	for i, l := range lines {
		if l != fmt.Sprint(i+1) {
			t.Errorf("line %d of the flood's log is %s", i+1, l)
			break
		}
	}
	if len(lines) != 60000 {
		t.Errorf("the flood's log has %d lines", len(lines))
	}
	sign("eat")
	n.wait(ns, "pod/hungry", "jsonpath={.status.phase}=Failed")
	if reason := n.field(ns, "pod/hungry", "{.status.containerStatuses[0].state.terminated.reason}"); reason != "OOMKilled" {
		t.Errorf("beyond its memory it ended as %s", reason)
	}
}

// floodIO is how much the flood has written into its pipe.
func floodIO(n node) (bytes int) {
	n.t.Helper()
	processes, err := n.Processes()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, p := range processes {
		if !strings.Contains(strings.Join(p.Args, " "), "seq 101 60000") {
			continue
		}
		io, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.PID))
		if err != nil {
			n.t.Fatal(err)
		}
		for line := range strings.Lines(string(io)) {
			fmt.Sscanf(line, "wchar: %d", &bytes)
		}
	}
	return bytes
}

// newerTutti is bin/tutti with another build of the keeper inside.
func newerTutti(n node) string {
	n.t.Helper()
	program, err := os.ReadFile(n.Binary())
	if err != nil {
		n.t.Fatal(err)
	}
	keeper, err := os.ReadFile(filepath.Join(n.Repo, "internal", "keeper", "embedded", "tutti-keeper"))
	if err != nil {
		n.t.Fatal(err)
	}
	at := bytes.Index(program, keeper)
	if at < 0 {
		n.t.Fatal("bin/tutti has another keeper inside; run make build")
	}
	copy(program[at:], otherBuild(n.t, keeper, 7))
	path := filepath.Join(filepath.Dir(n.Dir), "newer", "tutti")
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil {
		n.t.Fatal(err)
	}
	writeProgram(n.t, path, program)
	return path
}
