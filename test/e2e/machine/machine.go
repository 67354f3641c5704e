// Package machine makes throwaway machines for tests and benchmarks: each has
// its own network, mounts, processes and data directory, a link to an outside
// world, and runs the real bin/tutti. Several can run at once. No process, mount
// or link of theirs outlives the program that made them, however it ends; a
// directory and control groups that it could not remove go with the next New.
package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The addresses of every machine, of the world outside it, joined by one link,
// and of a neighbor where there is one.
const (
	IP         = "192.0.2.10"
	OutsideIP  = "192.0.2.1"
	NeighborIP = "192.0.2.20"
)

// Machine is one throwaway machine.
type Machine struct {
	// Dir is the data directory; it does not exist until tutti makes it.
	Dir string
	// Repo is the root of the repository, where bin/tutti is.
	Repo string

	temp    string
	ip      string
	rootfs  []string // where its root is mounted, and of which layers; nil is the host's
	claim   *os.File
	inside  *holder
	outside *holder
	// inherited are the host's mounts: copies, which go when the host's
	// directories do.
	inherited []string
	guest     bool // of another's world outside
}

// New makes a machine on which nothing runs yet. Its file system is this one's,
// or, with layers, those directories over it, the first on top, and writes of
// its own.
func New(layers ...string) (*Machine, error) { return newMachine(IP, nil, layers) }

// Neighbor makes a machine in the same world as m, at NeighborIP. It goes
// before m does.
func (m *Machine) Neighbor() (*Machine, error) {
	if err := m.network(); err != nil {
		return nil, err
	}
	return newMachine(NeighborIP, m.outside, nil)
}

// lan joins the machines of one world.
const lan = "lan"

// network makes a network of the world's end of the link, that others can be
// on. It is done once.
func (m *Machine) network() error {
	r := m.RunOutside(10*time.Second, "sh", "-c", "ip link show "+lan+" >/dev/null 2>&1 || { ip link add "+lan+" type bridge && ip link set "+lan+" addrgenmode none up && "+
		"ip addr flush dev world && ip link set world master "+lan+" && ip addr add "+OutsideIP+"/24 dev "+lan+"; }")
	if r.Err != nil {
		return fmt.Errorf("join the machines: %s", r)
	}
	return nil
}

// Tap makes a link in the world outside for a virtual machine at NeighborIP,
// whose program is run there too.
func (m *Machine) Tap(name string) error {
	if err := m.network(); err != nil {
		return err
	}
	if r := m.RunOutside(10*time.Second, "sh", "-c", fmt.Sprintf("ip tuntap add dev %s mode tap && ip link set %[1]s addrgenmode none master "+lan+" up", name)); r.Err != nil {
		return fmt.Errorf("make a link for a virtual machine: %s", r)
	}
	return nil
}

// newMachine makes a machine at an address of a world of its own, or of that
// of a neighbor.
func newMachine(ip string, world *holder, layers []string) (m *Machine, err error) {
	repo, err := repository()
	if err != nil {
		return nil, err
	}
	sweep()
	// A unix socket's path has room for 107 bytes: keep it short.
	temp, err := os.MkdirTemp("", prefix)
	if err != nil {
		return nil, err
	}
	m = &Machine{Dir: filepath.Join(temp, "tutti"), Repo: repo, temp: temp, ip: ip}
	defer func(m *Machine) {
		if err != nil {
			m.Close()
		}
	}(m)
	if err := os.Chmod(temp, 0o755); err != nil {
		return nil, err
	}
	if m.claim, err = claim(temp); err != nil {
		return nil, err
	}
	if len(layers) > 0 {
		m.rootfs = append([]string{filepath.Join(temp, "root")}, layers...)
	}
	m.outside, m.guest = world, world != nil
	if !m.guest {
		if m.outside, err = newHolder(namespaces); err != nil {
			return nil, err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	return m, m.boot(ctx)
}

// namespaces are a machine's own: what programs share in memory goes with it,
// too.
const namespaces = unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC

// boot makes the machine's own world and links it to the one outside.
func (m *Machine) boot(ctx context.Context) (err error) {
	if m.inside, err = newHolder(namespaces, m.rootfs...); err != nil {
		return err
	}
	near, join := "world", "ip link set lo up && ip link set world addrgenmode none && ip addr add "+OutsideIP+"/24 dev world && ip link set world up"
	if m.guest {
		near, join = "neighbor", "ip link set neighbor addrgenmode none master "+lan+" up"
	}
	// Without link-local addresses of IPv6: the kernel takes seconds to
	// decide on them, and states are compared.
	link := fmt.Sprintf("ip link set lo up && ip link add eth0 type veth peer name %s netns %d && ip link set eth0 addrgenmode none && "+
		"ip addr add %s/24 dev eth0 && ip link set eth0 up", near, m.outside.pid(), m.ip)
	// The process id of the other holder means nothing inside: make the link
	// from the host's processes, in the machine's network.
	for _, step := range []*exec.Cmd{
		exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(m.inside.pid()), "--net", "sh", "-c", link),
		exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(m.outside.pid()), "--net", "sh", "-c", join),
		exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(m.inside.pid()), "--net", "ip", "route", "add", "default", "via", OutsideIP),
	} {
		if err := run(step); err != nil {
			return err
		}
	}
	m.inherited, err = m.mounts()
	return err
}

