package container

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// killKeeper kills the keeper as nothing else could and waits until it has
// gone.
func (m *machine) killKeeper() {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	info, err := m.Keeper.Info(ctx)
	if err != nil {
		m.t.Fatal(err)
	}
	m.kill(info.PID)
}

func (m *machine) kill(pid int) {
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

// told tells whether this kernel says how others' children ended (6.15).
func told(t *testing.T) bool {
	t.Helper()
	var uts syscall.Utsname
	if err := syscall.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	var release []byte
	for _, c := range uts.Release {
		if c == 0 {
			break
		}
		release = append(release, byte(c))
	}
	var major, minor int
	if _, err := fmt.Sscanf(string(release), "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 15
}

const talker = `trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.01; done`

func TestKeeperKilled(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	w := b.Workload("main", talker)
	before := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.killKeeper()

	// The next call starts a new keeper, which goes on.
	after := b.Start(w)
	if after.PID != before.PID || after.State != runtime.Running || !after.StartedAt.Equal(before.StartedAt) {
		t.Fatalf("after: %s, before: %s", runtimetest.Show(after), runtimetest.Show(before))
	}
	b.AwaitLog(w, "tick 50\n")
	if code, err := m.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"sh", "-c", "exit 3"}}); err != nil || code != 3 {
		t.Errorf("exec: %d %v", code, err)
	}
	if err := m.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	s := b.Wait(w.ID)
	if s.ExitCode != 7 && told(t) || s.ExitCode != 7 && !s.Unknown {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
	for i := range 50 {
		if n := strings.Count(b.Log(w), fmt.Sprintf("tick %d\n", i+1)); n != 1 {
			t.Errorf("tick %d is in the log %d times", i+1, n)
		}
	}
	if !strings.HasSuffix(b.Log(w), "bye\n") {
		t.Error("last words are lost")
	}
}

