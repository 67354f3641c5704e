// Package runtimetest is what every implementation of runtime.Runtime must
// pass. It runs real programs: the layer that an implementation is tried with
// holds a busybox at /bin/busybox, a link /bin/sh to it, and an /etc/passwd
// with users root (0) and app (1000, group 1000, also in group extra, 2000).
package runtimetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/cgroups"

	"tutti.dev/tutti/internal/runtime"
)

const patience = 30 * time.Second

// part is one part of a suite.
type part struct {
	name string
	run  func(*Bench)
}

// Run tries what a class of runtime does, each part on a machine of its own.
// Parts among the kind's differences are left out.
func Run(t *testing.T, kind Kind) {
	run(t, kind, behaviour)
}

// RunRecovery tries what is left when agent and keeper die.
func RunRecovery(t *testing.T, kind Kind) {
	run(t, kind, recovery)
}

var behaviour = []part{
	{"exit codes", exitCodes},
	{"signals", signals},
	{"start twice", startTwice},
	{"log", log},
	{"user", users},
	{"environment and directory", environment},
	{"cannot start", cannotStart},
	{"mounts", mounts},
	{"read-only root", readOnlyRoot},
	{"writable layer is the attempt's own", freshLayer},
	{"limits", limits},
	{"out of memory", outOfMemory},
	{"who goes first when memory is out", oomScore},
	{"exec", execs},
	{"exec with terminal", execTerminal},
	{"exec is killed with its context", execCancelled},
	{"attach", attach},
	{"attach to a terminal", attachTerminal},
	{"own network", ownNetwork},
	{"own host name", ownHostName},
	{"own shared memory and semaphores", ownIPC},
	{"own processes", ownProcesses},
	{"processes shared by the pod", sharePID},
	{"join the processes of another", joinPID},
	{"close kills all", closeKills},
	{"watch and list", watch},
	{"remove", remove},
	{"unknown", unknown},
}

var recovery = []part{
	{"keeper is killed", keeperKilled},
	{"exit that nobody saw", exitThatNobodySaw},
	{"exit that the agent saw", exitThatTheAgentSaw},
	{"terminal survives the keeper", terminalSurvives},
	{"agent is restarted", agentRestarted},
	{"ground is new", groundIsNew},
	{"keeper is upgraded", keeperUpgraded},
	{"exit among upgrades", exitAmongUpgrades},
	{"none runs twice", noneRunsTwice},
}

func run(t *testing.T, kind Kind, parts []part) {
	for _, p := range parts {
		t.Run(p.name, func(t *testing.T) {
			if why, ok := kind.Differences[p.name]; ok {
				t.Skip(why)
			}
			m := NewMachine(t, kind)
			p.run(m.Bench(kind.Pod))
		})
	}
	for name := range kind.Differences {
		if !slices.ContainsFunc(slices.Concat(behaviour, recovery), func(p part) bool { return p.name == name }) {
			t.Errorf("the suite has no part %q", name)
		}
	}
}

// Bench opens a pod like the given one on a machine.
func (m *Machine) Bench(pod runtime.Pod) *Bench {
	m.t.Helper()
	b := newBench(m.t, m.Runtime, pod)
	b.Machine = m
	return b
}

// Bench is one pod, open, to try things in.
type Bench struct {
	testing.TB
	Runtime runtime.Runtime
	Machine *Machine
	Pod     runtime.Pod
	Ground  string // as it was opened
	Ctx     context.Context
	dir     string
}

// NewBench opens a pod that is closed when the test ends.
func NewBench(t testing.TB, rt runtime.Runtime) *Bench {
	t.Helper()
	return newBench(t, rt, runtime.Pod{})
}

// NewBenchWith opens the given pod, under a name of its own.
func NewBenchWith(t testing.TB, rt runtime.Runtime, pod runtime.Pod) *Bench {
	t.Helper()
	return newBench(t, rt, pod)
}

func newBench(t testing.TB, rt runtime.Runtime, pod runtime.Pod) *Bench {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	b := &Bench{TB: t, Runtime: rt, Ctx: ctx, dir: t.TempDir()}
	pod.ID = strings.ToLower(rand.Text())
	pod.Cgroup = "burstable/pod" + pod.ID
	if pod.Hostname == "" {
		pod.Hostname = "bench"
	}
	b.Pod = pod
	t.Cleanup(func() {
		defer cancel()
		rt := b.Runtime
		if b.Machine != nil { // whose agent may be another by now
			rt = b.Machine.Runtime
		}
		if err := rt.Close(ctx, pod.ID); err != nil {
			t.Error(err)
		}
	})
	b.Ground = b.open()
	return b
}

