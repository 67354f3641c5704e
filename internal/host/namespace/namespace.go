// Package namespace makes kernel namespaces and pins them to files, so that
// they exist without a process in them.
package namespace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/containerd/v2/pkg/sys"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
)

// Kind is a kind of namespace, named as in /proc/<pid>/ns.
type Kind string

const (
	IPC Kind = "ipc"
	UTS Kind = "uts"
	Net Kind = "net"
	PID Kind = "pid"
	// User is made by MakeOwned only.
	User Kind = "user"
)

var flags = map[Kind]int{IPC: unix.CLONE_NEWIPC, UTS: unix.CLONE_NEWUTS, Net: unix.CLONE_NEWNET}

// Make makes new namespaces of the given kinds, calls setup in them, joined
// with those that join names by path, and pins them to files of dir that are
// called like their kind. setup may be nil; it must not start goroutines.
func Make(dir string, kinds []Kind, join map[Kind]string, setup func() error) error {
	done := make(chan error, 1)
	work := func() {
		// The thread is never unlocked and so ends with this goroutine: no
		// other code can run in its namespaces.
		runtime.LockOSThread()
		done <- pinned(dir, kinds, join, setup)
	}
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != unix.Getpid() {
			work()
			return
		}
		// The main thread cannot end, and /proc/self shows its namespaces as
		// those of the whole process. As long as it is held here, the work is
		// done by another.
		defer runtime.UnlockOSThread()
		finished := make(chan struct{})
		go func() { defer close(finished); work() }()
		<-finished
	}()
	return <-done
}

func pinned(dir string, kinds []Kind, join map[Kind]string, setup func() error) (err error) {
	for kind, path := range join {
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: path, Err: err}
		}
		err = unix.Setns(fd, flags[kind])
		unix.Close(fd)
		if err != nil {
			return fmt.Errorf("join namespace %s: %w", path, err)
		}
	}
	all := 0
	for _, kind := range kinds {
		all |= flags[kind]
	}
	if err := unix.Unshare(all); err != nil {
		return fmt.Errorf("make namespaces %v: %w", kinds, err)
	}
	if setup != nil {
		if err := setup(); err != nil {
			return err
		}
	}
	for _, kind := range kinds {
		if err := Pin("/proc/thread-self/ns/"+string(kind), filepath.Join(dir, string(kind))); err != nil {
			return err
		}
	}
	return nil
}

// MakeOwned makes a user namespace in which the IDs 0 to size-1 are first to
// first+size-1 of the machine, of users and groups alike, and in it, so that
// it has a say in them, new namespaces of the given kinds. It pins all to files
// of dir that are called like their kind, the user namespace last: once that
// is there, all are. What an interrupted call has left is replaced.
func MakeOwned(dir string, first, size uint32, kinds []Kind) error {
	all := 0
	for _, kind := range kinds {
		all |= flags[kind]
	}
	ids := fmt.Sprintf("0:%d:%d", first, size)
	// A thread cannot enter a user namespace when others run beside it: the
	// namespaces are those of a process that never gets to run.
	err := sys.UnshareAfterEnterUserns(ids, ids, uintptr(all), func(pid int) error {
		for _, kind := range append(kinds[:len(kinds):len(kinds)], User) {
			path := filepath.Join(dir, string(kind))
			if err := Unpin(path); err != nil {
				return err
			}
			if err := Pin(fmt.Sprintf("/proc/%d/ns/%s", pid, kind), path); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("make user namespace of IDs %d to %d: %w", first, first+size-1, err)
	}
	return nil
}

// Pin keeps the namespace at source alive by a file, which it creates.
func Pin(source, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o600)
	if err != nil {
		return err
	}
	f.Close()
	return mount.Bind(source, path)
}

// Unpin lets go of a namespace and removes its file. None is no error.
func Unpin(path string) error {
	if err := mount.Unmount(path); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
