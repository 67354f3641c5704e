// Package systemd makes tutti's server a service of its machine, and speaks to
// the service manager for both sides: for the commands that install, start and
// stop the service, and for the server that runs as one.
package systemd

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// module is how a build of tutti is told from another program of that name.
const module = "tutti.dev/tutti"

// Manager is a machine's service manager. A nil Manager has no service.
type Manager struct {
	// Root is what the paths of files stand below: "/", but for tests.
	Root string
	// Control runs systemctl and returns what it wrote.
	Control func(ctx context.Context, args ...string) (string, error)
}

// Machine is the service manager of this machine.
func Machine() *Manager {
	return &Manager{Root: "/", Control: func(ctx context.Context, args ...string) (string, error) {
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(ctx, "systemctl", append([]string{"--no-pager", "--no-ask-password"}, args...)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		if err := cmd.Run(); err != nil {
			said, _, _ := strings.Cut(strings.TrimSpace(errs.String()), "\n")
			return strings.TrimSpace(out.String()), fmt.Errorf("systemctl %s: %w: %s", args[0], err, said)
		}
		return strings.TrimSpace(out.String()), nil
	}}
}

func (m *Manager) path(p string) string { return filepath.Join(m.Root, p) }

// Runs says whether systemd is this machine's service manager, which is what
// sd_booted(3) looks at.
func (m *Manager) Runs() bool {
	if m == nil {
		return false
	}
	info, err := os.Lstat(m.path("/run/systemd/system"))
	return err == nil && info.IsDir()
}

// Installed returns the data directory that the service is installed for, ""
// when it is not. A unit that is somebody else's is an error.
func (m *Manager) Installed() (dir string, err error) {
	if m == nil {
		return "", nil
	}
	if to, err := os.Readlink(m.path(File)); err == nil && to == os.DevNull {
		return "", fmt.Errorf("%s is masked; run `systemctl unmask tutti` first", Name)
	}
	text, err := os.ReadFile(m.path(File))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read the unit: %w", err)
	}
	if dir, err = dataDir(string(text)); err != nil {
		return "", fmt.Errorf("%s %w", File, err)
	}
	return dir, nil
}

// Install puts the program in its place and writes and enables the unit for a
// server of dir. It starts nothing. changed says whether the program or the
// unit is not what it was. It can be repeated, and nothing that another wrote
// is touched.
func (m *Manager) Install(ctx context.Context, program, dir string) (changed bool, err error) {
	text, err := unit(dir)
	if err != nil {
		return false, err
	}
	if _, err := m.Installed(); err != nil {
		return false, err
	}
	// A package's unit would be hidden by ours.
	if at, _ := m.Control(ctx, "show", "--property=FragmentPath", "--value", Name); at != "" && at != File {
		return false, fmt.Errorf("%s %w", at, errForeign)
	}
	if err := m.mine(Program); err != nil {
		return false, err
	}
	renewed, err := m.place(program)
	if err != nil {
		return false, fmt.Errorf("install %s: %w", Program, err)
	}
	rewritten, err := m.write(text)
	if err != nil {
		return false, fmt.Errorf("write %s: %w", File, err)
	}
	// Whatever an interrupted install left undone is done now.
	if _, err := m.Control(ctx, "daemon-reload"); err != nil {
		return false, err
	}
	if _, err := m.Control(ctx, "enable", "--quiet", Name); err != nil {
		return false, err
	}
	return renewed || rewritten, nil
}

