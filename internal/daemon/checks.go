package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/proxy"
)

var errNotRoot = errors.New("the server needs root, to make containers and networks; run it with sudo")

// checkMachine says what this machine lacks, before anything is changed.
func checkMachine(s api.Settings) error {
	if err := checkAddress(s.Address); err != nil {
		return err
	}
	if err := proxy.Supported(); err != nil {
		return err
	}
	if err := checkCgroups("/sys/fs/cgroup"); err != nil {
		return err
	}
	if err := checkOverlay("/proc/filesystems"); err != nil {
		return err
	}
	for _, p := range ports(s) {
		if err := p.free(); err != nil {
			return err
		}
	}
	return nil
}

// checkAddress wants an address of this machine; "" is none.
func checkAddress(address string) error {
	a, err := netip.ParseAddr(address)
	if err != nil || a.IsUnspecified() || a == local { // validated; what is not there yet will be
		return nil
	}
	all, err := net.InterfaceAddrs()
	if err != nil {
		return fmt.Errorf("list the addresses of this machine: %w", err)
	}
	for _, have := range all {
		if p, err := netip.ParsePrefix(have.String()); err == nil && p.Addr() == a {
			return nil
		}
	}
	return fmt.Errorf("--address %s is no address of this machine; `ip address` lists them, and 127.0.0.1 takes it back", a)
}

// checkCgroups wants the controllers that limit memory and CPU, in the unified
// hierarchy or as hierarchies of their own.
func checkCgroups(root string) error {
	controllers, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	unified := err == nil
	for _, c := range []string{"memory", "cpu"} {
		_, err := os.Stat(filepath.Join(root, c))
		if unified && !slices.Contains(strings.Fields(string(controllers)), c) || !unified && err != nil {
			return fmt.Errorf("%s has no %s controller; mount cgroups there (any systemd does), or start with cgroup_enable=%[2]s", root, c)
		}
	}
	return nil
}

// checkOverlay asks the kernel for the file system that containers' roots
// are made of, and has it loaded when it is a module.
func checkOverlay(file string) error {
	has := func() bool {
		text, err := os.ReadFile(file)
		return err == nil && strings.Contains(string(text), "\toverlay\n")
	}
	if has() {
		return nil
	}
	_ = exec.Command("modprobe", "overlay").Run() // judged by what it leads to
	if !has() {
		return errors.New("the kernel has no overlay file system; load it with `modprobe overlay`")
	}
	return nil
}

// port is one that the server is to listen on.
type port struct {
	what    string // for people: "the API"
	network string // tcp, udp
	at      netip.AddrPort
	cure    string
}

// free is an error that names who has the port. The address need not be this
// machine's yet.
func (p port) free() error {
	freebind := &net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		cerr := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(cerr, err)
	}}
	var err error
	if p.network == "udp" {
		var c net.PacketConn
		if c, err = freebind.ListenPacket(context.Background(), p.network, p.at.String()); err == nil {
			c.Close()
		}
	} else {
		var l net.Listener
		if l, err = freebind.Listen(context.Background(), p.network, p.at.String()); err == nil {
			l.Close()
		}
	}
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("%s port %d, for %s, is in use%s; %s", p.network, p.at.Port(), p.what, user(p.network, p.at.Port()), p.cure)
	}
	if err != nil {
		return fmt.Errorf("try to listen on %s for %s: %w", p.at, p.what, err)
	}
	return nil
}

// user is " by process 1234 (nginx)", or nothing when it cannot be told.
func user(network string, port uint16) string {
	inodes := map[string]bool{}
	for _, table := range []string{network, network + "6"} {
		text, err := os.ReadFile("/proc/net/" + table)
		if err != nil {
			continue
		}
		for _, line := range strings.Split(string(text), "\n")[1:] {
			f := strings.Fields(line)
			// local address, state (0A listens; of UDP 07 is any), inode
			if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", port)) && (f[3] == "0A" || f[3] == "07") {
				inodes["socket:["+f[9]+"]"] = true
			}
		}
	}
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	for _, fd := range fds {
		to, err := os.Readlink(fd)
		if err == nil && inodes[to] {
			proc := filepath.Dir(filepath.Dir(fd))
			name, _ := os.ReadFile(filepath.Join(proc, "comm"))
			return fmt.Sprintf(" by process %s (%s)", filepath.Base(proc), strings.TrimSpace(string(name)))
		}
	}
	return ""
}
