package runtimetest

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
	"time"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/runtime"
)

// told tells whether this kernel says how others' children ended (6.15).
func told(b *Bench) bool {
	b.Helper()
	var uts syscall.Utsname
	if err := syscall.Uname(&uts); err != nil {
		b.Fatal(err)
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
		b.Fatal(err)
	}
	return major > 6 || major == 6 && minor >= 15
}

const talker = `trap 'echo bye; exit 7' TERM; i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.01; done`

func keeperKilled(b *Bench) {
	m := b.Machine
	w := b.Workload("main", talker)
	before := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.KillKeeper()

	// The next call starts a new keeper, which goes on.
	after := b.Start(w)
	if after.PID != before.PID || after.State != runtime.Running || !after.StartedAt.Equal(before.StartedAt) {
		b.Fatalf("after: %s, before: %s", Show(after), Show(before))
	}
	b.AwaitLog(w, "tick 50\n")
	if code, err := m.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"sh", "-c", "exit 3"}}); err != nil || code != 3 {
		b.Errorf("exec: %d %v", code, err)
	}
	if err := m.Runtime.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		b.Fatal(err)
	}
	s := b.Wait(w.ID)
	if s.ExitCode != 7 && told(b) || s.ExitCode != 7 && !s.Unknown {
		b.Errorf("exit: %s", Show(s))
	}
	for i := range 50 {
		if n := strings.Count(b.Log(w), fmt.Sprintf("tick %d\n", i+1)); n != 1 {
			b.Errorf("tick %d is in the log %d times", i+1, n)
		}
	}
	if !strings.HasSuffix(b.Log(w), "bye\n") {
		b.Error("last words are lost")
	}
}

func exitThatNobodySaw(b *Bench) {
	m := b.Machine
	w := b.Workload("main", talker)
	s := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.KillKeeper()
	m.Keeper.Close() // the agent has gone too
	m.Kill(s.PID)
	m.Connect()
	b.Runtime = m.Runtime
	if s = b.Wait(w.ID); !s.Unknown || s.ExitCode != 255 || s.Signal != 0 {
		b.Errorf("exit: %s", Show(s))
	}
	if again := b.Start(w); again.State != runtime.Exited {
		b.Errorf("it ran twice: %s", Show(again))
	}
}

func exitThatTheAgentSaw(b *Bench) {
	if !told(b) {
		b.Skip("needs Linux 6.15")
	}
	m := b.Machine
	w := b.Workload("main", talker)
	s := b.Start(w)
	b.AwaitLog(w, "tick 3\n")
	m.KillKeeper()
	if err := syscall.Kill(s.PID, syscall.SIGTERM); err != nil {
		b.Fatal(err)
	}
	ticks, err := process.StartTicks(s.PID)
	if err == nil {
		if f, err := process.Open(s.PID, ticks); err == nil {
			_ = f.SetReadDeadline(time.Now().Add(30 * time.Second))
			if err := process.Wait(f); err != nil {
				b.Fatal(err)
			}
			f.Close()
		}
	}
	s = b.Await(w.ID, func(s runtime.Status) bool { return s.State == runtime.Exited && !s.Unknown })
	if s.ExitCode != 7 || s.Signal != 0 {
		b.Errorf("exit: %s", Show(s))
	}
	if !strings.HasSuffix(b.Log(w), "bye\n") {
		b.Error("last words are lost")
	}
	// It is settled for everybody.
	m.Connect()
	b.Runtime = m.Runtime
	if s = b.Find(w.ID); s.Unknown || s.ExitCode != 7 {
		b.Errorf("exit as the next agent sees it: %s", Show(s))
	}
}

func terminalSurvives(b *Bench) {
	m := b.Machine
	w := b.Workload("main", `trap 'echo hung up' HUP; while :; do read line && echo "got $line"; sleep 0.01; done`)
	w.TTY, w.Stdin = true, true
	before := b.Start(w)
	for _, word := range []string{"one", "two"} {
		ctx, cancel := context.WithCancel(b.Ctx)
		done := make(chan error, 1)
		go func() {
			done <- m.Runtime.Attach(ctx, w.ID, runtime.Streams{Stdin: strings.NewReader(word + "\n"), TTY: true})
		}()
		b.AwaitLog(w, "got "+word)
		cancel()
		<-done
		if word == "one" {
			m.KillKeeper()
		}
	}
	if after := b.Find(w.ID); after.PID != before.PID || after.State != runtime.Running {
		b.Errorf("after: %s", Show(after))
	}
	if strings.Contains(b.Log(w), "hung up") {
		b.Error("the terminal was hung up")
	}
}

func agentRestarted(b *Bench) {
	m := b.Machine
	b = m.Bench(runtime.Pod{SharePID: true})
	w := b.Workload("main", talker)
	w.Labels = map[string]string{"a": "b"}
	before := b.Start(w)
	b.AwaitLog(w, "tick 1\n")
	m.Keeper.Close()
	m.Connect()
	b.Runtime = m.Runtime
	if ground, err := m.Runtime.Open(b.Ctx, b.Pod); err != nil || ground != b.Ground {
		b.Fatalf("ground %q, before: %q, %v", ground, b.Ground, err)
	}
	if after := b.Start(w); !reflect.DeepEqual(after, before) {
		b.Errorf("after: %s, before: %s", Show(after), Show(before))
	}
	if err := m.Runtime.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
		b.Fatal(err)
	}
	if s := b.Wait(w.ID); s.ExitCode != 7 {
		b.Errorf("exit: %s", Show(s))
	}
}

