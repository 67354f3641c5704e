//go:build cgo

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// What a rule of Landlock can be about, in the order in which Linux came to
// have it. Programs may only be held to all of it: before version 3 (Linux 6.2)
// a file that may be read can be truncated.
const (
	landlockRead = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_READ_DIR
	landlockFile = unix.LANDLOCK_ACCESS_FS_EXECUTE | unix.LANDLOCK_ACCESS_FS_READ_FILE | unix.LANDLOCK_ACCESS_FS_WRITE_FILE |
		unix.LANDLOCK_ACCESS_FS_TRUNCATE | unix.LANDLOCK_ACCESS_FS_IOCTL_DEV
	landlockV3 = unix.LANDLOCK_ACCESS_FS_TRUNCATE<<1 - 1
	landlockV5 = unix.LANDLOCK_ACCESS_FS_IOCTL_DEV<<1 - 1
)

// confine restricts this process to what rules list and becomes the program:
// the last step of a start, inside of what libcontainer has made. It returns
// only if that fails.
func confine(rules string, args []string) error {
	var r protocol.Landlock
	if err := json.Unmarshal([]byte(rules), &r); err != nil {
		return fmt.Errorf("read Landlock rules: %w", err)
	}
	program, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	runtime.LockOSThread() // the restriction is of a thread, and goes with exec
	if err := restrict(r); err != nil {
		return err
	}
	err = syscall.Exec(program, args, os.Environ())
	if errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%s may not be executed; add it, its interpreter and its libraries to ro= of the pod's annotation process.tutti.dev/landlock", program)
	}
	return &os.PathError{Op: "exec", Path: program, Err: err}
}

func restrict(r protocol.Landlock) error {
	version, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 || version < 3 {
		return errors.New("this machine's kernel has no Landlock that keeps files from being truncated; use Linux 6.2 with landlock among lsm=, or leave the annotation process.tutti.dev/landlock out")
	}
	all := uint64(landlockV3)
	if version >= 5 {
		all = landlockV5
	}
	attr := unix.LandlockRulesetAttr{Access_fs: all}
	set, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr.Access_fs), 0)
	if errno != 0 {
		return os.NewSyscallError("landlock_create_ruleset", errno)
	}
	defer unix.Close(int(set))
	for _, l := range []struct {
		paths  []string
		access uint64
	}{{r.ReadOnly, landlockRead}, {r.ReadWrite, all}} {
		for _, path := range l.paths {
			if err := allow(set, path, l.access&all); err != nil {
				return err
			}
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, set, 0, 0); errno != 0 {
		return os.NewSyscallError("landlock_restrict_self", errno)
	}
	return nil
}

func allow(set uintptr, path string, access uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("the pod's annotation process.tutti.dev/landlock names %s: %w", path, err)
	}
	defer unix.Close(fd)
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		access &= landlockFile
	}
	rule := unix.LandlockPathBeneathAttr{Allowed_access: access, Parent_fd: int32(fd)}
	if _, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, set, unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&rule)), 0, 0, 0); errno != 0 {
		return fmt.Errorf("allow %s: %w", path, os.NewSyscallError("landlock_add_rule", errno))
	}
	return nil
}
