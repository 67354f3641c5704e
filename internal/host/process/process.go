// Package process names other processes safely: by a pid together with the
// time it started, and from then on by a pidfd. Neither can come to mean
// another process.
package process

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrGone says that the process has ended and was reaped, or that its pid now
// belongs to another.
var ErrGone = errors.New("process is gone")

// StartTicks returns when a process started, in clock ticks since boot. A
// zombie still has it.
func StartTicks(pid int) (uint64, error) {
	stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, ErrGone
	}
	if err != nil {
		return 0, err
	}
	// The name, in parentheses, may hold spaces and parentheses itself.
	_, rest, ok := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" "))
	fields := bytes.Fields(rest)
	if !ok || len(fields) < 20 {
		return 0, fmt.Errorf("parse /proc/%d/stat: too few fields", pid)
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

// Open returns a pidfd of the process that has this pid and started then, or
// ErrGone. The file can be waited for without holding a thread.
func Open(pid int, startTicks uint64) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, ErrGone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	// Checked after opening: if it is the right one now, the pidfd is its.
	got, err := StartTicks(pid)
	if err == nil && got != startTicks {
		err = ErrGone
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid)), nil
}

// Wait blocks until the process has ended. A read deadline or closing the
// file ends the wait with an error.
func Wait(pidfd *os.File) error { return await(pidfd, unix.POLLIN) }

func await(pidfd *os.File, events int16) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Read(func(fd uintptr) bool {
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		for {
			_, failed = unix.Poll(poll, 0)
			if failed != unix.EINTR {
				break
			}
		}
		return failed != nil || poll[0].Revents&events != 0
	})
	if err != nil {
		return err
	}
	return failed
}

// Signal sends a signal to the process; ErrGone when it has ended.
func Signal(pidfd *os.File, sig unix.Signal) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := conn.Control(func(fd uintptr) {
		failed = unix.PidfdSendSignal(int(fd), sig, nil, 0)
	}); err != nil {
		return err
	}
	if errors.Is(failed, unix.ESRCH) {
		return ErrGone
	}
	return os.NewSyscallError("pidfd_send_signal", failed)
}

// ExitStatus returns how an ended process, not a child of the caller, ended.
// The kernel (6.15 and later) tells once its parent has reaped it, which is
// waited for up to timeout. One that never tells is not waited for.
func ExitStatus(pidfd *os.File, timeout time.Duration) (unix.WaitStatus, bool) {
	status, ok, err := exitInfo(pidfd)
	if ok {
		return status, true
	}
	if errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.EINVAL) {
		return 0, false // the kernel is older than the question
	}
	if err := pidfd.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return 0, false
	}
	if err := await(pidfd, unix.POLLHUP); err != nil {
		return 0, false
	}
	status, ok, _ = exitInfo(pidfd)
	return status, ok
}

func exitInfo(pidfd *os.File) (status unix.WaitStatus, ok bool, err error) {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return 0, false, err
	}
	cerr := conn.Control(func(fd uintptr) {
		info := unix.PidfdInfo{Mask: unix.PIDFD_INFO_EXIT}
		err = unix.IoctlPidfdInfo(int(fd), &info)
		if err == nil && info.Mask&unix.PIDFD_INFO_EXIT != 0 {
			status, ok = unix.WaitStatus(info.Exit_code), true
		}
	})
	return status, ok, errors.Join(err, cerr)
}