// open opens the pod and returns what its ground is called.
func (b *Bench) open() string {
	b.Helper()
	if b.Pod.IDs.Size > 0 {
		netns, err := b.Runtime.(runtime.UserNamespaces).OpenNamespaces(b.Ctx, b.Pod)
		b.must(err)
		b.Pod.NetNS = netns
	}
	ground, err := b.Runtime.Open(b.Ctx, b.Pod)
	b.must(err)
	return ground
}

func (b *Bench) must(err error) {
	b.Helper()
	if err != nil {
		b.Fatal(err)
	}
}

// Workload returns one that runs a shell script.
func (b *Bench) Workload(name, script string) runtime.Workload {
	w := runtime.Workload{
		ID:           runtime.ID{Pod: b.Pod.ID, Name: name},
		Layers:       []string{Layer},
		Args:         []string{"/bin/sh", "-c", script},
		Log:          filepath.Join(b.dir, name+".log"),
		Capabilities: []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID"},
		Seccomp:      "default",
		StopSignal:   syscall.SIGTERM,
	}
	if b.Machine != nil && b.Machine.kind.Workload != nil {
		b.Machine.kind.Workload(&w)
	}
	return w
}

// Show returns a status in full, which its embedded ID would hide.
func Show(s runtime.Status) string {
	data, err := json.Marshal(s)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// Start starts a workload or fails the test.
func (b *Bench) Start(w runtime.Workload) runtime.Status {
	b.Helper()
	s, err := b.Runtime.Start(b.Ctx, w)
	b.must(err)
	return s
}

// Wait waits until the workload has exited.
func (b *Bench) Wait(id runtime.ID) runtime.Status {
	b.Helper()
	return b.Await(id, func(s runtime.Status) bool { return s.State == runtime.Exited })
}

// Await waits until the workload's status is as wanted.
func (b *Bench) Await(id runtime.ID, wanted func(runtime.Status) bool) runtime.Status {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Ctx, patience)
	defer cancel()
	for ctx.Err() == nil {
		changes, err := b.Runtime.Watch(ctx)
		b.must(err)
		if s := b.Find(id); wanted(s) {
			return s
		}
		for s := range changes {
			if s.ID == id && wanted(s) {
				return s
			}
		}
	}
	b.Fatalf("%s did not come to be as wanted: %s", id, Show(b.Find(id)))
	return runtime.Status{}
}

// Find returns the workload's status from the list.
func (b *Bench) Find(id runtime.ID) runtime.Status {
	b.Helper()
	list, err := b.Runtime.List(b.Ctx)
	b.must(err)
	i := slices.IndexFunc(list, func(s runtime.Status) bool { return s.ID == id })
	if i < 0 {
		b.Fatalf("%s is not listed", id)
	}
	return list[i]
}

// Output runs a script to its end and returns what it said on both streams.
func (b *Bench) Output(w runtime.Workload) string {
	b.Helper()
	b.Start(w)
	b.Wait(w.ID)
	return b.Log(w)
}

// Log returns what the workload has said, without the log's own marks.
func (b *Bench) Log(w runtime.Workload) string {
	b.Helper()
	data, err := os.ReadFile(w.Log)
	b.must(err)
	var text strings.Builder
	for line := range strings.Lines(string(data)) {
		fields := strings.SplitN(line, " ", 4)
		if len(fields) < 4 {
			b.Fatalf("log line %q", line)
		}
		if fields[2] == "P" {
			fields[3] = strings.TrimSuffix(fields[3], "\n")
		}
		text.WriteString(fields[3])
	}
	return text.String()
}

// AwaitLog waits until the log has the text. The log is a file, so this is the
// one thing that is looked at again and again.
func (b *Bench) AwaitLog(w runtime.Workload, text string) {
	b.Helper()
	deadline := time.Now().Add(patience)
	for !strings.Contains(b.Log(w), text) {
		if time.Now().After(deadline) {
			b.Fatalf("log has no %q: %q", text, b.Log(w))
		}
		time.Sleep(2 * time.Millisecond)
	}
}

func (b *Bench) equal(what string, got, want any) {
	b.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		b.Errorf("%s: %v, want %v", what, got, want)
	}
}

func exitCodes(b *Bench) {
	for code, script := range map[int]string{0: "exit 0", 3: "exit 3", 143: "kill -TERM $$; sleep 30 & wait"} {
		w := b.Workload(fmt.Sprintf("exit%d", code), script)
		if code == 143 {
			// A first process has no default signal handlers: it ends by its own.
			w.Args = []string{"/bin/sh", "-c", "trap 'exit 143' TERM; kill -TERM $$; sleep 30 & wait"}
		}
		s := b.Start(w)
		if s.StartedAt.IsZero() {
			b.Error("no start time")
		}
		s = b.Wait(w.ID)
		b.equal(script, s.ExitCode, code)
		if s.FinishedAt.Before(s.StartedAt) || s.Unknown || s.OOMKilled {
			b.Errorf("status: %s", Show(s))
		}
	}
}

