// Package netns makes, pins, enters and removes network namespaces. A pinned
// namespace is one bind-mounted on a file: it lives without a process in it.
package netns

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// current is the thread's own namespace: /proc/self would be the one of the
// process's first thread.
const current = "/proc/thread-self/ns/net"

// Create pins a new, empty network namespace at path, whose directory exists,
// and runs configure inside it. If path is pinned already, configure runs in
// the namespace that is there: Create can be repeated.
//
// As with Do, configure runs on a thread of its own in that namespace, and
// must not start goroutines that expect to be there too.
func Create(path string, configure func() error) error {
	pinned, err := Pinned(path)
	if err != nil {
		return err
	}
	if pinned {
		return Do(path, configure)
	}
	return visit(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("create network namespace: %w", err)
		}
		return Pin(current, path)
	}, configure)
}

// Pin pins the namespace at source, which may be pinned already, at path too.
func Pin(source, path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("pin network namespace: %w", err)
	}
	_ = f.Close()
	if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("pin network namespace at %s: %w", path, err)
	}
	return nil
}

// Same tells whether two paths are of one namespace.
func Same(a, b string) (bool, error) {
	var at, bt unix.Stat_t
	if err := unix.Stat(a, &at); err != nil {
		return false, fmt.Errorf("stat network namespace %s: %w", a, err)
	}
	if err := unix.Stat(b, &bt); err != nil {
		return false, fmt.Errorf("stat network namespace %s: %w", b, err)
	}
	return at.Dev == bt.Dev && at.Ino == bt.Ino, nil
}

// Do runs f on a thread that is in the namespace pinned at path.
func Do(path string, f func() error) error {
	ns, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open network namespace %s: %w", path, err)
	}
	defer unix.Close(ns)
	return visit(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", path, err)
		}
		return nil
	}, f)
}

// visit runs f on a thread whose namespace enter has changed, and takes the
// thread back home. A thread that cannot go home must not run anything else:
// its goroutine ends while locked to it, and so does the thread.
func visit(enter, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := errors.New("ended early")
		defer func() { result <- err }()
		home, openErr := unix.Open(current, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if openErr != nil {
			err = fmt.Errorf("open own network namespace: %w", openErr)
			return
		}
		defer unix.Close(home)
		if err = enter(); err == nil {
			err = f()
		}
		if back := unix.Setns(home, unix.CLONE_NEWNET); back != nil {
			err = errors.Join(err, fmt.Errorf("return to own network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
	}()
	return <-result
}

// Pinned tells whether a namespace is pinned at path.
func Pinned(path string) (bool, error) {
	var fs unix.Statfs_t
	switch err := unix.Statfs(path, &fs); {
	case errors.Is(err, unix.ENOENT):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("stat network namespace %s: %w", path, err)
	}
	return fs.Type == unix.NSFS_MAGIC, nil
}

// Remove unpins the namespace at path; the kernel frees it, with the links in
// it, once no process is left inside. What is not there is no error.
func Remove(path string) error {
	for {
		// A path can be covered more than once; EINVAL: nothing mounted.
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unpin network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("unpin network namespace: %w", err)
	}
	return nil
}