func TestExitThatNobodySaw(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	w := b.Workload("main", talker)
	s := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.killKeeper()
	m.Keeper.Close() // the agent has gone too
	m.kill(s.PID)
	m.connect()
	b.Runtime = m.Runtime
	if s = b.Wait(w.ID); !s.Unknown || s.ExitCode != 255 || s.Signal != 0 {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
	if again := b.Start(w); again.State != runtime.Exited {
		t.Errorf("it ran twice: %s", runtimetest.Show(again))
	}
}

func TestExitThatTheAgentSaw(t *testing.T) {
	if !told(t) {
		t.Skip("needs Linux 6.15")
	}
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	w := b.Workload("main", talker)
	s := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.killKeeper()
	if err := syscall.Kill(s.PID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	ticks, err := process.StartTicks(s.PID)
	if err == nil {
		if f, err := process.Open(s.PID, ticks); err == nil {
			_ = f.SetReadDeadline(time.Now().Add(30 * time.Second))
			if err := process.Wait(f); err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
	}
	s = b.Await(w.ID, func(s runtime.Status) bool { return s.State == runtime.Exited && !s.Unknown })
	if s.ExitCode != 7 || s.Signal != 0 {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
	if !strings.HasSuffix(b.Log(w), "bye\n") {
		t.Error("last words are lost")
	}
	// It is settled for everybody.
	m.connect()
	b.Runtime = m.Runtime
	if s = b.Find(w.ID); s.Unknown || s.ExitCode != 7 {
		t.Errorf("exit as the next agent sees it: %s", runtimetest.Show(s))
	}
}

func TestTerminalSurvivesTheKeeper(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	w := b.Workload("main", `trap 'echo hung up' HUP; while :; do read line && echo "got $line"; sleep 0.01; done`)
	w.TTY, w.Stdin = true, true
	before := b.Start(w)
	for _, word := range []string{"one", "two"} {
		ctx, cancel := context.WithCancel(b.Ctx)
		done := make(chan error, 1)
		go func() {
			done <- m.Attach(ctx, w.ID, runtime.Streams{Stdin: strings.NewReader(word + "\n"), TTY: true})
		}()
		b.AwaitLog(w, "got "+word)
		cancel()
		<-done
		if word == "one" {
			m.killKeeper()
		}
	}
	if after := b.Find(w.ID); after.PID != before.PID || after.State != runtime.Running {
		t.Errorf("after: %s", runtimetest.Show(after))
	}
	if strings.Contains(b.Log(w), "hung up") {
		t.Error("the terminal was hung up")
	}
}

func TestAgentRestarted(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{SharePID: true})
	w := b.Workload("main", talker)
	w.Labels = map[string]string{"a": "b"}
	before := b.Start(w)
	b.AwaitLog(w, "tick 1\n")
	m.Keeper.Close()
	m.connect()
	b.Runtime = m.Runtime
	if ground, err := m.Open(b.Ctx, b.Pod); err != nil || ground != b.Ground {
		t.Fatalf("ground %q, before: %q, %v", ground, b.Ground, err)
	}
	if after := b.Start(w); !reflect.DeepEqual(after, before) {
		t.Errorf("after: %s, before: %s", runtimetest.Show(after), runtimetest.Show(before))
	}
	if err := m.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := b.Wait(w.ID); s.ExitCode != 7 {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
}

// A server that ends while a workload is being started must leave to the next
// one what the keeper then runs.
func TestStartCutShort(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	const script = `echo here >/file; trap 'exit 7' TERM; while cat /file; do sleep 0.05; done`
	w := b.Workload("main", script)
	state := filepath.Join(m.dir, "keeper", "runc", w.ID.String(), "state.json")
	ctx, cancel := context.WithCancel(b.Ctx)
	defer cancel()
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(state); err == nil { // its root is made, it is about to run
				cancel()
			}
		}
	}()
	if s, err := m.Start(ctx, w); err == nil {
		t.Skipf("it was started before it could be cut short: %s", runtimetest.Show(s))
	}
	if s := b.Start(w); s.State != runtime.Running {
		t.Fatalf("started: %s", runtimetest.Show(s))
	}
	b.AwaitLog(w, "here\n")
	if _, err := os.Stat(filepath.Join(m.attemptDir(w.ID), "upper", "file")); err != nil {
		t.Error("the writable layer is not the one that the workload writes to:", err)
	}
	if err := m.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if s := b.Wait(w.ID); s.ExitCode != 7 {
		t.Errorf("exit: %s", runtimetest.Show(s))
	}
}

// A record is not forced to the disk and may be empty after a power failure.
func TestEmptyRecordOfPod(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	if err := os.Truncate(filepath.Join(m.podDir(b.Pod.ID), podFile), 0); err != nil {
		t.Fatal(err)
	}
	m.Keeper.Close()
	m.connect()
	b.Runtime = m.Runtime
	if _, err := m.Open(b.Ctx, b.Pod); err != nil {
		t.Fatal(err)
	}
	b.Start(b.Workload("main", "sleep 1000"))
}

// What ends with the machine ends with a stop of everything too.
func TestGroundIsNew(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	b.Start(b.Workload("main", "sleep 1000"))
	m.Keeper.Close()
	if err := errors.Join(keeper.Shutdown(b.Ctx, filepath.Join(m.dir, "keeper")), cgroup.Remove(m.root)); err != nil {
		t.Fatal(err)
	}
	m.connect()
	b.Runtime = m.Runtime
	if ground, err := m.Open(b.Ctx, b.Pod); err != nil || ground == "" || ground == b.Ground {
		t.Errorf("ground %q, before: %q, %v", ground, b.Ground, err)
	}
}

func TestKeeperUpgraded(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	plain, tty := b.Workload("plain", talker), b.Workload("tty", talker)
	tty.TTY = true
	b.Start(plain)
	b.Start(tty)
	b.AwaitLog(plain, "tick 3\n")
	old, err := m.Keeper.Info(b.Ctx)
	if err != nil {
		t.Fatal(err)
	}

	data, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(t.TempDir(), "tutti-keeper-newer")
	if err := os.WriteFile(newer, data, 0o755); err != nil {
		t.Fatal(err)
	}
	broken := newer + "-broken"
	if err := os.WriteFile(broken, []byte("#!/bin/false\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := keeper.Ensure(b.Ctx, filepath.Join(m.dir, "keeper"), broken, m.place); err == nil {
		t.Error("a broken program took over")
	}
	client, err := keeper.Ensure(b.Ctx, filepath.Join(m.dir, "keeper"), newer, m.place)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	info, err := client.Info(b.Ctx)
	if err != nil || info.Binary != newer || info.PID != old.PID {
		t.Errorf("keeper %+v, was %+v: %v", info, old, err)
	}
	for _, w := range []runtime.Workload{plain, tty} {
		b.AwaitLog(w, "tick 100")
		if err := m.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if s := b.Wait(w.ID); s.ExitCode != 7 || s.Unknown {
			t.Errorf("exit: %s", runtimetest.Show(s))
		}
		log := strings.ReplaceAll(b.Log(w), "\r", "")
		for i := range 100 {
			if n := strings.Count(log, fmt.Sprintf("tick %d\n", i+1)); n != 1 {
				t.Errorf("tick %d is in the log of %s %d times", i+1, w.Name, n)
			}
		}
	}
}

// A workload that ends while the keeper replaces its program has ended as it
// did: nobody else watches, as when a newer server has just started.
func TestExitAmongUpgrades(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{SharePID: true})
	data, err := os.ReadFile(binary)
	if err != nil {
		t.Fatal(err)
	}
	newer := filepath.Join(t.TempDir(), "tutti-keeper-newer")
	if err := os.WriteFile(newer, data, 0o755); err != nil {
		t.Fatal(err)
	}
	var all []runtime.Workload
	for i := range 30 {
		// It leaves processes, which the keeper ends before it notes the exit.
		all = append(all, b.Workload(fmt.Sprintf("w%d", i), fmt.Sprintf("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; sleep 2.%02d; exit 7", i*3)))
		b.Start(all[i])
	}
	m.Keeper.Close()
	for begun, i := time.Now(), 0; time.Since(begun) < 4*time.Second; i++ {
		client, err := keeper.Ensure(b.Ctx, filepath.Join(m.dir, "keeper"), []string{newer, binary}[i%2], m.place)
		if err != nil {
			t.Fatal(err)
		}
		client.Close()
	}
	m.connect()
	b.Runtime = m.Runtime
	for _, w := range all {
		if s := b.Wait(w.ID); s.ExitCode != 7 || s.Unknown {
			t.Errorf("exit of %s: %s", w.Name, runtimetest.Show(s))
		}
	}
}

// Whenever the keeper dies, each workload runs once, and a start that failed
// can be repeated.
func TestNoneRunsTwice(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	shared := t.TempDir()
	var killer sync.WaitGroup
	killer.Go(func() {
		for range 20 {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			m.killKeeper()
		}
	})
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(b.Ctx, time.Minute)
	defer cancel()
	for i := range 20 {
		all.Go(func() {
			w := b.Workload(fmt.Sprintf("w%d", i), fmt.Sprintf("echo ran >> /shared/%d; sleep 1000", i))
			w.Mounts = []runtime.Mount{{Source: shared, Target: "/shared"}}
			for {
				s, err := m.Start(ctx, w)
				if err == nil && s.PID > 0 {
					return
				}
				if ctx.Err() != nil {
					t.Errorf("start: %v", err)
					return
				}
			}
		})
	}
	all.Wait()
	killer.Wait()
	for i := range 20 {
		id := runtime.ID{Pod: b.Pod.ID, Name: fmt.Sprintf("w%d", i)}
		s := b.Find(id)
		if s.State != runtime.Running {
			t.Log(runtimetest.Show(s)) // killed with its keeper before it was known to run
			continue
		}
		file := filepath.Join(shared, fmt.Sprint(i))
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			data, err := os.ReadFile(file)
			if err == nil && string(data) == "ran\n" {
				break
			}
			if len(data) > 4 || time.Now().After(deadline) {
				t.Errorf("%s: %q %v", id, data, err)
				break
			}
		}
	}
}