func signals(b *Bench) {
	w := b.Workload("loop", "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 60 & wait; done")
	b.Start(w)
	b.AwaitLog(w, "ready")
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGTERM))
	b.equal("code", b.Wait(w.ID).ExitCode, 7)
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGTERM))

	w = b.Workload("killed", "sleep 1000")
	b.Start(w)
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGKILL))
	s := b.Wait(w.ID)
	b.equal("code", s.ExitCode, 137)
	b.equal("signal", s.Signal, syscall.SIGKILL)
}

func startTwice(b *Bench) {
	w := b.Workload("once", "echo started; sleep 1000")
	var all sync.WaitGroup
	pids := make([]int, 8)
	for i := range pids {
		all.Go(func() {
			s, err := b.Runtime.Start(b.Ctx, w)
			if err != nil {
				b.Error(err)
			}
			pids[i] = s.PID
		})
	}
	all.Wait()
	b.equal("different processes", len(slices.Compact(pids)), 1)
	b.AwaitLog(w, "started\n")
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGKILL))
	b.Wait(w.ID)
	s := b.Start(w)
	b.equal("state when started again", s.State, runtime.Exited)
	b.equal("log", b.Log(w), "started\n")
}

var record = regexp.MustCompile(`^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z (stdout|stderr) (F|P) .*\n$`)

func log(b *Bench) {
	w := b.Workload("log", `echo out; echo err >&2; head -c 40000 /dev/zero | tr '\0' x; echo; printf end`)
	b.Start(w)
	b.Wait(w.ID)
	data, err := os.ReadFile(w.Log)
	b.must(err)
	for line := range strings.Lines(string(data)) {
		if !record.MatchString(line) {
			b.Errorf("record %.80q", line)
		}
	}
	text := string(data)
	for _, want := range []string{" stdout F out\n", " stderr F err\n", " stdout P xxx", " stdout P end\n"} {
		if !strings.Contains(text, want) {
			b.Errorf("no %q in the log", want)
		}
	}
	b.equal("x in the log", strings.Count(text, "x"), 40000)

	// What is said right before the end is kept.
	w = b.Workload("much", "i=0; while [ $i -lt 2000 ]; do echo line $i; i=$((i+1)); done")
	b.equal("lines", strings.Count(b.Output(w), "\n"), 2000)
}

func users(b *Bench) {
	for i, c := range []struct {
		user   string
		groups []int64
		want   string
	}{
		{"", nil, "0 0 0"},
		{"app", nil, "1000 1000 1000 2000"},
		{"app:extra", []int64{3000}, "1000 2000 2000 3000"},
		{"1000", []int64{3000}, "1000 1000 1000 2000 3000"},
		{"4711:4712", nil, "4711 4712 4712"},
	} {
		w := b.Workload(fmt.Sprintf("user%d", i), "echo $(id -u) $(id -g) $(id -G | tr ' ' '\\n' | sort -n)")
		w.User, w.Groups = c.user, c.groups
		b.equal(c.user, strings.TrimSpace(b.Output(w)), c.want)
	}
	w := b.Workload("only", "id -G")
	w.User, w.Groups, w.OnlyGroups = "app", []int64{3000}, true
	b.equal("only the groups asked for", strings.TrimSpace(b.Output(w)), "1000 3000")
	if u := b.Find(w.ID).User; u == nil || u.UID != 1000 || u.GID != 1000 || !slices.Equal(u.Groups, []int64{1000, 3000}) {
		b.Errorf("user of the status: %s", Show(b.Find(w.ID)))
	}
	for i, user := range []string{"", "root", "0", "nobody-has-this-name"} {
		w := b.Workload(fmt.Sprintf("root%d", i), "true")
		w.User, w.RequireNonRoot = user, true
		if _, err := b.Runtime.Start(b.Ctx, w); !errors.Is(err, runtime.ErrRunsAsRoot) {
			b.Errorf("must not be root, user %q: %v", user, err)
		}
	}
	w = b.Workload("nobody", "true")
	w.User = "nobody-has-this-name"
	if _, err := b.Runtime.Start(b.Ctx, w); !errors.Is(err, runtime.ErrInvalid) {
		b.Errorf("unknown user: %v", err)
	}
	// Its output belongs to it: /dev/stdout can be opened again.
	w = b.Workload("reopen", "echo again > /dev/stdout; echo again > /proc/self/fd/2")
	w.User = "app"
	b.equal("reopened", b.Output(w), "again\nagain\n")
}

func environment(b *Bench) {
	w := b.Workload("env", `echo "$GREETING $HOME $PWD"; case $PATH in *:/bin*) echo path;; esac; [ -n "$HOSTNAME" ] && echo hostname`)
	w.Env, w.Dir, w.User = []string{"GREETING=hello world"}, "/made/for/me", "app"
	b.equal("said", b.Output(w), "hello world /home/app /made/for/me\npath\nhostname\n")
}

