//go:build cgo

package server

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/process"
)

// inProcess is libcontainer within the keeper, which saves starting a program.
type inProcess struct{ dir string }

func (e inProcess) start(w *workload, _ *specs.Spec, config *configs.Config, p *proc) (int, error) {
	process := newProcess(p)
	process.Init = true
	container, err := libcontainer.Create(e.dir, w.rec.ID, config)
	if err != nil {
		return 0, fmt.Errorf("create container: %w", err)
	}
	pid, err := begin(w, container, process)
	if err != nil {
		// A container that got as far as waiting for its start is killed.
		if p, perr := process.Pid(); perr == nil && p > 0 {
			_ = process.Signal(unix.SIGKILL)
			_, _ = process.Wait()
		}
		_ = container.Destroy()
	}
	return pid, err
}

func run(container *libcontainer.Container, process *libcontainer.Process) (int, error) {
	if err := container.Run(process); err != nil {
		return 0, err
	}
	return process.Pid()
}

// begin makes a container's first process, records it and only then lets the
// workload's program begin: what has begun is on record, so that no keeper
// begins it again.
func begin(w *workload, container *libcontainer.Container, first *libcontainer.Process) (pid int, err error) {
	if err := container.Start(first); err != nil {
		return 0, err
	}
	if pid, err = first.Pid(); err == nil {
		err = w.recordCreated(pid)
	}
	if err == nil {
		err = container.Exec()
	}
	return pid, err
}

// started tells whether the program was let begin, that is, whether its process
// does not wait for it any more. One that has ended since may have run.
func (e inProcess) started(w *workload) bool {
	if w.rec.Phase != created || w.rec.Boot != bootID() {
		return false
	}
	if _, err := os.Stat(filepath.Join(e.dir, w.rec.ID, "exec.fifo")); err != nil {
		return true
	}
	// The program is executed before the FIFO is removed.
	name, err := os.ReadFile("/proc/" + strconv.Itoa(w.rec.PID) + "/comm")
	if err != nil || !bytes.HasPrefix(name, []byte("runc:[")) {
		return true
	}
	began, err := process.StartTicks(w.rec.PID)
	return err != nil || began != w.rec.StartTicks
}

func (e inProcess) exec(w *workload, p *proc) (int, error) {
	container, err := libcontainer.Load(e.dir, w.rec.ID)
	if err != nil {
		return 0, fmt.Errorf("load container: %w", err)
	}
	config := container.Config()
	root := rootOf(&config)
	for _, f := range []*os.File{p.stdin, p.stdout, p.stderr} {
		if f == nil {
			continue
		}
		if err := root.own(f); err != nil {
			return 0, err
		}
	}
	return run(container, newProcess(p))
}

func (e inProcess) remove(w *workload) error { return os.RemoveAll(filepath.Join(e.dir, w.rec.ID)) }

func newProcess(p *proc) *libcontainer.Process {
	process := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile,
		Label:           p.SelinuxLabel,
		ConsoleSocket:   p.console,
	}
	// A nil file is not a nil stream.
	if p.stdin != nil {
		process.Stdin = p.stdin
	}
	if p.stdout != nil {
		process.Stdout = p.stdout
	}
	if p.stderr != nil {
		process.Stderr = p.stderr
	}
	for _, g := range p.User.AdditionalGids {
		process.AdditionalGroups = append(process.AdditionalGroups, int(g))
	}
	if c := p.Capabilities; c != nil {
		process.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Permitted: c.Permitted,
			Inheritable: c.Inheritable, Ambient: c.Ambient,
		}
	}
	if p.ConsoleSize != nil {
		process.ConsoleWidth, process.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	return process
}
