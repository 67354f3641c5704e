package e2e

import (
	"context"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// complains checks that a command failed as a good command does: with the
// exit status for it and one line that names the thing.
func complains(t *testing.T, r machine.Result, code int, about string) {
	t.Helper()
	if r.Code != code {
		t.Errorf("want exit %d: %v", code, r)
	}
	if text := strings.TrimSpace(r.Stderr); text == "" || strings.Contains(text, "\n") {
		t.Errorf("want one line on standard error: %v", r)
	}
	if !regexp.MustCompile("(?i)" + about).MatchString(r.Stderr) {
		t.Errorf("want something about %q: %v", about, r)
	}
}

// nothingRuns checks that a failed start left no process behind.
func nothingRuns(n node) {
	n.t.Helper()
	n.until("nothing running", func() (bool, string) {
		processes, err := n.Processes()
		if err != nil {
			n.t.Fatal(err)
		}
		var names []string
		for _, p := range processes {
			names = append(names, strings.Join(p.Args, " "))
		}
		return len(names) == 0, strings.Join(names, ", ")
	})
}

func TestMisuse(t *testing.T) {
	n := empty(t)
	for _, c := range []struct {
		name  string
		args  []string
		about string
	}{
		{"unknown command", []string{"upp"}, "upp"},
		{"unknown flag", []string{"up", "--no-such-flag"}, "no-such-flag"},
		{"flag without value", []string{"up", "--data-dir"}, "data-dir"},
		{"missing argument", []string{"down"}, "."},
		{"agent as a service", []string{"install", "agent"}, "installs servers only"},
		{"unknown output", []string{"status", "-o", "xml"}, "xml"},
	} {
		t.Run(c.name, func(t *testing.T) { complains(t, n.Tutti(c.args...), 2, c.about) })
	}
	t.Run("no such path", func(t *testing.T) { complains(t, n.Tutti("up", "/no/such/app"), 1, "/no/such/app") })
	nothingRuns(n)
}

func TestNotRoot(t *testing.T) {
	n := empty(t)
	complains(t, n.nobody("up"), 1, "tutti up needs root, to make containers and networks; run `sudo tutti up`")
	nothingRuns(n)
}

func (n node) nobody(args ...string) machine.Result {
	return n.Run(time.Minute, "setpriv", append([]string{"--reuid=65534", "--regid=65534", "--clear-groups", n.Binary()}, args...)...)
}

// A machine that runs is root's alone.
func TestNotRootElsewhere(t *testing.T) {
	n := shared(t)
	complains(t, n.nobody("status"), 1, "/tutti.sock is for root only; use sudo")
	complains(t, n.nobody("kubectl", "get", "pods"), 1, "/admin.kubeconfig is for root only; use sudo, or set KUBECONFIG to a file of yours")
}

func TestPortTaken(t *testing.T) {
	n := empty(t)
	l, err := n.Listen("tcp", "127.0.0.1:6443")
	if err != nil {
		t.Fatal(err)
	}
	complains(t, n.Tutti("up"), 1, "6443")
	nothingRuns(n)
	l.Close()
	if err := n.Up(); err != nil {
		t.Errorf("with the port free again: %v", err)
	}
}

func TestDiskFull(t *testing.T) {
	n := empty(t)
	n.ok(n.Run(time.Minute, "sh", "-c", `mkdir "$TUTTI_DATA_DIR" && mount -t tmpfs -o size=4m tmpfs "$TUTTI_DATA_DIR"`))
	complains(t, n.Tutti("up"), 1, "space|full")
	nothingRuns(n)
}

func TestTwoOnOneDataDirectory(t *testing.T) {
	n := empty(t)
	var ups [3]machine.Result
	var wg sync.WaitGroup
	for i := range ups { // one starts it, the others wait for that
		wg.Go(func() { ups[i] = n.Tutti("up") })
	}
	wg.Wait()
	for _, r := range ups {
		n.ok(r)
	}
	server, err := n.Server()
	if err != nil {
		t.Fatal(err)
	}
	complains(t, n.Tutti("server"), 1, regexp.QuoteMeta(n.Dir))
	if !server.Running() {
		t.Error("the second server ended the first")
	}
	n.ok(n.Tutti("up")) // up is content with what runs
	if again, err := n.Server(); err != nil || again.PID != server.PID {
		t.Errorf("up replaced the server: %v %v", again, err)
	}
	// What cannot change is refused and harms nothing; what can is not ignored.
	complains(t, n.Tutti("up", "--cluster-cidr", "10.99.0.0/16"), 1, "cluster-cidr cannot change")
	if !server.Running() {
		t.Error("a refused setting ended the server")
	}
	n.ok(n.Tutti("up", "--registry-port", "5001"))
	if again, err := n.Server(); err != nil || again.PID == server.PID {
		t.Errorf("the server goes on with the old settings: %v %v", again, err)
	}
	conn, err := n.Dial(t.Context(), "tcp", "127.0.0.1:5001")
	if err != nil {
		t.Fatalf("the registry is not at its new port: %v", err)
	}
	conn.Close()
}

func TestWrongManifest(t *testing.T) {
	n := shared(t)
	for _, c := range []struct{ name, yaml, about string }{
		{"wrong field", "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec:\n  replcas: 2\n  selector: {matchLabels: {a: b}}\n  template: {metadata: {labels: {a: b}}, spec: {containers: [{name: c, image: 'busybox:1'}]}}\n", "replcas"},
		{"wrong value", "apiVersion: v1\nkind: Pod\nmetadata: {name: x}\nspec:\n  containers: [{name: c, image: 'busybox:1', ports: [{containerPort: 99999999}]}]\n", "port"},
		{"unknown kind", "apiVersion: v1\nkind: Pood\nmetadata: {name: x}\n", "Pood x: this cluster does not know the kind; install its definition first"},
		{"no YAML", "a: [b\n", "app.yaml"},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := node{n.Machine, t}
			file := filepath.Join(t.TempDir(), "app.yaml")
			if err := os.WriteFile(file, []byte(c.yaml), 0o644); err != nil {
				t.Fatal(err)
			}
			complains(t, n.Tutti("up", file), 1, c.about)
			if left := n.Kubectl("get", "deployments,pods", "-n", "default", "-o", "name").Stdout; left != "" {
				t.Errorf("half-done: %s", left)
			}
		})
	}
}