func cannotStart(b *Bench) {
	for i, c := range []struct {
		args []string
		dir  string
		says string
	}{
		{[]string{"no-such-program"}, "", `no-such-program.* not found in \$PATH`},
		{[]string{"/no/such/program"}, "", "(?i)no such file or directory"},
		{[]string{"/etc/passwd"}, "", "(?i)permission denied"},
		{nil, "", "no command"},
		{[]string{"/bin/sh"}, "not/absolute", "not an absolute path"},
	} {
		w := b.Workload(fmt.Sprintf("bad%d", i), "")
		w.Args, w.Dir = c.args, c.dir
		_, err := b.Runtime.Start(b.Ctx, w)
		if !errors.Is(err, runtime.ErrInvalid) || !regexp.MustCompile(c.says).MatchString(err.Error()) {
			b.Errorf("%q: %v, want one that says %q", c.args, err, c.says)
		}
	}
	list, err := b.Runtime.List(b.Ctx)
	b.must(err)
	for _, s := range list {
		if s.Pod == b.Pod.ID {
			b.Errorf("%s is listed", s.ID)
		}
	}
	// A failed start can be repeated once its cause has gone.
	b.equal("then", b.Output(b.Workload("bad0", "echo good")), "good\n")
}

func mounts(b *Bench) {
	source, inner := b.TempDir(), b.TempDir()
	b.must(os.WriteFile(filepath.Join(inner, "inner"), []byte("below\n"), 0o644))
	b.must(os.WriteFile(filepath.Join(source, "file"), []byte("content\n"), 0o644))
	w := b.Workload("mounts", `
		cat /rw/file /ro/file /etc/one
		echo new > /rw/new && echo written
		echo new > /ro/new || echo refused
		cat /rw/deeper/inner`)
	w.Mounts = []runtime.Mount{
		{Source: inner, Target: "/rw/deeper", ReadOnly: true},
		{Source: source, Target: "/rw"},
		{Source: source, Target: "/ro", ReadOnly: true},
		{Source: filepath.Join(source, "file"), Target: "/etc/one"},
	}
	b.must(os.Mkdir(filepath.Join(source, "deeper"), 0o755))
	out := b.Output(w)
	for _, want := range []string{"written\n", "refused\n", "below\n"} {
		if !strings.Contains(out, want) {
			b.Errorf("output has no %q: %q", want, out)
		}
	}
	b.equal("files read", strings.Count(out, "content\n"), 3)
	w = b.Workload("missing", "true")
	w.Mounts = []runtime.Mount{{Source: filepath.Join(source, "missing"), Target: "/x"}}
	if _, err := b.Runtime.Start(b.Ctx, w); !errors.Is(err, runtime.ErrInvalid) {
		b.Errorf("missing source: %v", err)
	}
}

func readOnlyRoot(b *Bench) {
	w := b.Workload("ro", "echo x > /file || echo refused; echo x > /dev/shm/file && echo shm")
	w.ReadOnlyRoot = true
	if out := b.Output(w); !strings.Contains(out, "refused\n") || !strings.Contains(out, "shm\n") {
		b.Errorf("output %q", out)
	}
}

func freshLayer(b *Bench) {
	w := b.Workload("fresh", "cat /file; echo old > /file")
	b.Output(w)
	w.Attempt++
	if out := b.Output(w); strings.Contains(out, "old") {
		b.Errorf("the second attempt sees the first's file: %q", out)
	}
	if _, err := os.Stat(filepath.Join(Layer, "file")); err == nil {
		b.Error("a file was written to the image")
	}
}

func limits(b *Bench) {
	const show = `cd /sys/fs/cgroup; if [ -e cgroup.controllers ]
		then cat memory.max cpu.max cpu.weight pids.max
		else cat memory/memory.limit_in_bytes; echo $(cat cpu/cpu.cfs_quota_us cpu/cpu.cfs_period_us); cat cpu/cpu.shares pids/pids.max
		fi; `
	w := b.Workload("limits", show+"sleep 1000")
	w.Resources = runtime.Resources{Memory: 64 << 20, CPUShares: 512, CPUQuota: 50000, CPUPeriod: 100000, Pids: 100}
	b.Start(w)
	b.AwaitLog(w, "67108864\n50000 100000\n"+weight(512)+"\n100\n")
	b.must(b.Runtime.Update(b.Ctx, w.ID, runtime.Resources{Memory: 128 << 20, CPUShares: 1024}))
	var out bytes.Buffer
	code, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{
		Args:    []string{"sh", "-c", show},
		Streams: runtime.Streams{Stdout: &out},
	})
	b.must(err)
	b.equal("limit", fmt.Sprint(code, " ", out.String()), "0 134217728\n50000 100000\n"+weight(1024)+"\n100\n")
	stats, err := b.Runtime.Stats(b.Ctx, w.ID)
	b.must(err)
	if stats.Memory <= 0 || stats.CPU <= 0 || stats.Processes < 1 || stats.Time.IsZero() {
		b.Errorf("stats %+v", stats)
	}
}

