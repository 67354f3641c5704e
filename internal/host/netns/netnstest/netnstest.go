// Package netnstest runs a test program in a network and mount namespace of
// its own, so that tests drive the real kernel without touching the machine.
package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"tutti.dev/tutti/internal/host/netns"
)

const inside = "TUTTI_TEST_INSIDE_NETNS"

// Main is what a TestMain calls. It runs the test program again in throwaway
// network and mount namespaces, with the loopback link up, and exits.
func Main(m *testing.M) {
	if os.Getenv(inside) == "" {
		runtime.LockOSThread() // the parent that Pdeathsig means is a thread
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), inside+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
			Pdeathsig:  syscall.SIGKILL,
		}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case errors.As(err, &exit):
			os.Exit(max(exit.ExitCode(), 1))
		case err != nil:
			fmt.Fprintln(os.Stderr, "run tests in their own namespaces:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if err := prepare(); err != nil {
		fmt.Fprintln(os.Stderr, "prepare test namespaces:", err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func prepare() error {
	if err := syscall.Mount("", "/", "", syscall.MS_PRIVATE|syscall.MS_REC, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	return loopbackUp()
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// New pins a namespace with its loopback link up and returns its path. It is
// removed when the test ends.
func New(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ns")
	if err := netns.Create(path, loopbackUp); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netns.Remove(path); err != nil {
			t.Error(err)
		}
	})
	return path
}

// Do runs f in the namespace pinned at path and fails the test on an error.
func Do(t testing.TB, path string, f func() error) {
	t.Helper()
	if err := netns.Do(path, f); err != nil {
		t.Fatal(err)
	}
}

// Cable links the test's namespace with the one pinned at path: a veth pair
// named name here and there, with one address each ("192.0.2.1/24").
func Cable(t testing.TB, path, name, here, there string) {
	t.Helper()
	ns, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	err = netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(ns.Fd())})
	if err != nil {
		t.Fatalf("add veth %s: %v", name, err)
	}
	up := func(addr string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		a, err := netlink.ParseAddr(addr)
		if err != nil {
			return err
		}
		return errors.Join(netlink.AddrAdd(link, a), netlink.LinkSetUp(link))
	}
	// The kernel connects the ends a little after both are up.
	connected := func() error {
		for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(time.Millisecond) {
			if link, err := netlink.LinkByName(name); err != nil || link.Attrs().OperState == netlink.OperUp {
				return err
			}
		}
		return fmt.Errorf("link %s does not come up", name)
	}
	if err := up(here); err != nil {
		t.Fatal(err)
	}
	Do(t, path, func() error { return errors.Join(up(there), connected()) })
	if err := connected(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if link, err := netlink.LinkByName(name); err == nil {
			_ = netlink.LinkDel(link)
		}
	})
}
