package systemd

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/test/golden"
)

func TestUnit(t *testing.T) {
	got, err := unit("/var/lib/tutti")
	if err != nil {
		t.Fatal(err)
	}
	golden.Check(t, "testdata/tutti.service", got)
}

// TestVerify asks systemd itself, where it is, what it makes of the unit.
func TestVerify(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("systemd-analyze is not installed")
	}
	for _, dir := range []string{"/var/lib/tutti", `/srv/50% of "a disk"/\x20`} {
		text, err := unit(dir)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), Name)
		// What it runs must be there.
		text = strings.Replace(text, "ExecStart="+Program, "ExecStart=/bin/true", 1)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(analyze, "verify", "--man=no", file).CombinedOutput(); err != nil || strings.Contains(string(out), Name) {
			t.Errorf("%s: %v: %s", dir, err, out)
		}
	}
}

func TestDataDir(t *testing.T) {
	for _, dir := range []string{"/var/lib/tutti", "/srv/a b", `/srv/100%/"x"\y'z`} {
		text, err := unit(dir)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := dataDir(text); err != nil || got != dir {
			t.Errorf("%s is read as %q, %v", dir, got, err)
		}
	}
	if _, err := unit("/srv/a\nExecStart=/bin/false"); err == nil {
		t.Error("a directory with a line break")
	}
	for _, text := range []string{"", "[Service]\nExecStart=/usr/bin/tutti\n", ours + "\n[Service]\n"} {
		if dir, err := dataDir(text); err == nil {
			t.Errorf("%q is for %q", text, dir)
		}
	}
}

// machine is a manager of files below a directory, with a systemctl that
// writes down what it is told.
type machine struct {
	*Manager
	calls []string
	says  map[string]string // by call
	fails string            // a verb
}

func newMachine(t *testing.T) *machine {
	m := &machine{says: map[string]string{}}
	m.Manager = &Manager{Root: t.TempDir(), Control: func(_ context.Context, args ...string) (string, error) {
		call := strings.Join(args, " ")
		m.calls = append(m.calls, call)
		if args[0] == m.fails {
			return "", errors.New("systemctl " + call + ": exit status 1")
		}
		return m.says[call], nil
	}}
	m.put(t, "/run/systemd/system/x", "")
	return m
}

func (m *machine) put(t *testing.T, path, text string) {
	t.Helper()
	path = m.path(path)
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o755)); err != nil {
		t.Fatal(err)
	}
}

// did are the calls that change something, since it was asked last.
func (m *machine) did() string {
	var changes []string
	for _, c := range m.calls {
		if !strings.HasPrefix(c, "show") {
			changes = append(changes, c)
		}
	}
	m.calls = nil
	return strings.Join(changes, ", ")
}

