package machine

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
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
		if err := hold(os.Args[1:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
}

// hold is process 1 of a machine. It makes the machine's mounts its own, says
// that it is ready, and ends when its standard input does; the kernel then
// kills everything else on the machine. root, if it is given, is a directory
// for a root of the machine's own, and what lies over the host's there.
func hold(root []string) error {
	// Neither do ours reach the host nor the host's us, but among our own
	// namespaces mounts are shared as on any real machine.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("detach the mounts: %w", err)
	}
	if len(root) > 0 {
		if err := ownRoot(root[0], root[1:]); err != nil {
			return fmt.Errorf("make a root: %w", err)
		}
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

// ownRoot gives the machine a root of its own, with layers over the host's; the
// first is on top. What is written stays there, but for the directories that
// tests share with their machines.
func ownRoot(dir string, layers []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	// Layers may not lie in each other, as these do in the host's root: it is
	// seen through an overlay of its own.
	host, err := overlay(dir, "host", "/")
	if err != nil {
		return err
	}
	root, err := overlay(dir, "root", append(layers, host)...)
	if err != nil {
		return err
	}
	repo, err := repository()
	if err != nil {
		return err
	}
	for _, b := range []struct {
		dir   string
		flags uintptr
	}{
		{"/proc", unix.MS_REC}, {"/sys", unix.MS_REC}, {"/dev", unix.MS_REC},
		{filepath.Dir(filepath.Dir(dir)), 0}, {repo, 0},
	} {
		if err := unix.Mount(b.dir, filepath.Join(root, b.dir), "", unix.MS_BIND|b.flags, ""); err != nil {
			return fmt.Errorf("bind %s: %w", b.dir, err)
		}
	}
	if err := unix.Mount("tmpfs", filepath.Join(root, "dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=1777"); err != nil {
		return fmt.Errorf("mount /dev/shm: %w", err)
	}
	// The new root is put over the old one, which is then below it.
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return unix.Unmount(".", unix.MNT_DETACH)
}

// overlay mounts layers, the first on top, below a directory and writable.
func overlay(dir, name string, layers ...string) (at string, err error) {
	at = filepath.Join(dir, name)
	upper, work := at+".upper", at+".work"
	for _, d := range []string{at, upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return "", err
		}
	}
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", strings.Join(layers, ":"), upper, work)
	if err := unix.Mount("overlay", at, "overlay", 0, options); err != nil {
		return "", fmt.Errorf("mount the layers %q: %w", layers, err)
	}
	return at, nil
}

// holder keeps namespaces alive: closing its input ends it and, where it is
// process 1, everything in them.
type holder struct {
	cmd   *exec.Cmd
	input io.Closer
}

func newHolder(flags uintptr, root ...string) (*holder, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := &exec.Cmd{Path: self, Args: append([]string{holderName}, root...), SysProcAttr: &syscall.SysProcAttr{Cloneflags: flags, Setsid: true}}
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
