//go:build cgo

package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// program is an OCI runtime with runc's command line. What it makes runs on
// without it and becomes a child of the keeper, a subreaper, when it has
// ended. All that it keeps is in a directory of the workload's own:
//
//	bundle/config.json, bundle/pid     the container and its first process
//	bundle/state/                      its --root
//	exec-*/{process.json,pid,console}  while it starts an exec
type program struct{ path string }

const (
	bundleDir = "bundle"
	// How long a runtime's program may take for one thing: it starts nothing
	// of the workload's, so more means that the machine stands still.
	programPatience = 2 * time.Minute
)

func (e program) start(w *workload, spec *specs.Spec, _ *configs.Config, p *proc) (int, error) {
	dir := filepath.Join(w.dir, bundleDir)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	// Older runtimes know no other, and nothing that is newer is asked of them.
	spec.Version = "1.0.2"
	if err := writeJSON(filepath.Join(dir, "config.json"), spec); err != nil {
		return 0, err
	}
	// Should this keeper be killed, nothing must go on to make a container
	// that the next one has not heard of.
	pid, err := e.spawn(w, dir, p, "create", "--no-new-keyring", "--bundle", dir)
	if err != nil {
		return 0, err
	}
	err = limit(w, spec.Linux.Resources)
	if err == nil {
		// From here on the workload's own program may have been executed.
		err = w.recordCreated(pid)
	}
	if err == nil {
		_, err = e.call(w, programPatience, "start", w.rec.ID)
	}
	if err != nil {
		_ = unix.Kill(pid, unix.SIGKILL) // not reaped yet, so the pid is its own
		_, _ = unix.Wait4(pid, nil, 0, nil)
	}
	return pid, err
}

// limit sets what later updates will: versions of runtimes differ in what they
// make of the same shares of the processors.
func limit(w *workload, r *specs.LinuxResources) error {
	groups, err := w.groups()
	if err != nil || r == nil {
		return err
	}
	return groups.Set(limits(r))
}

// started makes good what the last keeper may not have come to: a container
// starts once, however often that is asked for. That of the last keeper may
// still be under way, and this one then wait for nothing.
func (e program) started(w *workload) bool {
	if w.rec.Phase != created || w.rec.Boot != bootID() {
		return false
	}
	status := e.status(w)
	if status == specs.StateCreated {
		_, _ = e.call(w, 5*time.Second, "start", w.rec.ID)
		status = e.status(w)
	}
	return status == specs.StateRunning || status == specs.StateStopped
}

func (e program) status(w *workload) specs.ContainerState {
	var state specs.State
	out, err := e.call(w, programPatience, "state", w.rec.ID)
	if err != nil || json.Unmarshal(out, &state) != nil {
		return ""
	}
	return state.Status
}

func (e program) exec(w *workload, p *proc) (int, error) {
	dir, err := os.MkdirTemp(w.dir, "exec-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := writeJSON(filepath.Join(dir, processFile), p.Process); err != nil {
		return 0, err
	}
	return e.spawn(w, dir, p, "exec", "--detach", "--process", processFile)
}

func (e program) remove(w *workload) error {
	dir := filepath.Join(w.dir, bundleDir)
	var err error
	if _, serr := os.Stat(filepath.Join(e.root(w), w.rec.ID)); serr == nil {
		_, err = e.call(w, programPatience, "delete", "--force", w.rec.ID)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = nil // the machine does not have the program any more
	}
	return errors.Join(err, os.RemoveAll(dir))
}

func (e program) root(w *workload) string { return filepath.Join(w.dir, bundleDir, "state") }

