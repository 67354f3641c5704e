package process

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// TestMain is also the process that is looked at.
func TestMain(m *testing.M) {
	if dir := os.Getenv("LOOK_TEST_SUBJECT"); dir == "wait" {
		os.Stdin.Read(make([]byte, 1))
		return
	} else if dir != "" {
		if err := subject(dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// subject has a file of each kind open, listens on sockets of each kind, and
// has a child, until its standard input is closed.
func subject(dir string) error {
	written, err := os.Create(filepath.Join(dir, "written"))
	if err != nil {
		return err
	}
	defer written.Close()
	read, err := os.Open(filepath.Join(dir, "read"))
	if err != nil {
		return err
	}
	defer read.Close()
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer tcp.Close()
	udp, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer udp.Close()
	local, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		return err
	}
	defer local.Close()
	child := exec.Command("sleep", "1000")
	if err := child.Start(); err != nil {
		return err
	}
	fmt.Println(tcp.Addr().(*net.TCPAddr).Port, udp.LocalAddr().(*net.UDPAddr).Port, child.Process.Pid)
	os.Stdin.Read(make([]byte, 1))
	child.Process.Kill()
	return child.Wait()
}

func TestLook(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "read"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `umask 0077; ulimit -S -s 4096; exec nice -n 3 "$0" "$@"`, os.Args[0], "an argument")
	cmd.Env = append(os.Environ(), "LOOK_TEST_SUBJECT="+dir)
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
		ended.Stop()
	})
	var tcp, udp int32
	var child int
	if _, err := fmt.Fscanln(out, &tcp, &udp, &child); err != nil {
		t.Fatal(err)
	}
	s, err := Look(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if s.Exe != self || s.Called != self || !slices.Equal(s.Args[1:], []string{"an argument"}) || s.Dir != dir {
		t.Errorf("command %q, %q of %s in %s", s.Called, s.Args, s.Exe, s.Dir)
	}
	if !slices.Contains(s.Env, "LOOK_TEST_SUBJECT="+dir) {
		t.Errorf("environment %q", s.Env)
	}
	if s.UID != int64(os.Geteuid()) || s.GID != int64(os.Getegid()) || s.Umask != "0077" || s.Nice != 3 {
		t.Errorf("user %d:%d, umask %s, nice %d", s.UID, s.GID, s.Umask, s.Nice)
	}
	if !slices.ContainsFunc(s.Limits, func(l Limit) bool { return l.Name == "stack" && l.Soft == "4194304" }) {
		t.Errorf("limits %v", s.Limits)
	}
	var sockets []string
	for _, l := range s.Sockets {
		sockets = append(sockets, fmt.Sprintf("%s %s %d", l.Protocol, l.Address, l.Port))
	}
	want := []string{fmt.Sprintf("%s 127.0.0.1 %d", corev1.ProtocolTCP, tcp), fmt.Sprintf("%s 127.0.0.1 %d", corev1.ProtocolUDP, udp)}
	if !slices.Equal(sockets, want) || !slices.Equal(s.Unix, []string{filepath.Join(dir, "socket")}) {
		t.Errorf("sockets %q and %q, not %q", sockets, s.Unix, want)
	}
	if !slices.Equal(s.Written, []string{filepath.Join(dir, "written")}) || !slices.Contains(s.Read, filepath.Join(dir, "read")) {
		t.Errorf("files: written %q, read %q", s.Written, s.Read)
	}
	if !slices.Contains(s.Children, Relative{child, "sleep"}) || s.Parent.PID != os.Getpid() {
		t.Errorf("parent %v, children %v", s.Parent, s.Children)
	}
}

// A program that has libraries shows what an image of it would need.
func TestMapped(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", "echo ready; read line")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	s, err := Look(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(s.Mapped, func(f string) bool { return strings.Contains(f, "libc.so") }) || slices.Contains(s.Mapped, s.Exe) {
		t.Errorf("mapped: %q", s.Mapped)
	}
}

func TestRefused(t *testing.T) {
	zombie := exec.Command("true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { zombie.Wait() })
	status := fmt.Sprintf("/proc/%d/status", zombie.Process.Pid)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if text, _ := os.ReadFile(status); strings.Contains(string(text), "State:\tZ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not end")
		}
	}
	const none = 1 << 22 // no process has this number or a higher one
	for _, c := range []struct {
		pid  int
		says string
	}{
		{none, "there is no process 4194304; `ps ax` lists those that run"},
		{zombie.Process.Pid, fmt.Sprintf("process %d (true) has ended and only waits for its parent to notice; import one that runs", zombie.Process.Pid)},
	} {
		if _, err := Look(c.pid); err == nil || err.Error() != c.says {
			t.Errorf("says %v, not %q", err, c.says)
		}
	}
	for err, says := range map[error]string{
		fs.ErrPermission: "process 7 is another user's; use sudo",
		unix.EACCES:      "process 7 is another user's; use sudo",
		unix.ESRCH:       "process 7 has ended meanwhile; import one that stays",
		fs.ErrNotExist:   "process 7 has ended meanwhile; import one that stays",
	} {
		if err := refusal(7, fmt.Errorf("read it: %w", err)); err.Error() != says {
			t.Errorf("says %v, not %q", err, says)
		}
	}
	// Process 2 is the kernel's own, where its processes are to be seen.
	if name, _ := os.ReadFile("/proc/2/comm"); string(name) == "kthreadd\n" {
		const says = "process 2 (kthreadd) is a thread of the kernel; name the process of a program"
		if _, err := Look(2); err == nil || err.Error() != says {
			t.Errorf("says %v, not %q", err, says)
		}
	}
}

// What runs in a container has files that a program of the machine has not.
func TestRootOfItsOwn(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("/proc/self/exe") // static: nothing else is needed
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(root, "subject"), program, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/subject")
	cmd.Env = []string{"LOOK_TEST_SUBJECT=wait"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	cmd.Dir = "/"
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	says := fmt.Sprintf("process %d (subject) has a root of its own, as in a container; what started it says how to run it", cmd.Process.Pid)
	if _, err := Look(cmd.Process.Pid); err == nil || err.Error() != says {
		t.Errorf("says %v, not %q", err, says)
	}
}
