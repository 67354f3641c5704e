package process

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// files are all of the machine but those of tests and of the kernel.
func files(t *testing.T) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if slices.Contains([]string{"/proc", "/sys", "/dev", "/tmp"}, path) {
			return fs.SkipDir
		}
		list = append(list, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func mounts(t *testing.T) int {
	t.Helper()
	list, err := mount.List()
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// said are the lines of a log but the complaints of programs.
func said(text string) string {
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(l string) bool { return strings.Contains(l, ": ") })
	return strings.Join(lines, " ")
}

// What a program writes goes where its root says, and what is mounted where the
// machine has nothing leaves nothing there.
func TestRoots(t *testing.T) {
	const script = `try() { echo $1 >$2 && echo $1; }
try etc /etc/new; try data /srv/data/new; try tmp /tmp/new; try vartmp /var/tmp/new; try run /run/new; try top /new
ls -d /run/somewhere /bin/sh; cat /etc/group | head -n 1; echo written >>/etc/app/conf/file; test -s /tmp/machine && echo machine
cat /volume/a/b/file /etc/app/conf/file /run/secrets/who/file /srv/other/one | grep volume; sleep 1000`
	volume := t.TempDir()
	if err := os.WriteFile("/tmp/machine", []byte("machine's\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/tmp/machine")
	for _, c := range []struct {
		root    runtime.MachineRoot
		strict  bool
		want    string
		changed []string // of the machine
		mounts  int
	}{
		{runtime.ReadOnlyRoot, false, "tmp vartmp run", nil, 0},
		{runtime.ReadOnlyRoot, true, "", nil, 0},
		{runtime.SharedRoot, false, "data tmp vartmp run", []string{"/srv/data/new", "/var/tmp/new"}, 0},
		{runtime.OverlayRoot, false, "etc data tmp vartmp run top", nil, 1},
	} {
		name := string(c.root)
		if c.strict {
			name += " without exceptions"
		}
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(volume, "file"), []byte("volume\n"), 0o644); err != nil {
				t.Fatal(err)
			}
			if list, err := mount.List(); err != nil || c.root == runtime.OverlayRoot && !overlaid("/", list[0]) {
				t.Skipf("the test's machine is on %s, which is no lower layer: %v", list[0].Type, err)
			}
			m := runtimetest.NewMachine(t, machines(c.root))
			b := m.Bench(runtime.Pod{})
			before, held := files(t), mounts(t)
			w := b.Workload("main", script)
			w.ReadOnlyRoot = c.strict
			w.Mounts = []runtime.Mount{
				{Source: volume, Target: "/volume/a/b"}, {Source: volume, Target: "/etc/app/conf"}, {Source: volume, Target: "/run/secrets/who"},
				{Source: filepath.Join(volume, "file"), Target: "/srv/other/one"},
			}
			b.Start(w)
			b.AwaitLog(w, "volume\nvolume\nvolume\nvolume\n")
			want := strings.TrimSpace(c.want + " /bin/sh /run/somewhere root:x:0: volume volume volume volume")
			if got := strings.Replace(said(b.Log(w)), " machine ", " ", 1); got != want {
				t.Errorf("it says %q, want %q in\n%s", got, want, b.Log(w))
			}
			if got := mounts(t) - held; got != c.mounts {
				t.Errorf("the machine has %d mounts more, want %d", got, c.mounts)
			}
			if err := m.Runtime.Signal(b.Ctx, w.ID, 9); err != nil {
				t.Fatal(err)
			}
			b.Wait(w.ID)
			if sees := strings.Contains(b.Log(w), "\nmachine\n"); sees != (c.root == runtime.SharedRoot || c.strict) {
				t.Errorf("the machine's /tmp is seen: %v", sees)
			}
			if data, err := os.ReadFile(filepath.Join(volume, "file")); err != nil || string(data) != "volume\nwritten\n" {
				t.Errorf("volume: %q %v", data, err)
			}
			changed := slices.DeleteFunc(files(t), func(f string) bool { return slices.Contains(before, f) })
			if !slices.Equal(changed, c.changed) {
				t.Errorf("the machine has %q, want %q", changed, c.changed)
			}
			for _, f := range append(c.changed, "/tmp/new") {
				os.Remove(f)
			}
			if err := m.Runtime.Remove(b.Ctx, w.ID); err != nil {
				t.Fatal(err)
			}
			if got := mounts(t) - held; got != 0 {
				t.Errorf("%d mounts are left", got)
			}
		})
	}
}

