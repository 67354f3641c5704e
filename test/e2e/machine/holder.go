package machine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// holderName is argument zero of this program when it runs again as the first
// process of a machine.
const holderName = "tutti-test-machine"

func init() {
	if os.Args[0] == holderName {
		if err := hold(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// hold is process 1 of a machine. It makes the machine's mounts its own, says
// that it is ready, and ends when its standard input does; the kernel then
// kills everything else on the machine.
func hold() error {
	// Neither do ours reach the host nor the host's us, but among our own
	// namespaces mounts are shared as on any real machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("detach the mounts: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("share the mounts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	// Orphans come to us and are reaped by the kernel.
	signal.Ignore(syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	fmt.Println("ready")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// holder keeps namespaces alive: closing its input ends it and, where it is
// process 1, everything in them.
type holder struct {
	cmd   *exec.Cmd
	input io.Closer
}

func newHolder(flags uintptr) (*holder, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: self, Args: []string{holderName}, SysProcAttr: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}}
	input, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("make namespaces (this needs root): %w", err)
	}
	h := &holder{cmd, input}
	line := make([]byte, 256)
	n, err := output.Read(line)
	if text := strings.TrimSpace(string(line[:n])); text != "ready" {
		h.close()
		return nil, fmt.Errorf("make namespaces: %s %w", text, err)
	}
	return h, nil
}

func (h *holder) pid() int { return h.cmd.Process.Pid }

func (h *holder) close() error {
	h.input.Close()
	timer := time.AfterFunc(10*time.Second, func() { h.cmd.Process.Kill() })
	defer timer.Stop()
	err := h.cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}