// mine is an error when a path holds a program that is no build of tutti.
func (m *Manager) mine(path string) error {
	if _, err := os.Lstat(m.path(path)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	info, err := buildinfo.ReadFile(m.path(path))
	if err != nil || info.Main.Path != module {
		return fmt.Errorf("%s is another program of that name; move it away first", path)
	}
	return nil
}

// place copies the program, unless it is there already. The copy is made
// beside and renamed, so that the name always means a whole program, also one
// that runs; it is made there rather than moved there, so that it gets the
// directory's label.
func (m *Manager) place(program string) (changed bool, err error) {
	if same, err := sameContent(program, m.path(Program)); err != nil || same {
		return false, err
	}
	from, err := os.Open(program)
	if err != nil {
		return false, err
	}
	defer from.Close()
	return true, replace(m.path(Program), 0o755, from)
}

func (m *Manager) write(text string) (changed bool, err error) {
	old, err := os.ReadFile(m.path(File))
	if err == nil && string(old) == text {
		return false, nil
	}
	return true, replace(m.path(File), 0o644, strings.NewReader(text))
}

// replace writes a file beside and renames it.
func replace(path string, mode fs.FileMode, content io.Reader) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+".new"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = io.Copy(f, content)
	// What the umask took is given back.
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func sameContent(a, b string) (bool, error) {
	x, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer x.Close()
	y, err := os.Open(b)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer y.Close()
	p, q := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errX := io.ReadFull(x, p)
		k, errY := io.ReadFull(y, q)
		if !bytes.Equal(p[:n], q[:k]) {
			return false, nil
		}
		if errX != nil || errY != nil {
			return true, nil // equal so far, and one has ended: so has the other
		}
	}
}

// Uninstall removes the service, which does not run any more, with the changes
// that were made to it by drop-ins, and the program. The unit goes last: while
// it is there, Uninstall can be repeated.
func (m *Manager) Uninstall(ctx context.Context) error {
	if _, err := m.Control(ctx, "disable", "--quiet", Name); err != nil {
		return err
	}
	if m.mine(Program) == nil {
		if err := os.Remove(m.path(Program)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the program: %w", err)
		}
	}
	if err := os.RemoveAll(m.path(File + ".d")); err != nil {
		return fmt.Errorf("remove the unit's drop-ins: %w", err)
	}
	if err := os.Remove(m.path(File)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the unit: %w", err)
	}
	if _, err := m.Control(ctx, "daemon-reload"); err != nil {
		return err
	}
	_, _ = m.Control(ctx, "reset-failed", Name) // an error says that there is nothing to forget
	return nil
}

// Start starts the service and waits until it is ready; one that is already
// stays as it is.
func (m *Manager) Start(ctx context.Context) error { return m.begin(ctx, "start") }

// Restart ends the server if it runs, and starts it. Workloads go on.
func (m *Manager) Restart(ctx context.Context) error { return m.begin(ctx, "restart") }

func (m *Manager) begin(ctx context.Context, verb string) error {
	_, err := m.Control(ctx, verb, Name)
	if err == nil || ctx.Err() != nil {
		return err
	}
	// The server's last word says more than systemctl's.
	if said, _ := m.Control(ctx, "show", "--property=StatusText", "--value", Name); said != "" {
		return fmt.Errorf("the service does not start, and is tried again: %s", said)
	}
	return fmt.Errorf("the service does not start; `journalctl -u tutti` says why (%w)", err)
}

// Stop ends the server, or the attempts to start it. Workloads go on.
func (m *Manager) Stop(ctx context.Context) error {
	_, err := m.Control(ctx, "stop", Name)
	return err
}

// Outdated says whether the service runs a program that is not, or not any
// longer, the one in its place.
func (m *Manager) Outdated(ctx context.Context) bool {
	pid := m.PID(ctx)
	if pid == 0 {
		return false
	}
	runs, err := os.Stat(m.path(fmt.Sprintf("/proc/%d/exe", pid)))
	if err != nil {
		return false
	}
	is, err := os.Stat(m.path(Program))
	return err == nil && !os.SameFile(runs, is)
}

// PID is the server's process, 0 when the service does not run.
func (m *Manager) PID(ctx context.Context) int {
	said, _ := m.Control(ctx, "show", "--property=MainPID", "--value", Name)
	pid, _ := strconv.Atoi(said)
	return pid
}