func outOfMemory(b *Bench) {
	w := b.Workload("hungry", "x=x; while :; do x=$x$x; done")
	w.Resources = runtime.Resources{Memory: 32 << 20}
	b.Start(w)
	s := b.Wait(w.ID)
	if !s.OOMKilled || s.ExitCode != 137 {
		b.Errorf("status %s", Show(s))
	}
	if !unified() {
		return
	}
	// A container is one thing: when a part of it is hungry, all of it goes.
	w = b.Workload("parent", "sh -c 'x=x; while :; do x=$x$x; done'; sleep 1000")
	w.Resources = runtime.Resources{Memory: 32 << 20}
	b.Start(w)
	if s := b.Wait(w.ID); !s.OOMKilled || s.ExitCode != 137 {
		b.Errorf("status of the parent: %s", Show(s))
	}
}

func oomScore(b *Bench) {
	w := b.Workload("main", "cat /proc/self/oom_score_adj; sleep 1000")
	score := 500
	w.OOMScoreAdj = &score
	b.Start(w)
	b.AwaitLog(w, "500\n")
	var out bytes.Buffer
	_, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"cat", "/proc/self/oom_score_adj"}, Streams: runtime.Streams{Stdout: &out}})
	b.must(err)
	b.equal("score of an exec", out.String(), "500\n")
}

// unified tells whether the machine has control groups of version 2 only.
func unified() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// weight is what the kernel shows for CPU shares of version 1.
func weight(shares uint64) string {
	if unified() {
		shares = cgroups.ConvertCPUSharesToCgroupV2Value(shares)
	}
	return fmt.Sprint(shares)
}

func execs(b *Bench) {
	w := b.Workload("main", "export X=not-seen; sleep 1000")
	w.Env, w.User, w.Dir = []string{"GREETING=hello"}, "app", "/tmp"
	b.Start(w)
	for _, c := range []struct {
		args             []string
		in, out, err     string
		code             int
		noStdin, invalid bool
	}{
		{args: []string{"sh", "-c", "echo $GREETING $(id -u) $PWD; echo bad >&2; exit 5"}, out: "hello 1000 /tmp\n", err: "bad\n", code: 5},
		{args: []string{"cat"}, in: "from stdin", out: "from stdin"},
		{args: []string{"cat"}, in: strings.Repeat("much ", 100000), out: strings.Repeat("much ", 100000)},
		{args: []string{"cat"}, noStdin: true},
		{args: []string{"sh", "-c", "kill -9 $$"}, code: 137},
		{args: []string{"sh", "-c", "sleep 1000 & echo parent"}, out: "parent\n"},
		{args: []string{"no-such-program"}, invalid: true},
	} {
		var out, errout bytes.Buffer
		s := runtime.Streams{Stdin: strings.NewReader(c.in), Stdout: &out, Stderr: &errout}
		if c.noStdin {
			s.Stdin = nil
		}
		code, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: c.args, Streams: s})
		if c.invalid {
			if !errors.Is(err, runtime.ErrInvalid) {
				b.Errorf("%q: %v", c.args, err)
			}
			continue
		}
		b.must(err)
		if code != c.code || out.String() != c.out || errout.String() != c.err {
			b.Errorf("%.60q: code %d, out %.60q, err %.60q", c.args, code, out.String(), errout.String())
		}
	}
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGKILL))
	b.Wait(w.ID)
	if _, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"true"}}); !errors.Is(err, runtime.ErrNotRunning) {
		b.Errorf("exec after the end: %v", err)
	}
}

func execTerminal(b *Bench) {
	w := b.Workload("main", "sleep 1000")
	b.Start(w)
	in, typed := io.Pipe()
	screen := newScreen()
	sizes := make(chan runtime.Size, 1)
	sizes <- runtime.Size{Width: 81, Height: 25}
	done := make(chan int, 1)
	go func() {
		code, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"sh"},
			Streams: runtime.Streams{Stdin: in, Stdout: screen, TTY: true, Resize: sizes}})
		if err != nil {
			b.Error(err)
		}
		done <- code
	}()
	fmt.Fprintln(typed, "tty; stty size")
	screen.await(b, "/dev/pts/")
	screen.await(b, "25 81")
	sizes <- runtime.Size{Width: 100, Height: 40}
	fmt.Fprintln(typed, "while [ \"$(stty size)\" != '40 100' ]; do :; done; echo re''sized; exit 9")
	screen.await(b, "resized")
	select {
	case code := <-done:
		b.equal("code", code, 9)
	case <-time.After(patience):
		b.Fatal("exec did not end")
	}
	typed.Close()
}

