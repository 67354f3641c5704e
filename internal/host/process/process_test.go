package process

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOpenChecksTheStart(t *testing.T) {
	ticks, err := StartTicks(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(os.Getpid(), ticks)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := Open(os.Getpid(), ticks+1); !errors.Is(err, ErrGone) {
		t.Fatalf("another start: %v, want ErrGone", err)
	}
}

func TestWaitAndExitStatus(t *testing.T) {
	cmd := exec.Command("sh", "-c", "read x; exit 7")
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ticks, err := StartTicks(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	f, err := Open(cmd.Process.Pid, ticks)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()

	if err := f.SetReadDeadline(time.Now().Add(10 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if err := Wait(f); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("wait for a living process: %v", err)
	}
	if err := f.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	if err := Wait(f); err != nil {
		t.Fatal(err)
	}
	go func() { _ = cmd.Wait() }()
	asked := time.Now()
	status, ok := ExitStatus(f, 10*time.Second)
	if took := time.Since(asked); took > 5*time.Second {
		t.Errorf("asking took %v", took)
	}
	if !ok {
		t.Skip("this kernel does not tell the exit of others")
	}
	if status.ExitStatus() != 7 {
		t.Fatalf("status %d, want 7", status.ExitStatus())
	}
	if err := Signal(f, unix.SIGTERM); !errors.Is(err, ErrGone) {
		t.Fatalf("signal after the end: %v, want ErrGone", err)
	}
}
