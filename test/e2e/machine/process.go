package machine

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is one process of a machine.
type Process struct {
	PID    int // as the host sees it
	Inside int // as the machine sees it
	Args   []string
	Cgroup string // of the memory controller, or the unified one
}

// Name is the last element of the program's path as it was called.
func (p Process) Name() string {
	if len(p.Args) == 0 {
		return ""
	}
	return filepath.Base(p.Args[0])
}

// Processes lists what runs on the machine, in pods too, but not process 1.
func (m *Machine) Processes() ([]Process, error) {
	files, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		return nil, err
	}
	own := m.inside.pid()
	depth := 0
	var all []Process
	for _, f := range append([]string{fmt.Sprintf("/proc/%d/status", own)}, files...) {
		dir := filepath.Dir(f)
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		status, err := os.ReadFile(f)
		if err != nil {
			continue // it has gone
		}
		ids := strings.Fields(field(status, "NSpid"))
		if pid == own {
			depth = len(ids)
			continue
		}
		// A descendant namespace has more numbers; whose descendant it is
		// shows in its ancestors.
		if len(ids) < depth || strings.HasPrefix(field(status, "State"), "Z") || !m.descends(pid) {
			continue
		}
		args, err := os.ReadFile(dir + "/cmdline")
		if err != nil || len(args) == 0 {
			continue
		}
		inside, _ := strconv.Atoi(ids[depth-1])
		all = append(all, Process{
			PID: pid, Inside: inside, Cgroup: cgroup(pid),
			Args: strings.Split(strings.TrimSuffix(string(args), "\x00"), "\x00"),
		})
	}
	return all, nil
}

// descends tells whether a process is on this machine by its ancestors: the
// first process of a machine adopts every orphan on it, and what was started
// through nsenter is in its process namespace directly.
func (m *Machine) descends(pid int) bool {
	own, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.inside.pid()))
	if err != nil {
		return false
	}
	for pid > 1 {
		if pid == m.inside.pid() {
			return true
		}
		if ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid)); err == nil && ns == own {
			return true
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return false
		}
		if pid, err = strconv.Atoi(field(status, "PPid")); err != nil {
			return false
		}
	}
	return false
}

func field(status []byte, name string) string {
	for line := range bytes.Lines(status) {
		if key, value, ok := strings.Cut(string(line), ":"); ok && key == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

func cgroup(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	unified := ""
	for line := range strings.Lines(string(data)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		if parts[1] == "memory" {
			return parts[2]
		}
		if parts[1] == "" {
			unified = parts[2]
		}
	}
	return unified
}

// Server finds the process of tutti server, Keeper that of the keeper.
func (m *Machine) Server() (Process, error) {
	return m.find("tutti server", func(p Process) bool {
		return p.Name() == "tutti" && slices.Contains(p.Args[1:], "server")
	})
}

// Keeper finds the process of the keeper.
func (m *Machine) Keeper() (Process, error) {
	return m.find("the keeper", func(p Process) bool {
		// Its other lives, "init", "check" and "pause", have no directory.
		return strings.HasPrefix(p.Name(), "tutti-keeper") && slices.Contains(p.Args, "--dir")
	})
}

func (m *Machine) find(what string, is func(Process) bool) (Process, error) {
	all, err := m.Processes()
	if err != nil {
		return Process{}, err
	}
	for _, p := range all {
		if is(p) {
			return p, nil
		}
	}
	return Process{}, fmt.Errorf("%s does not run", what)
}

// Kill sends SIGKILL and returns when the process has gone.
func (p Process) Kill() error {
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		return fmt.Errorf("kill %s: %w", p.Name(), err)
	}
	for deadline := time.Now().Add(10 * time.Second); p.Running(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%s survives SIGKILL", p.Name())
		}
	}
	return nil
}

// Running says whether the process is there and is no zombie.
func (p Process) Running() bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID))
	return err == nil && !strings.HasPrefix(field(status, "State"), "Z")
}

// Memory is what a process uses, in bytes. A page shared by n processes
// counts 1/n in PSS and whole in RSS.
type Memory struct {
	RSS, PSS, Anonymous int64
}

// Memory reads the process's smaps_rollup.
func (p Process) Memory() (Memory, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", p.PID))
	if err != nil {
		return Memory{}, fmt.Errorf("read the memory of %s: %w", p.Name(), err)
	}
	kb := func(name string) int64 {
		n, _ := strconv.ParseInt(strings.TrimSuffix(field(data, name), " kB"), 10, 64)
		return n << 10
	}
	return Memory{RSS: kb("Rss"), PSS: kb("Pss"), Anonymous: kb("Anonymous")}, nil
}
