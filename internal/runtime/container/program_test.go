package container

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// class is that of the machines under test.
var class = defaultClass

// Other OCI runtimes pass what the keeper's own does, also when keeper and
// agent die.
func TestPrograms(t *testing.T) {
	found := Programs()
	if len(found) == 0 {
		t.Skip("this machine has no other OCI runtime")
	}
	for name := range found {
		t.Run(name, func(t *testing.T) {
			class = name
			defer func() { class = defaultClass }()
			for _, test := range []struct {
				name string
				run  func(*testing.T)
			}{
				{"contract", TestContract},
				{"pod limits", TestPodLimits},
				{"namespaces", TestNamespaces},
				{"privileged", TestPrivileged},
				{"recovery", TestRecovery},
				{"it does the work", testProgramWorks},
				{"it is taken away", testProgramTakenAway},
				{"keeper killed in a start", testKeeperKilledInStart},
			} {
				t.Run(test.name, test.run)
			}
		})
	}
}

// What a program made is its own to see, and nothing of it is left when the
// workload has ended.
func testProgramWorks(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	w := b.Workload("main", "sleep 1000")
	b.Start(w)
	bundle := filepath.Join(m.Dir, "keeper", "workloads", w.ID.String(), "bundle")
	if _, err := os.Stat(filepath.Join(bundle, "state", w.ID.String())); err != nil {
		t.Errorf("the program does not know the container: %v", err)
	}
	if err := m.Signal(b.Ctx, w.ID, 9); err != nil {
		t.Fatal(err)
	}
	b.Wait(w.ID)
	if err := m.Remove(b.Ctx, w.ID); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Dir(bundle)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left: %v", filepath.Dir(bundle), err)
	}
	if err := m.CanMapIDs(); err == nil || err.Error() != "the pod's RuntimeClass has no user namespaces; use the class container, or leave hostUsers out" {
		t.Errorf("user namespaces: %v", err)
	}
}

// Without the program its workloads go on and can be ended.
func testProgramTakenAway(t *testing.T) {
	m := newMachine(t)
	data, err := os.ReadFile(m.Program)
	if err != nil {
		t.Fatal(err)
	}
	m.Program = filepath.Join(t.TempDir(), class)
	if err := os.WriteFile(m.Program, data, 0o755); err != nil {
		t.Fatal(err)
	}
	b := runtimetest.NewBench(t, m.Runtime)
	w := b.Workload("main", "echo tick 1; sleep 1000")
	b.Start(w)
	b.AwaitLog(w, "tick 1\n")
	if err := os.Remove(m.Program); err != nil {
		t.Fatal(err)
	}
	m.KillKeeper()
	if used, err := ProgramsInUse(b.Ctx, m.Keeper); err != nil || !maps.Equal(used, map[string]string{class: m.Program}) {
		t.Errorf("programs in use: %v %v", used, err)
	}
	if _, err := m.Start(b.Ctx, b.Workload("late", "true")); err == nil || !strings.Contains(err.Error(), class+" create: ") {
		t.Errorf("start without the program: %v", err)
	}
	if err := m.Signal(b.Ctx, w.ID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	b.Wait(w.ID)
	if err := m.Remove(b.Ctx, w.ID); err != nil {
		t.Fatal(err)
	}
}

// Wherever in a start the keeper is killed, the next one has the workload run
// once.
func testKeeperKilledInStart(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	path := m.Program
	for i, at := range []struct{ command, kill string }{
		{"create", "kill -9 $PPID; exec sleep 1000"},
		{"start", "kill -9 $PPID; exit 1"},
		{"start", path + ` "$@"; kill -9 $PPID; exit 1`},
	} {
		name, shared := fmt.Sprintf("w%d", i), t.TempDir()
		m.Program = filepath.Join(shared, class)
		script := fmt.Sprintf(`#!/bin/sh
for arg; do
	if [ "$arg" = %s ] && mkdir %s/killed 2>/dev/null; then %s; fi
done
exec %s "$@"
`, at.command, shared, at.kill, path)
		if err := os.WriteFile(m.Program, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
		w := b.Workload(name, "echo ran >>/shared/runs; echo here; sleep 1000")
		w.Mounts = []runtime.Mount{{Source: shared, Target: "/shared"}}
		if s := b.Start(w); s.State != runtime.Running {
			t.Errorf("%q: %s", at, runtimetest.Show(s))
		}
		b.AwaitLog(w, "here")
		if runs, err := os.ReadFile(filepath.Join(shared, "runs")); err != nil || string(runs) != "ran\n" {
			t.Errorf("%q: %q %v", at, runs, err)
		}
		if _, err := os.Stat(filepath.Join(shared, "killed")); err != nil {
			t.Errorf("%q: the keeper was not killed: %v", at, err)
		}
	}
}