func execCancelled(b *Bench) {
	w := b.Workload("main", "sleep 1000")
	b.Start(w)
	ctx, cancel := context.WithCancel(b.Ctx)
	screen := newScreen()
	done := make(chan error, 1)
	go func() {
		_, err := b.Runtime.Exec(ctx, w.ID, runtime.Exec{Args: []string{"sh", "-c", "echo up; exec sleep 987"}, Streams: runtime.Streams{Stdout: screen}})
		done <- err
	}()
	screen.await(b, "up")
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		b.Errorf("cancelled exec: %v", err)
	}
	// It has gone, not only been left alone.
	deadline := time.Now().Add(patience)
	for {
		var out bytes.Buffer
		if _, err := b.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"ps"}, Streams: runtime.Streams{Stdout: &out}}); err != nil {
			b.Fatal(err)
		}
		if !strings.Contains(out.String(), "sleep 987") {
			return
		}
		if time.Now().After(deadline) {
			b.Fatalf("it still runs: %s", out.String())
		}
	}
}

func attach(b *Bench) {
	w := b.Workload("main", `echo early; while read line; do echo "got $line"; echo "err $line" >&2; done; echo end`)
	w.Stdin, w.StdinOnce = true, true
	b.Start(w)
	in, typed := io.Pipe()
	out, errout := newScreen(), newScreen()
	done := make(chan error, 1)
	go func() {
		done <- b.Runtime.Attach(b.Ctx, w.ID, runtime.Streams{Stdin: in, Stdout: out, Stderr: errout})
	}()
	fmt.Fprintln(typed, "one")
	out.await(b, "got one\n")
	errout.await(b, "err one\n")
	typed.Close() // StdinOnce: the workload sees the end
	select {
	case err := <-done:
		b.must(err)
	case <-time.After(patience):
		b.Fatal("attach did not end")
	}
	out.await(b, "end\n")
	b.equal("code", b.Wait(w.ID).ExitCode, 0)
	if log := b.Log(w); !strings.Contains(log, "got one\n") || !strings.Contains(log, "end\n") {
		b.Errorf("log %q", log)
	}

	// Without StdinOnce it stays open for the next.
	w = b.Workload("stays", `while read line; do echo "got $line"; done`)
	w.Stdin = true
	b.Start(w)
	for i := range 2 {
		ctx, cancel := context.WithCancel(b.Ctx)
		out := newScreen()
		go func() {
			done <- b.Runtime.Attach(ctx, w.ID, runtime.Streams{Stdin: strings.NewReader(fmt.Sprintln("line", i)), Stdout: out})
		}()
		out.await(b, fmt.Sprintf("got line %d\n", i))
		cancel()
		<-done
	}
	b.equal("state", b.Find(w.ID).State, runtime.Running)
}

func attachTerminal(b *Bench) {
	w := b.Workload("tty", `tty; while read line; do echo "got $line $(stty size)"; done`)
	w.TTY, w.Stdin = true, true
	b.Start(w)
	in, typed := io.Pipe()
	defer typed.Close()
	screen := newScreen()
	sizes := make(chan runtime.Size, 1)
	sizes <- runtime.Size{Width: 90, Height: 30}
	ctx, cancel := context.WithCancel(b.Ctx)
	done := make(chan error, 1)
	go func() {
		done <- b.Runtime.Attach(ctx, w.ID, runtime.Streams{Stdin: in, Stdout: screen, TTY: true, Resize: sizes})
	}()
	for deadline := time.Now().Add(patience); !strings.Contains(screen.text(), "30 90"); {
		if time.Now().After(deadline) {
			b.Fatalf("size never came: %q", screen.text())
		}
		fmt.Fprintln(typed, "typed")
		screen.next()
	}
	screen.await(b, "got typed")
	cancel()
	<-done
	b.AwaitLog(w, "/dev/pts/")
	b.equal("state", b.Find(w.ID).State, runtime.Running)
}

func sharePID(b *Bench) {
	shared := b.Machine.Bench(runtime.Pod{SharePID: true})
	one := shared.Workload("one", "sleep 1234")
	shared.Start(one)
	two := shared.Workload("two", "ps; echo mine $$; sleep 5678 & kill -9 $$")
	out := shared.Output(two)
	if !strings.Contains(out, "sleep 1234") || strings.Contains(out, "mine 1\n") {
		b.Errorf("the other container is not seen: %q", out)
	}
	// What the container left behind goes with it, the other one stays.
	var seen bytes.Buffer
	if _, err := shared.Runtime.Exec(shared.Ctx, one.ID, runtime.Exec{Args: []string{"ps"}, Streams: runtime.Streams{Stdout: &seen}}); err != nil {
		b.Fatal(err)
	}
	if strings.Contains(seen.String(), "sleep 5678") || !strings.Contains(seen.String(), "sleep 1234") {
		b.Errorf("processes: %s", seen.String())
	}
	list, err := shared.Runtime.List(shared.Ctx)
	b.must(err)
	for _, s := range list {
		if s.Pod == shared.Pod.ID && s.Name != "one" && s.Name != "two" {
			b.Errorf("%+v is listed", s)
		}
	}
}