// spawn has the program start a process, which gets p's streams from it, and
// returns which it is. Paths that the program is given are relative to dir,
// since a socket's may have 107 bytes at most.
func (e program) spawn(w *workload, dir string, p *proc, args ...string) (pid int, err error) {
	const pidFile, socket = "pid", "console"
	args = append(args, "--pid-file", pidFile)
	var terminal *net.UnixListener
	if p.console != nil {
		if terminal, err = listenIn(dir, socket, "unix"); err != nil {
			return 0, err
		}
		defer terminal.Close()
		args = append(args, "--console-socket", socket)
	}
	ctx, cancel := context.WithTimeout(context.Background(), programPatience)
	defer cancel()
	cmd, fault := e.command(ctx, w, dir, append(args, w.rec.ID)...)
	if p.stdin != nil {
		cmd.Stdin = p.stdin
	}
	if p.stdout != nil {
		cmd.Stdout = p.stdout
	}
	if p.stderr != nil {
		cmd.Stderr = p.stderr
	}
	// It ends with this process, for which the kernel takes this thread.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err = withOOMScore(p.OOMScoreAdj, cmd.Start); err == nil {
		err = cmd.Wait()
	}
	if err != nil {
		return 0, fault(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, pidFile))
	if err == nil {
		pid, err = strconv.Atoi(strings.TrimSpace(string(data)))
	}
	if err != nil {
		return 0, fmt.Errorf("which process %s has started: %w", filepath.Base(e.path), err)
	}
	if terminal != nil {
		if err := forwardTerminal(terminal, p.console); err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, 0, nil)
			return 0, fmt.Errorf("receive the terminal: %w", err)
		}
	}
	return pid, nil
}

const oomScore = "/proc/self/oom_score_adj"

var oomScoreMu sync.Mutex

// withOOMScore calls start, whose child then has the score. The keeper is
// spared when memory runs out, and not every runtime sees to it that what it
// starts is not.
func withOOMScore(score *int, start func() error) error {
	if score == nil {
		return start()
	}
	oomScoreMu.Lock()
	defer oomScoreMu.Unlock()
	own, err := os.ReadFile(oomScore)
	if err != nil {
		return err
	}
	if err := os.WriteFile(oomScore, []byte(strconv.Itoa(*score)), 0); err != nil {
		return err
	}
	// It had this score, so it may have it again.
	defer func() { _ = os.WriteFile(oomScore, bytes.TrimSpace(own), 0) }()
	return start()
}

// call has the program do something to the container and returns what it says.
// It is not ended with this process.
func (e program) call(w *workload, patience time.Duration, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	cmd, fault := e.command(ctx, w, filepath.Join(w.dir, bundleDir), args...)
	out, err := cmd.Output()
	if err != nil {
		return nil, fault(err)
	}
	return out, nil
}

// command prepares a run of the program. fault returns its own words for why
// it failed, which it writes to a log.
func (e program) command(ctx context.Context, w *workload, dir string, args ...string) (cmd *exec.Cmd, fault func(error) error) {
	log := filepath.Join(dir, args[0]+".log")
	cmd = exec.CommandContext(ctx, e.path, append([]string{"--root", e.root(w), "--log", log, "--log-format", "json"}, args...)...)
	cmd.Dir = dir
	return cmd, func(err error) error {
		if data, rerr := os.ReadFile(log); rerr == nil {
			if said := lastError(data); said != "" {
				err = errors.New(said)
			}
		}
		return fmt.Errorf("%s %s: %w", filepath.Base(e.path), args[0], err)
	}
}

// lastError is the last error in a log of JSON objects, "" if there is none.
func lastError(log []byte) (said string) {
	for line := range bytes.Lines(log) {
		var entry struct{ Level, Msg string }
		if json.Unmarshal(line, &entry) == nil && entry.Level == "error" {
			said = strings.TrimSpace(entry.Msg)
		}
	}
	return said
}

// forwardTerminal takes what a program has sent to its console socket and
// passes it on.
func forwardTerminal(l *net.UnixListener, to *os.File) error {
	deadline := time.Now().Add(10 * time.Second) // it has been sent
	if err := l.SetDeadline(deadline); err != nil {
		return err
	}
	conn, err := l.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(deadline); err != nil {
		return err
	}
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 4096), oob)
	if err != nil {
		return err
	}
	files, err := parseFiles(oob[:n])
	if err != nil {
		return err
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	if len(files) != 1 {
		return fmt.Errorf("%d descriptors instead of one", len(files))
	}
	raw, err := to.SyscallConn()
	if err != nil {
		return err
	}
	var sent error
	if err := raw.Control(func(fd uintptr) {
		sent = unix.Sendmsg(int(fd), []byte("terminal"), unix.UnixRights(int(files[0].Fd())), nil, 0)
	}); err != nil {
		return err
	}
	return os.NewSyscallError("sendmsg", sent)
}

func writeJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return os.WriteFile(path, data, 0o600)
}
