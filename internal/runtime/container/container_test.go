package container

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// binary is the keeper under test, the one that TUTTI_KEEPER names or built
// from this tree; layer a root file system.
var binary, layer string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "tutti-container-test-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		binary, layer = os.Getenv("TUTTI_KEEPER"), filepath.Join(dir, "layer")
		if binary == "" {
			binary = filepath.Join(dir, "tutti-keeper")
			err = buildKeeper()
		}
		if err == nil {
			err = prepare()
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func buildKeeper() error {
	build := exec.Command("go", "build", "-tags", "seccomp netgo osusergo", "-ldflags", "-s -w -extldflags -static",
		"-o", binary, "tutti.dev/tutti/cmd/tutti-keeper")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build keeper: %w: %s", err, out)
	}
	return nil
}

func prepare() error {
	for _, d := range []string{"bin", "etc", "tmp", "home/app"} {
		if err := os.MkdirAll(filepath.Join(layer, d), 0o755); err != nil {
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
		if err := os.WriteFile(filepath.Join(layer, name), []byte(data), mode); err != nil {
			return err
		}
	}
	applets, err := exec.Command("/bin/busybox", "--list").Output()
	if err != nil {
		return err
	}
	for _, a := range strings.Fields(string(applets)) {
		if a != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(layer, "bin", a)); err != nil {
				return err
			}
		}
	}
	return nil
}

// machine is a data directory with a keeper of its own.
type machine struct {
	*Runtime
	t    testing.TB
	dir  string
	root string
}

// place puts a keeper where the others of the machine are.
func (m *machine) place(pid int) error { return cgroup.Join(m.root+"/keeper", pid) }

func newMachine(t testing.TB) *machine {
	t.Helper()
	// Longer than a socket's path may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 25))
	m := &machine{t: t, dir: dir, root: "tutti-test-" + strings.ToLower(rand.Text()[:8])}
	m.connect()
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
			if err := Purge(ctx, dir, m.root); err != nil {
				t.Error(err)
			}
		}
		m.Keeper.Close()
		if left, err := mount.Below(dir); err != nil || len(left) > 0 {
			t.Errorf("mounts are left: %q %v", left, err)
		}
		if _, err := os.Stat(openRoots(m.root)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", openRoots(m.root), err)
		}
		if cgroup.Exists(m.root) {
			t.Errorf("control group %s is left", m.root)
		}
		// Processes of this machine, the keeper among them, name it.
		if out, err := exec.Command("pgrep", "-af", dir).Output(); err == nil {
			t.Errorf("processes are left: %s", out)
		}
	})
	return m
}

// connect is what a new agent does.
func (m *machine) connect() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	client, err := keeper.Ensure(ctx, filepath.Join(m.dir, "keeper"), binary, m.place)
	if err != nil {
		m.t.Fatal(err)
	}
	if m.Runtime, err = New(Config{Dir: m.dir, CgroupRoot: m.root, Keeper: client, Log: slog.New(slog.DiscardHandler), Class: class, Program: Programs()[class]}); err != nil {
		m.t.Fatal(err)
	}
}

func TestContract(t *testing.T) {
	runtimetest.Run(t, func(t *testing.T) (runtime.Runtime, string) {
		return newMachine(t).Runtime, layer
	}, runtimetest.Declared[class])
}

// A pod's limits are its own control group's, and change before or after
// those of its workloads.
func TestPodLimits(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{Resources: runtime.Resources{
		Memory: 64 << 20, CPUShares: 512, CPUQuota: 20000, CPUPeriod: 100000,
	}})
	memory := func() string {
		t.Helper()
		file := filepath.Join("/sys/fs/cgroup/memory", m.podCgroup(b.Pod), "memory.limit_in_bytes")
		if cgroup.Unified() {
			file = filepath.Join("/sys/fs/cgroup", m.podCgroup(b.Pod), "memory.max")
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	w := b.Workload("main", "sleep 1000")
	w.Resources = b.Pod.Resources
	b.Start(w)
	more := runtime.Resources{Memory: 128 << 20, CPUShares: 1024, CPUQuota: 50000, CPUPeriod: 100000}
	for range 2 {
		if err := m.UpdatePod(b.Ctx, b.Pod.ID, more); err != nil {
			t.Fatal(err)
		}
	}
	if err := m.Update(b.Ctx, w.ID, more); err != nil {
		t.Fatal(err)
	}
	if got := memory(); got != "134217728" {
		t.Errorf("memory of the pod is limited to %s", got)
	}
	// The pod that is opened again is the one that was updated.
	if _, err := m.Open(b.Ctx, b.Pod); err != nil {
		t.Fatal(err)
	}
	if got := memory(); got != "134217728" {
		t.Errorf("memory of the pod is limited to %s after it was opened again", got)
	}
	if err := m.UpdatePod(b.Ctx, "nobody", more); !errors.Is(err, runtime.ErrNotFound) {
		t.Errorf("update of an unknown pod: %v", err)
	}
}
