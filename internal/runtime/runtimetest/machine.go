package runtimetest

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/host/namespace"
	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/runtime"
)

// Binary is the keeper under test, the one that TUTTI_KEEPER names or built
// from this tree; Layer a root file system. Main sets them.
var Binary, Layer string

// Main runs a package's tests with what they need.
func Main(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tutti-runtime-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	if err := Prepare(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

// Prepare makes what Binary and Layer name in a directory.
func Prepare(dir string) error {
	Binary, Layer = os.Getenv("TUTTI_KEEPER"), filepath.Join(dir, "layer")
	if Binary == "" {
		Binary = filepath.Join(dir, "tutti-keeper")
		if err := buildKeeper(); err != nil {
			return err
		}
	}
	return makeLayer()
}

func buildKeeper() error {
	build := exec.Command("go", "build", "-tags", "seccomp netgo osusergo", "-ldflags", "-s -w -extldflags -static",
		"-o", Binary, "tutti.dev/tutti/cmd/tutti-keeper")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build keeper: %w: %s", err, out)
	}
	return nil
}

func makeLayer() error {
	for _, d := range []string{"bin", "etc", "tmp", "home/app"} {
		if err := os.MkdirAll(filepath.Join(Layer, d), 0o755); err != nil {
			return err
		}
	}
	busybox, err := os.ReadFile("/bin/busybox")
	if err != nil {
		return err
	}
	for name, data := range map[string]string{
		"bin/busybox": string(busybox),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000::/home/app:/bin/sh\n",
		"etc/group":   "root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
	} {
		mode := os.FileMode(0o644)
		if name == "bin/busybox" {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(Layer, name), []byte(data), mode); err != nil {
			return err
		}
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(Layer, "bin", a)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Kind says how the machines of a class of runtime are made.
type Kind struct {
	// New makes the runtime of a machine, as each new agent does.
	New func(m *Machine) (runtime.Runtime, error)
	// Purge is what Runtimes are purged by.
	Purge func(ctx context.Context, dir, cgroupRoot string) error
	// Pod is what the pods of the suite are like.
	Pod runtime.Pod
	// Workload, if not nil, makes the suite's workloads those of the kind.
	Workload func(w *runtime.Workload)
	Differences
}

// Machine is a data directory with a keeper of its own.
type Machine struct {
	Dir, CgroupRoot string
	Keeper          *keeper.Client
	Runtime         runtime.Runtime

	t    testing.TB
	kind Kind
}

// NewMachine returns a machine that is purged when the test ends, which must
// leave nothing.
func NewMachine(t testing.TB, kind Kind) *Machine {
	t.Helper()
	// Longer than a socket's path may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 25))
	m := &Machine{t: t, kind: kind, Dir: dir, CgroupRoot: "tutti-test-" + strings.ToLower(rand.Text()[:8])}
	m.Connect()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "keeper", "keeper.log"))
			t.Logf("the end of the keeper's log:\n%s", log[max(0, len(log)-4000):])
		} else if left, err := mount.Below(filepath.Join(dir, "pods")); err != nil || len(left) > 0 {
			t.Errorf("mounts are left after closing: %q %v", left, err)
		}
		for range 2 {
			if err := kind.Purge(ctx, dir, m.CgroupRoot); err != nil {
				t.Error(err)
			}
		}
		m.Keeper.Close()
		if left, err := mount.Below(dir); err != nil || len(left) > 0 {
			t.Errorf("mounts are left: %q %v", left, err)
		}
		if cgroup.Exists(m.CgroupRoot) {
			t.Errorf("control group %s is left", m.CgroupRoot)
		}
		// Processes of this machine, the keeper among them, name it.
		if left := Running(t, dir); len(left) > 0 {
			t.Errorf("processes are left: %q", left)
		}
	})
	return m
}

// Place puts a keeper where the others of the machine are.
func (m *Machine) Place(pid int) error { return cgroup.Join(m.CgroupRoot+"/keeper", pid) }

// KeeperDir is the keeper's.
func (m *Machine) KeeperDir() string { return filepath.Join(m.Dir, "keeper") }

// Connect is what a new agent does.
func (m *Machine) Connect() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	if m.Keeper, err = keeper.Ensure(ctx, m.KeeperDir(), Binary, m.Place); err != nil {
		m.t.Fatal(err)
	}
	if m.Runtime, err = m.kind.New(m); err != nil {
		m.t.Fatal(err)
	}
}

// KillKeeper kills the keeper as nothing else could and waits until it has
// gone.
func (m *Machine) KillKeeper() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	info, err := m.Keeper.Info(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	m.Kill(info.PID)
}

// Kill kills a process and waits until it has gone.
func (m *Machine) Kill(pid int) {
	m.t.Helper()
	ticks, err := process.StartTicks(pid)
	if errors.Is(err, process.ErrGone) {
		return
	}
	if err != nil {
		m.t.Fatal(err)
	}
	f, err := process.Open(pid, ticks)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	if err := process.Signal(f, syscall.SIGKILL); err != nil && !errors.Is(err, process.ErrGone) {
		m.t.Fatal(err)
	}
	if err := f.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		m.t.Fatal(err)
	}
	if err := process.Wait(f); err != nil {
		m.t.Fatal(err)
	}
	// Nor is it a zombie any more, from which its exit could be read.
	process.ExitStatus(f, 30*time.Second)
}

// Running are the command lines of processes, as far as they are seen, that
// have the text in them.
func Running(t testing.TB, text string) (list []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, _ := os.ReadFile(f) // it may have ended
		if line := strings.TrimSpace(strings.ReplaceAll(string(data), "\x00", " ")); strings.Contains(line, text) {
			list = append(list, line)
		}
	}
	return list
}

// NetNS returns the path of a new network namespace.
func NetNS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	if err := namespace.Make(dir, []namespace.Kind{namespace.Net}, nil, nil); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, string(namespace.Net))
	t.Cleanup(func() {
		if err := namespace.Unpin(path); err != nil {
			t.Error(err)
		}
	})
	return path
}