// What the machine has mounted is there as it is, and as it comes to be; what
// tutti has for other pods is not.
func TestMountsOfTheMachine(t *testing.T) {
	m := runtimetest.NewMachine(t, machines(runtime.ReadOnlyRoot))
	b := m.Bench(runtime.Pod{})
	if err := unix.Mount("disk", "/srv/data", "tmpfs", unix.MS_NOSUID, ""); err != nil {
		t.Fatal(err)
	}
	defer mount.Unmount("/srv/data")
	for _, d := range []string{"/srv/data/later", m.Dir + "/pods/other"} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := mount.Tmpfs(m.Dir+"/pods/other", 1<<16, 0o755); err != nil {
		t.Fatal(err)
	}
	defer mount.Unmount(m.Dir + "/pods/other")
	w := b.Workload("main", "sleep 1000")
	b.Start(w)
	if err := mount.Tmpfs("/srv/data/later", 1<<16, 0o755); err != nil {
		t.Fatal(err)
	}
	defer mount.Unmount("/srv/data/later")
	var out bytes.Buffer
	if _, err := m.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"cat", "/proc/self/mounts"}, Streams: runtime.Streams{Stdout: &out}}); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{" /srv/data tmpfs ro,nosuid,", " /srv/data/later tmpfs "} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q among\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "/pods/other ") {
		t.Errorf("another pod's mount is seen:\n%s", out.String())
	}
}

// What comes and goes on the machine while a program is started keeps it from
// nothing.
func TestMachineIsBusy(t *testing.T) {
	m := runtimetest.NewMachine(t, machines(runtime.ReadOnlyRoot))
	b := m.Bench(runtime.Pod{})
	ctx, stop := context.WithCancel(b.Ctx)
	var busy sync.WaitGroup
	defer busy.Wait()
	defer stop()
	busy.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			lock := fmt.Sprintf("/run/lock-%d", i%3)
			if err := os.WriteFile(lock, nil, 0o644); err != nil {
				t.Error(err)
			}
			time.Sleep(20 * time.Millisecond)
			os.Remove(lock)
			time.Sleep(20 * time.Millisecond)
		}
	})
	for i := range 20 {
		if out := b.Output(b.Workload(fmt.Sprintf("w%d", i), "echo here")); out != "here\n" {
			t.Errorf("it says %q", out)
		}
	}
}

// The directory that has all pods' secrets shows nothing of them.
func TestDataDirectoryIsHidden(t *testing.T) {
	m := runtimetest.NewMachine(t, machines(runtime.SharedRoot))
	b := m.Bench(runtime.Pod{})
	if out := b.Output(b.Workload("main", "ls -A "+m.Dir+"; echo end")); out != "end\n" {
		t.Errorf("it sees %q", out)
	}
	w := b.Workload("privileged", "ls -A "+m.Dir)
	w.Privileged = true
	if out := b.Output(w); !strings.Contains(out, "keeper\n") {
		t.Errorf("with all rights it sees %q", out)
	}
}