func (m *machine) files(t *testing.T) (all []string) {
	t.Helper()
	err := filepath.WalkDir(m.Root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			all = append(all, strings.TrimPrefix(path, m.Root))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// self is a build of this module.
func self(t *testing.T) string {
	t.Helper()
	path, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstall(t *testing.T) {
	m := newMachine(t)
	before := m.files(t)
	const dir = "/var/lib/tutti"
	if got, err := m.Installed(); err != nil || got != "" {
		t.Errorf("before: installed for %q, %v", got, err)
	}
	for i, want := range []bool{true, false} {
		changed, err := m.Install(t.Context(), self(t), dir)
		if err != nil || changed != want {
			t.Fatalf("install %d: changed %v, %v", i, changed, err)
		}
		if did := m.did(); did != "daemon-reload, enable --quiet tutti.service" {
			t.Errorf("install %d did %s", i, did)
		}
	}
	if got, err := m.Installed(); err != nil || got != dir {
		t.Errorf("installed for %q, %v", got, err)
	}
	if info, err := os.Stat(m.path(Program)); err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("the program: %v, %v", info.Mode(), err)
	}

	// A newer program, and a unit that somebody wrote in.
	newer := filepath.Join(t.TempDir(), "tutti")
	program, err := os.ReadFile(self(t))
	if err == nil {
		err = os.WriteFile(newer, append(program, "newer"...), 0o700)
	}
	if err != nil {
		t.Fatal(err)
	}
	runs, err := os.Open(m.path(Program))
	if err != nil {
		t.Fatal(err)
	}
	defer runs.Close()
	if changed, err := m.Install(t.Context(), newer, dir); err != nil || !changed {
		t.Errorf("a newer program: changed %v, %v", changed, err)
	}
	if was, _ := runs.Stat(); was.Size() != int64(len(program)) {
		t.Errorf("the program that runs was written over")
	}
	text, _ := unit(dir)
	m.put(t, File, text+"Nice=5\n")
	if changed, err := m.Install(t.Context(), newer, dir); err != nil || !changed {
		t.Errorf("a changed unit: changed %v, %v", changed, err)
	}

	m.did()
	m.put(t, File+".d/override.conf", "[Service]\nNice=5\n")
	if err := m.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if did := m.did(); did != "disable --quiet tutti.service, daemon-reload, reset-failed tutti.service" {
		t.Errorf("uninstall did %s", did)
	}
	if after := m.files(t); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("left: %q, before: %q", after, before)
	}
}

func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		name string
		with func(m *machine)
		says string
	}{
		{"somebody's unit", func(m *machine) { m.put(t, File, "[Service]\nExecStart=/bin/true\n") }, "was not written by `tutti install`"},
		{"a package's unit", func(m *machine) {
			m.says["show --property=FragmentPath --value tutti.service"] = "/lib/systemd/system/tutti.service"
		}, "/lib/systemd/system/tutti.service was not"},
		{"masked", func(m *machine) {
			m.put(t, File, "")
			if err := errors.Join(os.Remove(m.path(File)), os.Symlink(os.DevNull, m.path(File))); err != nil {
				t.Fatal(err)
			}
		}, "systemctl unmask tutti"},
		{"somebody's program", func(m *machine) { m.put(t, Program, "#!/bin/sh\n") }, "another program"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			c.with(m)
			before := m.files(t)
			if _, err := m.Install(t.Context(), self(t), "/var/lib/tutti"); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v", err)
			}
			if after := m.files(t); strings.Join(after, " ") != strings.Join(before, " ") || m.did() != "" {
				t.Errorf("changed: %q, before: %q", after, before)
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	m := newMachine(t)
	m.fails = "start"
	if err := m.Start(t.Context()); err == nil || !strings.Contains(err.Error(), "journalctl -u tutti") {
		t.Errorf("without a word: %v", err)
	}
	m.says["show --property=StatusText --value tutti.service"] = "tcp port 6443 is in use"
	if err := m.Start(t.Context()); err == nil || !strings.HasSuffix(err.Error(), ": tcp port 6443 is in use") {
		t.Errorf("with the server's word: %v", err)
	}
}

func TestSupervisor(t *testing.T) {
	Supervisor{}.Ready() // nobody listens
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	s := Supervised()
	if !s.Present() || Supervised().Present() {
		t.Error("the socket can be taken twice, or not at all")
	}
	s.Ready()
	s.Failed(errors.New("port 1\n  is in use"))
	s.Stopping(time.Minute)
	for _, want := range []string{"READY=1\nSTATUS=ready", "STATUS=port 1 is in use", "STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=60000000"} {
		b := make([]byte, 1000)
		_ = l.SetReadDeadline(time.Now().Add(10 * time.Second))
		n, err := l.Read(b)
		if err != nil || string(b[:n]) != want {
			t.Errorf("heard %q, want %q, %v", b[:n], want, err)
		}
	}
}

func TestNobody(t *testing.T) {
	var m *Manager
	if dir, err := m.Installed(); m.Runs() || dir != "" || err != nil {
		t.Errorf("runs %v, installed for %q, %v", m.Runs(), dir, err)
	}
	if m := (&Manager{Root: t.TempDir()}); m.Runs() {
		t.Error("systemd runs a machine without it")
	}
}
