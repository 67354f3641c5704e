package container

import (
	"context"
	"slices"
	"testing"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// Runtimes with one keeper tell of their own workloads only; what an older
// version has started, which knew no classes, is a container.
func TestClasses(t *testing.T) {
	m := newMachine(t)
	config := m.Config
	config.Class = "other"
	other, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	told, err := m.Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	theirs := runtimetest.NewBenchWith(t, other, runtime.Pod{SharePID: true})
	theirs.Output(theirs.Workload("theirs", "true"))
	ours := runtimetest.NewBench(t, m.Runtime)
	ours.Output(ours.Workload("ours", "true"))
	for s := range told { // in the order of what happened
		if s.Name != "ours" {
			t.Errorf("told of %s", s.ID)
		}
		if s.State == runtime.Exited {
			break
		}
	}
	for rt, want := range map[*Runtime]string{m.Runtime: "ours", other: "theirs"} {
		list, err := rt.List(t.Context())
		if err != nil || !slices.EqualFunc(list, []string{want}, func(s runtime.Status, name string) bool { return s.Name == name }) {
			t.Errorf("list of class %q: %v %v", rt.Class, list, err)
		}
	}
	all, err := m.Keeper.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range all {
		if w.Envelope.Labels[labelName] != "ours" {
			continue
		}
		delete(w.Envelope.Labels, labelClass)
		if !m.shows(w) || other.shows(w) {
			t.Error("what has no class is not a container")
		}
	}
}
