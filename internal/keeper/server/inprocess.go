//go:build cgo

package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
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
	pid, err := run(container, process)
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

func (e inProcess) started(w *workload) bool {
	var state struct {
		Pid   int    `json:"init_process_pid"`
		Start uint64 `json:"init_process_start"`
	}
	data, err := os.ReadFile(filepath.Join(e.dir, w.rec.ID, "state.json"))
	if err != nil || json.Unmarshal(data, &state) != nil || w.rec.Boot != bootID() {
		return false
	}
	w.rec.PID, w.rec.StartTicks = state.Pid, state.Start
	if _, err := os.Stat(filepath.Join(e.dir, w.rec.ID, "exec.fifo")); err != nil {
		return true
	}
	// The program is executed before the FIFO is removed.
	name, err := os.ReadFile("/proc/" + strconv.Itoa(state.Pid) + "/comm")
	return err == nil && !bytes.HasPrefix(name, []byte("runc:["))
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