func TestWrongImage(t *testing.T) {
	n := shared(t)
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := os.WriteFile(file, []byte("this is no archive"), 0o644); err != nil {
		t.Fatal(err)
	}
	complains(t, n.Tutti("image", "load", file), 1, regexp.QuoteMeta(file))
	complains(t, n.Tutti("image", "load", file+".gone"), 1, regexp.QuoteMeta(file+".gone"))
	complains(t, n.Tutti("image", "rm", "nobody/nothing:1"), 1, "nobody/nothing:1")
}

func TestCorruptData(t *testing.T) {
	n := running(t)
	n.ok(n.Tutti("stop"))
	nothingRuns(n)
	db := filepath.Join(n.Dir, "etcd/member/snap/db")
	good, err := os.ReadFile(db)
	if err != nil {
		t.Fatal(err)
	}
	bad := make([]byte, len(good))
	for i := range bad {
		bad[i] = byte(i * 7)
	}
	if err := os.WriteFile(db, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	complains(t, n.Tutti("up"), 1, regexp.QuoteMeta(filepath.Join(n.Dir, "etcd")))
	nothingRuns(n)
	if err := os.WriteFile(db, good, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Up(); err != nil {
		t.Errorf("with the data whole again: %v", err)
	}
}

// A pod must not take the ports by which its machine is reached: its owner
// could never remove it again.
func TestOwnPortIsNotForPods(t *testing.T) {
	n := shared(t)
	ns := n.namespace("own-port")
	n.ok(n.Apply(pod(ns, "thief", "containers: [{name: c, image: 'busybox:1', command: [sleep, 1h], ports: [{containerPort: 80, hostPort: 6443}]}]")))
	n.until("it is refused", func() (bool, string) {
		said := n.field(ns, "pod/thief", "{.status.containerStatuses[0].state.waiting.message}")
		return strings.Contains(said, "host port 6443/tcp is this machine's own; choose another"), said
	})
	// And whoever looks at the application is told.
	if text := n.ok(n.Tutti("status")); !strings.Contains(text, "thief: FailedCreatePodSandBox: ") {
		t.Errorf("status does not say why: %s", text)
	}
}

// Ctrl-C ends the waiting, neither the machine nor the application.
func TestInterruptedUp(t *testing.T) {
	n := empty(t)
	n.explainFailure()
	interrupted := func(when string, ready func() bool, about string, args ...string) {
		t.Helper()
		done := make(chan machine.Result, 1)
		go func() { done <- n.Tutti(args...) }()
		n.until(when, func() (bool, string) { return ready(), "" })
		all, err := n.Processes()
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range all {
			if len(p.Args) > 1 && slices.Equal(p.Args[1:], args) {
				if err := syscall.Kill(p.PID, syscall.SIGINT); err != nil {
					t.Fatal(err)
				}
			}
		}
		complains(t, <-done, 1, about)
	}
	interrupted("the server can be asked", func() bool {
		_, err := os.Stat(filepath.Join(n.Dir, "tutti.sock"))
		return err == nil
	}, "interrupted; the server goes on starting, `tutti stop` ends it", "up")
	n.ok(n.Tutti("up"))
	file := filepath.Join(t.TempDir(), "never.yaml")
	if err := os.WriteFile(file, []byte(pod("default", "never", "nodeSelector: {no: such}\ncontainers: [{name: c, image: 'busybox:1'}]")), 0o644); err != nil {
		t.Fatal(err)
	}
	interrupted("the pod is there", func() bool {
		return n.Kubectl("get", "pod", "never").Err == nil
	}, "interrupted at release 1 of never; `tutti up` finishes it, `tutti rollback never` undoes it", "up", file)
}

// An interrupted start can be repeated.
func TestInterruptedStart(t *testing.T) {
	n := empty(t)
	for _, after := range []time.Duration{50 * time.Millisecond, 300 * time.Millisecond, time.Second, 2 * time.Second} {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		machine.Finish(n.Command(ctx, n.Binary(), "server"), "")
		cancel()
		for _, find := range []func() (machine.Process, error){n.Server, n.Keeper} {
			if p, err := find(); err == nil {
				if err := p.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	n.explainFailure()
	if err := n.Up(); err != nil {
		t.Error(err)
	}
}
