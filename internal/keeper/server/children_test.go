//go:build cgo

package server

import (
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func TestSweepLeavesWhatIsWatched(t *testing.T) {
	c := children{own: map[int]struct{}{}}
	ended := func() int {
		t.Helper()
		pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", "exit 7"}, nil)
		if err == nil {
			err = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		return pid
	}

	watched := ended()
	c.keep(watched)
	c.sweep()
	if status, ok := c.reap(watched); !ok || status.ExitStatus() != 7 {
		t.Errorf("watched: status %d, %v", status.ExitStatus(), ok)
	}

	c.begin()
	orphan := ended()
	c.sweep()
	if err := unix.Waitid(unix.P_PID, orphan, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Errorf("orphan was reaped while something starts: %v", err)
	}
	c.end(0)
	if _, ok := c.reap(orphan); ok {
		t.Error("orphan was not reaped")
	}
}