func ownNetwork(b *Bench) {
	own := b.Machine.Bench(runtime.Pod{NetNS: NetNS(b.TB), Sysctls: map[string]string{"net.ipv4.ip_unprivileged_port_start": "81"}})
	out := own.Output(own.Workload("main", "cat /proc/sys/net/ipv4/ip_unprivileged_port_start; readlink /proc/self/ns/net; ls /sys/class/net"))
	if lines := strings.Split(out, "\n"); lines[0] != "81" || lines[1] == self(b, "net") || lines[2] != "lo" {
		b.Errorf("own network: %q", out)
	}
}

func ownHostName(b *Bench) {
	own := b.Machine.Bench(runtime.Pod{NetNS: NetNS(b.TB), Hostname: "its-own"})
	b.equal("host name", own.Output(own.Workload("main", "hostname")), "its-own\n")
}

// Of a pod's own are its shared memory and semaphores, for all its containers.
func ownIPC(b *Bench) {
	own := b.Machine.Bench(runtime.Pod{NetNS: NetNS(b.TB), Sysctls: map[string]string{"kernel.shm_rmid_forced": "1"}})
	out := own.Output(own.Workload("one", "cat /proc/sys/kernel/shm_rmid_forced; touch /dev/shm/shared; ls /dev/shm; readlink /proc/self/ns/ipc"))
	ipc, ok := strings.CutPrefix(out, "1\nshared\n")
	if !ok || strings.TrimSpace(ipc) == self(b, "ipc") {
		b.Errorf("first container: %q", out)
	}
	b.equal("second container", own.Output(own.Workload("two", "ls /dev/shm; readlink /proc/self/ns/ipc")), "shared\n"+ipc)
}

func ownProcesses(b *Bench) {
	out := b.Output(b.Workload("main", "echo mine $$; readlink /proc/self/ns/pid"))
	if pid, ok := strings.CutPrefix(out, "mine 1\n"); !ok || strings.TrimSpace(pid) == self(b, "pid") {
		b.Errorf("output %q", out)
	}
}

// self names a namespace of this process.
func self(b *Bench, kind string) string {
	link, err := os.Readlink("/proc/self/ns/" + kind)
	b.must(err)
	return link
}