func run(step *exec.Cmd) error {
	if out, err := step.CombinedOutput(); err != nil {
		return fmt.Errorf("link the machine: %s: %w", bytes.TrimSpace(out), err)
	}
	return nil
}

// Reboot ends the machine as a power failure would, and boots it: processes,
// links, rules, mounts and control groups are gone, files are not, but those
// in /run. What was not synced is not lost.
func (m *Machine) Reboot() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	// The kernel would take its time to remove the end outside.
	if err := run(exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(m.outside.pid()), "--net", "ip", "link", "del", "world")); err != nil {
		return err
	}
	err := m.inside.close()
	m.inside = nil // Close knows
	if err = errors.Join(err, m.removeCgroups(), os.RemoveAll(filepath.Join("/run", m.root()))); err != nil {
		return fmt.Errorf("end the machine: %w", err)
	}
	return m.boot(ctx)
}

// repository finds the directory of go.mod above the working directory.
func repository() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if data, err := os.ReadFile(filepath.Join(dir, "go.mod")); err == nil && bytes.HasPrefix(data, []byte("module tutti.dev/tutti\n")) {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("not inside the repository of tutti")
		}
		dir = filepath.Dir(dir)
	}
}

// Binary is the tutti under test.
func (m *Machine) Binary() string { return filepath.Join(m.Repo, "bin", "tutti") }

// Command prepares a program to run on the machine, in the repository's root,
// with the data directory in its environment. It is killed when ctx ends.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	return m.command(ctx, m.inside, name, args...)
}

func (m *Machine) command(ctx context.Context, h *holder, name string, args ...string) *exec.Cmd {
	enter := []string{"--target", strconv.Itoa(h.pid()), "--net", "--mount", "--pid", "--ipc", "--wdns=" + m.Repo, name}
	cmd := exec.CommandContext(ctx, "nsenter", append(enter, args...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A background process that keeps our pipes open is a defect to report,
	// not a reason to hang.
	cmd.WaitDelay = 5 * time.Second
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); name != "KUBECONFIG" && name != "TUTTI_DATA_DIR" && name != "HOME" {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "TUTTI_DATA_DIR="+m.Dir, "HOME="+m.temp)
	return cmd
}

// Result is what a program left behind.
type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int   // exit status, -1 if it was killed or did not start
	Err            error // nil if it exited 0
	Took           time.Duration
}

// String is for messages of failed tests.
func (r Result) String() string {
	return fmt.Sprintf("%s: exit %d after %v: %v\n%s%s", strings.Join(r.Args, " "), r.Code, r.Took.Round(time.Millisecond), r.Err, r.Stdout, r.Stderr)
}

// Run runs a program on the machine to its end.
func (m *Machine) Run(timeout time.Duration, name string, args ...string) Result {
	return m.RunInput(timeout, "", name, args...)
}

// RunInput is Run with a standard input.
func (m *Machine) RunInput(timeout time.Duration, input, name string, args ...string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return Finish(m.Command(ctx, name, args...), input)
}

// CommandOutside is Command for the world outside the machine.
func (m *Machine) CommandOutside(ctx context.Context, name string, args ...string) *exec.Cmd {
	return m.command(ctx, m.outside, name, args...)
}