func TestRefusals(t *testing.T) {
	m := runtimetest.NewMachine(t, machines(runtime.SharedRoot))
	b := m.Bench(runtime.Pod{})
	crowd := "/srv/crowd"
	if err := os.Mkdir(crowd, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(crowd)
	for i := range maxEntries + 1 {
		if err := os.WriteFile(fmt.Sprint(crowd, "/", i), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range []struct {
		change func(*runtime.Workload)
		says   string
	}{
		{func(w *runtime.Workload) { w.Dir = "/srv/data/none" },
			"cannot start as specified: working directory /srv/data/none is not on this machine; make it, or mount a volume there"},
		{func(w *runtime.Workload) { w.Mounts = []runtime.Mount{{Source: "/etc", Target: "/srv/crowd/none"}} },
			"mount on /srv/crowd/none: cannot start as specified: it is not on this machine, and /srv/crowd has more than 1000 entries; make it, or annotate the pod with process.tutti.dev/root: overlay"},
		{func(w *runtime.Workload) {
			w.Mounts = []runtime.Mount{{Source: "/etc", Target: "/srv/data", Propagation: "rshared"}}
		}, "share mounts below /srv/data with the machine"},
		{func(w *runtime.Workload) { w.Machine = "other" }, `root "other" of the machine`},
	} {
		w := b.Workload(fmt.Sprintf("bad%d", i), "true")
		c.change(&w)
		if _, err := m.Runtime.Start(b.Ctx, w); !errors.Is(err, runtime.ErrInvalid) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("got %v, want one that says %q", err, c.says)
		}
	}
	if _, err := os.Stat("/srv/data/none"); err == nil {
		t.Error("the working directory was made on the machine")
	}
	for says, pod := range map[string]runtime.Pod{
		"with users of its own":                            {IDs: runtime.IDs{First: 1 << 20, Size: 1 << 16}},
		"set sysctl kernel.shm_rmid_forced of the machine": {Sysctls: map[string]string{"kernel.shm_rmid_forced": "1"}},
	} {
		pod.ID, pod.Cgroup = "refused", "burstable/refused"
		if _, err := m.Runtime.Open(b.Ctx, pod); !errors.Is(err, runtime.ErrInvalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("got %v, want one that says %q", err, says)
		}
	}
}

func TestSettings(t *testing.T) {
	nice := 7
	m := runtimetest.NewMachine(t, machines(runtime.ReadOnlyRoot))
	b := m.Bench(runtime.Pod{})
	const show = "ulimit -n; ulimit -Hn; cut -d' ' -f19 /proc/self/stat; ionice -p $$; grep NoNewPrivs /proc/self/status; cat /srv/secret; echo x >/tmp/x && echo tmp; ls /srv/data >/dev/null && echo srv"
	w := b.Workload("main", show+"; sleep 1000")
	w.Rlimits = []runtime.Rlimit{{Name: "RLIMIT_NOFILE", Soft: 100, Hard: 200}}
	w.Nice, w.IO = &nice, &runtime.IOPriority{Class: "idle"}
	w.Landlock = &runtime.Landlock{ReadOnly: []string{"/bin", "/etc", "/proc", "/srv/data"}, ReadWrite: []string{"/tmp", "/dev/null"}}
	if err := os.WriteFile("/srv/secret", []byte("secret\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove("/srv/secret")
	b.Start(w)
	b.AwaitLog(w, "srv\n")
	const want = "100 200 7 idle NoNewPrivs:\t1 tmp srv"
	if got := said(strings.ReplaceAll(b.Log(w), "idle: prio 7", "idle")); got != want {
		t.Errorf("it says %q, want %q in\n%s", got, want, b.Log(w))
	}
	// The same holds for what is run beside it.
	var out, complaints bytes.Buffer
	if _, err := m.Runtime.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"sh", "-c", show}, Streams: runtime.Streams{Stdout: &out, Stderr: &complaints}}); err != nil {
		t.Fatal(err)
	}
	if got := said(strings.ReplaceAll(out.String(), "idle: prio 7", "idle")); got != want {
		t.Errorf("beside it: %q, want %q; %s", got, want, &complaints)
	}

	w = b.Workload("nothing", "true")
	w.Landlock = &runtime.Landlock{ReadOnly: []string{"/etc"}}
	b.Start(w)
	if s := b.Wait(w.ID); s.ExitCode != 126 || !strings.Contains(b.Log(w), "may not be executed; add it, its interpreter and its libraries to ro=") {
		t.Errorf("it exits with %d and says %s", s.ExitCode, b.Log(w))
	}
}

func TestMemoryIsDumped(t *testing.T) {
	var most unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &most); err != nil {
		t.Fatal(err)
	}
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	if most.Max == 0 || len(bytes.TrimSpace(pattern)) == 0 {
		t.Skip("this machine dumps no memory")
	}
	m := runtimetest.NewMachine(t, machines(runtime.ReadOnlyRoot))
	b := m.Bench(runtime.Pod{})
	for _, dumps := range []bool{true, false} {
		w := b.Workload(fmt.Sprint("dumps-", dumps), "kill -SEGV $$")
		w.Dir = "/tmp"
		l := runtime.Rlimit{Name: "RLIMIT_CORE"}
		if dumps {
			l.Soft, l.Hard = most.Max, most.Max
		}
		w.Rlimits = []runtime.Rlimit{l}
		b.Start(w)
		s := b.Wait(w.ID)
		// A program that takes dumps is given them whatever the limit.
		if s.Signal != unix.SIGSEGV || s.ExitCode != 139 || s.CoreDumped != dumps && pattern[0] != '|' {
			t.Errorf("dumps: %v: %s", dumps, runtimetest.Show(s))
		}
	}
}

// Whatever a program leaves ends with it, however far it has gone.
func TestDescendants(t *testing.T) {
	m := runtimetest.NewMachine(t, machines(runtime.ReadOnlyRoot))
	b := m.Bench(runtime.Pod{})
	running := func(name string) bool { return len(runtimetest.Running(t, name)) > 0 }
	w := b.Workload("leaves", "for i in 1 2 3; do setsid sleep 4711 </dev/null >/dev/null 2>&1 & done; echo left; exit 3")
	b.Start(w)
	if s := b.Wait(w.ID); s.ExitCode != 3 {
		t.Errorf("status %s", runtimetest.Show(s))
	}
	if running("sleep 4711") {
		t.Error("processes outlive the first one")
	}
	w = b.Workload("forks", "trap '' TERM; i=0; while [ $i -lt 50 ]; do setsid sleep 4712 & i=$((i+1)); done; echo up; while :; do setsid sleep 0.01; done")
	b.Start(w)
	b.AwaitLog(w, "up")
	if !running("sleep 4712") {
		t.Error("nothing runs")
	}
	if err := m.Runtime.Signal(b.Ctx, w.ID, 9); err != nil {
		t.Fatal(err)
	}
	b.Wait(w.ID)
	if running("sleep 4712") {
		t.Error("processes outlive the workload")
	}
}
