//go:build cgo

package server

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children decides who reaps which child. The first process of a workload or
// exec is reaped by whoever watches it, and while an engine is at work it
// reaps helpers of its own. The rest are orphans that the kernel gave to the
// keeper, a subreaper.
type children struct {
	mu       sync.Mutex
	starting int
	own      map[int]struct{}
}

// childInfo is the kernel's siginfo_t as waitid fills it: a union that is
// aligned like a pointer follows three ints.
type childInfo struct {
	signo, errno, code int32
	union              struct {
		_   [0]uintptr
		pid int32
	}
}

// begin must be called before an engine forks.
func (c *children) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.starting++
}

// keep says that a child of this process, if it is one, has somebody who
// watches it.
func (c *children) keep(pid int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.own[pid] = struct{}{}
}

// end says that the engine is done and which process, if any, it left.
func (c *children) end(pid int) {
	c.mu.Lock()
	c.starting--
	if pid > 0 {
		c.own[pid] = struct{}{}
	}
	c.mu.Unlock()
	c.sweep()
}

// reap returns how a child that has ended did so; ok is false when it is not
// a child of this process.
func (c *children) reap(pid int) (status unix.WaitStatus, ok bool) {
	for {
		got, err := unix.Wait4(pid, &status, 0, nil)
		if err == unix.EINTR {
			continue
		}
		ok = err == nil && got == pid
		break
	}
	c.mu.Lock()
	delete(c.own, pid)
	c.mu.Unlock()
	c.sweep()
	return status, ok
}

// abandon kills and reaps a child that nobody will watch.
func (c *children) abandon(pid int) {
	_ = unix.Kill(pid, unix.SIGKILL) // not reaped yet, so the pid is its own
	c.reap(pid)
}

// sweep reaps orphans that have ended. It stops at a child that somebody else
// will reap, since the kernel shows only the first: whoever does calls sweep
// again.
func (c *children) sweep() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.starting == 0 {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_ALL, 0, &info, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if err == unix.EINTR {
			continue
		}
		pid := int((*childInfo)(unsafe.Pointer(&info)).union.pid)
		if err != nil || pid == 0 {
			return
		}
		if _, ok := c.own[pid]; ok {
			return
		}
		_ = unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOHANG, nil)
	}
}
