package container

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

func TestMain(m *testing.M) { os.Exit(runtimetest.Main(m)) }

// kind is that of the class under test.
func kind() runtimetest.Kind {
	return runtimetest.Kind{
		New: func(m *runtimetest.Machine) (runtime.Runtime, error) {
			return New(Config{Dir: m.Dir, CgroupRoot: m.CgroupRoot, Keeper: m.Keeper, Log: slog.New(slog.DiscardHandler), Class: class, Program: Programs()[class]})
		},
		Purge: Purge, Differences: runtimetest.Declared[class],
	}
}

// machine is one whose runtime is known.
type machine struct {
	*runtimetest.Machine
	*Runtime
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	m := runtimetest.NewMachine(t, kind())
	t.Cleanup(func() {
		if err := Purge(context.Background(), m.Dir, m.CgroupRoot); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(openRoots(m.CgroupRoot)); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", openRoots(m.CgroupRoot), err)
		}
	})
	return &machine{m, m.Runtime.(*Runtime)}
}

// connect is what a new agent does.
func (m *machine) connect() {
	m.Machine.Connect()
	m.Runtime = m.Machine.Runtime.(*Runtime)
}

func TestContract(t *testing.T) { runtimetest.Run(t, kind()) }

func TestRecovery(t *testing.T) { runtimetest.RunRecovery(t, kind()) }

// A pod's limits are its own control group's, and change before or after
// those of its workloads.
func TestPodLimits(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBenchWith(t, m.Runtime, runtime.Pod{Resources: runtime.Resources{
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