// What ends with the machine ends with a stop of everything too.
func groundIsNew(b *Bench) {
	m := b.Machine
	b.Start(b.Workload("main", "sleep 1000"))
	m.Keeper.Close()
	if err := errors.Join(keeper.Shutdown(b.Ctx, m.KeeperDir()), cgroup.Remove(m.CgroupRoot)); err != nil {
		b.Fatal(err)
	}
	m.Connect()
	b.Runtime = m.Runtime
	if ground, err := m.Runtime.Open(b.Ctx, b.Pod); err != nil || ground == "" || ground == b.Ground {
		b.Errorf("ground %q, before: %q, %v", ground, b.Ground, err)
	}
}

func keeperUpgraded(b *Bench) {
	m := b.Machine
	plain, tty := b.Workload("plain", talker), b.Workload("tty", talker)
	tty.TTY = true
	b.Start(plain)
	b.Start(tty)
	b.AwaitLog(plain, "tick 3\n")
	old, err := m.Keeper.Info(b.Ctx)
	if err != nil {
		b.Fatal(err)
	}

	data, err := os.ReadFile(Binary)
	if err != nil {
		b.Fatal(err)
	}
	newer := filepath.Join(b.TempDir(), "tutti-keeper-newer")
	if err := os.WriteFile(newer, data, 0o755); err != nil {
		b.Fatal(err)
	}
	broken := newer + "-broken"
	if err := os.WriteFile(broken, []byte("#!/bin/false\n"), 0o755); err != nil {
		b.Fatal(err)
	}
	if _, err := keeper.Ensure(b.Ctx, m.KeeperDir(), broken, m.Place); err == nil {
		b.Error("a broken program took over")
	}
	client, err := keeper.Ensure(b.Ctx, m.KeeperDir(), newer, m.Place)
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	info, err := client.Info(b.Ctx)
	if err != nil || info.Binary != newer || info.PID != old.PID {
		b.Errorf("keeper %+v, was %+v: %v", info, old, err)
	}
	for _, w := range []runtime.Workload{plain, tty} {
		b.AwaitLog(w, "tick 100")
		if err := m.Runtime.Signal(b.Ctx, w.ID, syscall.SIGTERM); err != nil {
			b.Fatal(err)
		}
		if s := b.Wait(w.ID); s.ExitCode != 7 || s.Unknown {
			b.Errorf("exit: %s", Show(s))
		}
		log := strings.ReplaceAll(b.Log(w), "\r", "")
		for i := range 100 {
			if n := strings.Count(log, fmt.Sprintf("tick %d\n", i+1)); n != 1 {
				b.Errorf("tick %d is in the log of %s %d times", i+1, w.Name, n)
			}
		}
	}
}

// A workload that ends while the keeper replaces its program has ended as it
// did: nobody else watches, as when a newer server has just started.
func exitAmongUpgrades(b *Bench) {
	m := b.Machine
	b = m.Bench(runtime.Pod{SharePID: true})
	data, err := os.ReadFile(Binary)
	if err != nil {
		b.Fatal(err)
	}
	newer := filepath.Join(b.TempDir(), "tutti-keeper-newer")
	if err := os.WriteFile(newer, data, 0o755); err != nil {
		b.Fatal(err)
	}
	var all []runtime.Workload
	for i := range 30 {
		// It leaves processes, which the keeper ends before it notes the exit.
		all = append(all, b.Workload(fmt.Sprintf("w%d", i), fmt.Sprintf("for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; sleep 2.%02d; exit 7", i*3)))
		b.Start(all[i])
	}
	m.Keeper.Close()
	for begun, i := time.Now(), 0; time.Since(begun) < 4*time.Second; i++ {
		client, err := keeper.Ensure(b.Ctx, m.KeeperDir(), []string{newer, Binary}[i%2], m.Place)
		if err != nil {
			b.Fatal(err)
		}
		client.Close()
	}
	m.Connect()
	b.Runtime = m.Runtime
	for _, w := range all {
		if s := b.Wait(w.ID); s.ExitCode != 7 || s.Unknown {
			b.Errorf("exit of %s: %s", w.Name, Show(s))
		}
	}
}

// Whenever the keeper dies, each workload runs once, and a start that failed
// can be repeated.
func noneRunsTwice(b *Bench) {
	m := b.Machine
	shared := b.TempDir()
	var killer sync.WaitGroup
	killer.Go(func() {
		for range 20 {
			time.Sleep(time.Duration(rand.IntN(100)) * time.Millisecond)
			m.KillKeeper()
		}
	})
	var all sync.WaitGroup
	ctx, cancel := context.WithTimeout(b.Ctx, time.Minute)
	defer cancel()
	for i := range 20 {
		all.Go(func() {
			script := fmt.Sprintf("echo ran >> /shared/%d", i)
			if i%2 == 0 {
				script += "; sleep 1000"
			}
			w := b.Workload(fmt.Sprintf("w%d", i), script)
			w.Mounts = []runtime.Mount{{Source: shared, Target: "/shared"}}
			for {
				s, err := m.Runtime.Start(ctx, w)
				if err == nil && s.PID > 0 {
					return
				}
				if ctx.Err() != nil {
					b.Errorf("start: %v", err)
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
		file := filepath.Join(shared, fmt.Sprint(i))
		if s.Unknown {
			b.TB.Log(Show(s)) // it may have come to nothing when its keeper died
			if data, err := os.ReadFile(file); len(data) > 4 {
				b.Errorf("%s: %q %v", id, data, err)
			}
			continue
		}
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(time.Millisecond) {
			data, err := os.ReadFile(file)
			if err == nil && string(data) == "ran\n" {
				break
			}
			if len(data) > 4 || time.Now().After(deadline) {
				b.Errorf("%s: %q %v", id, data, err)
				break
			}
		}
	}
}