func joinPID(b *Bench) {
	target := b.Workload("target", "sleep 1234")
	b.Start(target)
	guest := b.Workload("guest", "ps; echo mine $$; sleep 5678 & kill -9 $$")
	guest.JoinPID = &target.ID
	if out := b.Output(guest); !strings.Contains(out, "sleep 1234") || strings.Contains(out, "mine 1\n") {
		b.Errorf("the target is not seen: %q", out)
	}
	// What the guest left behind goes with it, the target stays.
	var seen bytes.Buffer
	if _, err := b.Runtime.Exec(b.Ctx, target.ID, runtime.Exec{Args: []string{"ps"}, Streams: runtime.Streams{Stdout: &seen}}); err != nil {
		b.Fatal(err)
	}
	if strings.Contains(seen.String(), "sleep 5678") || !strings.Contains(seen.String(), "sleep 1234") {
		b.Errorf("processes: %s", seen.String())
	}

	// A guest that stays takes programs in, and ends with its target.
	stays := b.Workload("stays", "sleep 4321")
	stays.JoinPID = &target.ID
	b.Start(stays)
	seen.Reset()
	if _, err := b.Runtime.Exec(b.Ctx, stays.ID, runtime.Exec{Args: []string{"ps"}, Streams: runtime.Streams{Stdout: &seen}}); err != nil {
		b.Fatal(err)
	}
	if !strings.Contains(seen.String(), "sleep 1234") {
		b.Errorf("a program in the guest sees %s", seen.String())
	}
	b.must(b.Runtime.Signal(b.Ctx, target.ID, syscall.SIGKILL))
	b.equal("the end of the guest", b.Wait(stays.ID).Signal, syscall.SIGKILL)

	b.Wait(target.ID)
	for name, c := range map[string]struct {
		target runtime.ID
		want   error
	}{
		"late":     {target.ID, runtime.ErrNotRunning},
		"lost":     {runtime.ID{Pod: b.Pod.ID, Name: "nobody"}, runtime.ErrNotFound},
		"stranger": {runtime.ID{Pod: "another", Name: "target"}, runtime.ErrInvalid},
	} {
		w := b.Workload(name, "true")
		w.JoinPID = &c.target
		if _, err := b.Runtime.Start(b.Ctx, w); !errors.Is(err, c.want) {
			b.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func closeKills(b *Bench) {
	for _, name := range []string{"one", "two"} {
		b.Start(b.Workload(name, "trap '' TERM; sleep 1000 & sleep 1000"))
	}
	for range 2 {
		b.must(b.Runtime.Close(b.Ctx, b.Pod.ID))
		list, err := b.Runtime.List(b.Ctx)
		b.must(err)
		for _, s := range list {
			if s.Pod == b.Pod.ID {
				b.Errorf("%s is listed", s.ID)
			}
		}
	}
	if _, err := b.Runtime.Start(b.Ctx, b.Workload("late", "true")); !errors.Is(err, runtime.ErrNotFound) {
		b.Errorf("start in a closed pod: %v", err)
	}
	ground, again := b.open(), b.open()
	b.equal("ground that was there", again, ground)
	if ground == "" || ground == b.Ground {
		b.Errorf("ground %q after %q", ground, b.Ground)
	}
	b.equal("in the pod opened again", b.Output(b.Workload("one", "echo anew")), "anew\n")
}

func watch(b *Bench) {
	ctx, cancel := context.WithCancel(b.Ctx)
	defer cancel()
	changes, err := b.Runtime.Watch(ctx)
	b.must(err)
	w := b.Workload("watched", "exit 4")
	w.Labels = map[string]string{"some.dev/label": "value"}
	b.Start(w)
	timeout := time.After(patience)
	for exited := false; !exited; {
		select {
		case s, ok := <-changes:
			if !ok {
				b.Fatal("watch was closed")
			}
			if s.ID != w.ID {
				continue
			}
			if s.Labels["some.dev/label"] != "value" || s.Log != w.Log || s.StopSignal != w.StopSignal {
				b.Errorf("status %s", Show(s))
			}
			if exited = s.State == runtime.Exited; exited {
				b.equal("code", s.ExitCode, 4)
			}
		case <-timeout:
			b.Fatal("no exit was told")
		}
	}
	cancel()
	for range changes { // ends
	}
	list, err := b.Runtime.List(b.Ctx)
	b.must(err)
	if !slices.IsSortedFunc(list, func(a, c runtime.Status) int { return strings.Compare(a.ID.String(), c.ID.String()) }) {
		b.Error("list is not sorted")
	}
}

func remove(b *Bench) {
	w := b.Workload("main", "echo kept; sleep 1000")
	b.Start(w)
	b.AwaitLog(w, "kept")
	if err := b.Runtime.Remove(b.Ctx, w.ID); err == nil {
		b.Error("a running workload was removed")
	}
	b.must(b.Runtime.Signal(b.Ctx, w.ID, syscall.SIGKILL))
	b.Wait(w.ID)
	for range 2 {
		b.must(b.Runtime.Remove(b.Ctx, w.ID))
	}
	b.equal("log", b.Log(w), "kept\n")
	b.must(b.Runtime.Remove(b.Ctx, runtime.ID{Pod: b.Pod.ID, Name: "never"}))
}

func unknown(b *Bench) {
	id := runtime.ID{Pod: b.Pod.ID, Name: "never"}
	_, execErr := b.Runtime.Exec(b.Ctx, id, runtime.Exec{Args: []string{"true"}})
	_, statsErr := b.Runtime.Stats(b.Ctx, id)
	for what, err := range map[string]error{
		"signal": b.Runtime.Signal(b.Ctx, id, syscall.SIGTERM),
		"update": b.Runtime.Update(b.Ctx, id, runtime.Resources{}),
		"attach": b.Runtime.Attach(b.Ctx, id, runtime.Streams{}),
		"exec":   execErr,
		"stats":  statsErr,
	} {
		if !errors.Is(err, runtime.ErrNotFound) {
			b.Errorf("%s: %v", what, err)
		}
	}
	b.must(b.Runtime.Close(b.Ctx, "never-opened"))
}

// screen keeps what is written to it and lets tests wait for it.
type screen struct {
	mu      sync.Mutex
	buf     bytes.Buffer
	changed chan struct{}
}

func newScreen() *screen { return &screen{changed: make(chan struct{}, 1)} }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer func() {
		select {
		case s.changed <- struct{}{}:
		default:
		}
	}()
	return s.buf.Write(p)
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.buf.String()
}

// next waits for something new, a little.
func (s *screen) next() {
	select {
	case <-s.changed:
	case <-time.After(100 * time.Millisecond):
	}
}

func (s *screen) await(b *Bench, text string) {
	b.Helper()
	timeout := time.After(patience)
	for !strings.Contains(s.text(), text) {
		select {
		case <-s.changed:
		case <-timeout:
			b.Fatalf("screen has no %q: %q", text, s.text())
		}
	}
}