// RunOutside runs a program in the world outside the machine.
func (m *Machine) RunOutside(timeout time.Duration, name string, args ...string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return Finish(m.CommandOutside(ctx, name, args...), "")
}

// Finish runs a prepared command to its end.
func Finish(cmd *exec.Cmd, input string) Result {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if input != "" {
		cmd.Stdin = strings.NewReader(input)
	}
	begin := time.Now()
	err := cmd.Run()
	r := Result{Args: cmd.Args, Stdout: stdout.String(), Stderr: stderr.String(), Err: err, Took: time.Since(begin), Code: -1}
	if cmd.ProcessState != nil {
		r.Code = cmd.ProcessState.ExitCode()
	}
	for i, a := range r.Args {
		if strings.HasPrefix(a, "--wdns=") {
			r.Args = r.Args[i+1:]
			break
		}
	}
	return r
}

// Tutti runs bin/tutti on the machine.
func (m *Machine) Tutti(args ...string) Result {
	return m.Run(3*time.Minute, m.Binary(), args...)
}

// Kubectl runs the embedded kubectl on the machine.
func (m *Machine) Kubectl(args ...string) Result {
	return m.Tutti(append([]string{"kubectl"}, args...)...)
}

// Apply gives a manifest to kubectl apply.
func (m *Machine) Apply(manifest string) Result {
	return m.RunInput(time.Minute, manifest, m.Binary(), "kubectl", "apply", "-f", "-")
}

// Up starts tutti and returns when it says that it is ready.
func (m *Machine) Up() error {
	if _, err := os.Stat(m.Binary()); err != nil {
		return fmt.Errorf("there is no bin/tutti, run make build: %w", err)
	}
	if r := m.Tutti("up"); r.Err != nil {
		return errors.New(r.String())
	}
	return nil
}

// Purge stops tutti and has it remove every trace.
func (m *Machine) Purge() error {
	if r := m.Tutti("stop", "--purge"); r.Err != nil {
		return errors.New(r.String())
	}
	return nil
}

// Close ends everything on the machine at once and removes it.
func (m *Machine) Close() error {
	var errs []error
	for _, h := range []*holder{m.inside, m.outside} {
		if h != nil && (h != m.outside || !m.guest) {
			errs = append(errs, h.close())
		}
	}
	errs = append(errs, m.removeCgroups(), os.RemoveAll(filepath.Join("/run", m.root())), os.RemoveAll(m.temp))
	if m.claim != nil {
		errs = append(errs, m.claim.Close())
	}
	return errors.Join(errs...)
}

// Client speaks HTTP from the machine itself.
func (m *Machine) Client() *http.Client { return client(m.inside) }

// OutsideClient speaks HTTP from the world outside.
func (m *Machine) OutsideClient() *http.Client { return client(m.outside) }

func client(h *holder) *http.Client {
	return &http.Client{
		Timeout:   10 * time.Second,
		Transport: &http.Transport{DialContext: h.dial, DisableKeepAlives: true},
	}
}

// Dial opens a connection from the machine itself. The address is a number:
// names would be asked of the host.
func (m *Machine) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return m.inside.dial(ctx, network, address)
}

// dial opens the socket in the holder's network; where it was opened it stays.
func (h *holder) dial(ctx context.Context, network, address string) (net.Conn, error) {
	var conn net.Conn
	err := h.inNetwork(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens on the machine.
func (m *Machine) Listen(network, address string) (net.Listener, error) {
	return m.inside.listen(network, address)
}

// ListenOutside listens in the world outside.
func (m *Machine) ListenOutside(network, address string) (net.Listener, error) {
	return m.outside.listen(network, address)
}

func (h *holder) listen(network, address string) (net.Listener, error) {
	var l net.Listener
	err := h.inNetwork(func() (err error) {
		l, err = net.Listen(network, address)
		return err
	})
	return l, err
}

// inNetwork calls f on a thread that is in the holder's network namespace.
func (h *holder) inNetwork(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with this goroutine.
		runtime.LockOSThread()
		ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", h.pid()))
		if err != nil {
			done <- err
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("enter the machine's network: %w", err)
			return
		}
		done <- f()
	}()
	return <-done
}
