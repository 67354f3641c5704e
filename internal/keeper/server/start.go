//go:build cgo

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runc/libcontainer/utils"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper/protocol"
)

// launch creates the workload's container and starts its program. What it
// leaves behind when it fails is removed by forget.
func (s *Server) launch(w *workload, req *protocol.StartRequest) error {
	spec := new(specs.Spec)
	if err := json.Unmarshal(req.Spec, spec); err != nil {
		return status.Errorf(codes.InvalidArgument, "read specification: %v", err)
	}
	if spec.Process == nil || spec.Linux == nil || len(spec.Process.Args) == 0 {
		return status.Error(codes.InvalidArgument, "specification has nothing to run")
	}
	// What the descriptors are is the keeper's affair.
	spec.Process.Terminal = req.Envelope.Tty
	if err := os.MkdirAll(w.dir, 0o700); err != nil {
		return err
	}
	if err := w.saveProcess(spec.Process); err != nil {
		return err
	}
	// To read the mappings of a user namespace takes a child.
	s.children.begin()
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName: req.Id, NoNewKeyring: true, Spec: spec,
	})
	s.children.end(0)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "%v", err)
	}
	groups, err := manager.New(config.Cgroups)
	if err != nil {
		return fmt.Errorf("find control groups: %w", err)
	}
	w.mu.Lock()
	w.rec = record{
		ID: req.Id, Envelope: req.Envelope, Phase: creating, Boot: bootID(),
		Cgroups: groups.GetPaths(),
		OwnPIDs: config.Namespaces.IsPrivate(configs.NEWPID),
	}
	err = w.save()
	w.mu.Unlock()
	if err != nil {
		return err
	}

	proc, err := newProcess(spec.Process)
	if err != nil {
		return status.Errorf(codes.InvalidArgument, "%v", err)
	}
	proc.Init = true
	out, err := newOutput(req.Envelope.Log, s.log)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	w.out = out
	child, receive, err := w.openStreams(proc, rootOf(config))
	defer func() {
		for _, f := range child {
			f.Close()
		}
	}()
	if err != nil {
		return err
	}

	container, err := libcontainer.Create(s.runcDir(), req.Id, config)
	if err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	s.children.begin()
	pid, err := s.execute(w, container, proc, receive)
	s.children.end(pid)
	if err != nil {
		// A container that got as far as waiting for its start is killed.
		if p, perr := proc.Pid(); perr == nil && p > 0 {
			_ = proc.Signal(unix.SIGKILL)
			_, _ = proc.Wait()
		}
		_ = container.Destroy()
		return startError(err)
	}
	return nil
}

// execute makes the container, records it and only then lets its program
// begin: what has begun is on record, so that no keeper begins it again.
func (s *Server) execute(w *workload, container *libcontainer.Container, proc *libcontainer.Process, receive *os.File) (pid int, err error) {
	if err := container.Start(proc); err != nil {
		return 0, err
	}
	if pid, err = proc.Pid(); err != nil {
		return 0, err
	}
	if receive != nil {
		if err := w.openTerminal(receive); err != nil {
			s.log.Error("terminal was not received", "workload", w.rec.ID, "err", err)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rec.Phase, w.rec.PID, w.rec.Started = running, pid, time.Now().UTC()
	if w.rec.StartTicks, w.pidfd, err = watch(pid); err == nil {
		if err = w.save(); err == nil {
			err = container.Exec()
		}
	}
	if err == nil {
		return pid, nil
	}
	if w.pidfd != nil {
		w.pidfd.Close()
		w.pidfd = nil
	}
	return 0, err
}

// watch opens a child that was not reaped yet.
func watch(pid int) (ticks uint64, pidfd *os.File, err error) {
	if ticks, err = process.StartTicks(pid); err == nil {
		pidfd, err = process.Open(pid, ticks)
	}
	return ticks, pidfd, err
}

// Names of a workload's FIFOs.
const (
	stdinFIFO  = "stdin"
	stdoutFIFO = "stdout"
	stderrFIFO = "stderr"
)

// openStreams gives the process its standard streams and starts to read them.
// child are the process's ends, to be closed once it has them. With a
// terminal, receive is the socket that its master end will come from.
//
// The process holds each of its FIFOs for reading and writing, so that it
// lives on, at most waiting for room, while there is no keeper.
func (w *workload) openStreams(proc *libcontainer.Process, root owner) (child []*os.File, receive *os.File, err error) {
	env := w.rec.Envelope
	if env.Tty {
		receive, proc.ConsoleSocket, err = utils.NewSockPair("console")
		if err != nil {
			return nil, nil, err
		}
		return []*os.File{proc.ConsoleSocket}, receive, nil
	}
	open := func(name string, flags int) (*os.File, error) {
		path := filepath.Join(w.dir, name)
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	make := func(name string, flags int) (f *os.File, err error) {
		if err := unix.Mkfifo(filepath.Join(w.dir, name), 0o600); err != nil && !errors.Is(err, os.ErrExist) {
			return nil, fmt.Errorf("make FIFO %s: %w", name, err)
		}
		if f, err = open(name, flags); err == nil {
			child = append(child, f)
			err = root.own(f)
		}
		return f, err
	}
	stdout, err := make(stdoutFIFO, unix.O_RDWR)
	if err != nil {
		return child, nil, err
	}
	stderr, err := make(stderrFIFO, unix.O_RDWR)
	if err != nil {
		return child, nil, err
	}
	proc.Stdout, proc.Stderr = stdout, stderr
	if env.Stdin {
		// To see its end when the first client has gone, the process must
		// not be a writer itself.
		flags := unix.O_RDWR
		if env.StdinOnce {
			flags = unix.O_RDONLY | unix.O_NONBLOCK
		}
		stdin, err := make(stdinFIFO, flags)
		if err != nil {
			return child, nil, err
		}
		proc.Stdin = stdin
	}
	if err := w.openFIFOs(); err != nil {
		return child, nil, err
	}
	if env.Stdin && env.StdinOnce {
		if err := unix.SetNonblock(int(proc.Stdin.(*os.File).Fd()), false); err != nil {
			return child, nil, err
		}
	}
	return child, nil, nil
}

// owner is the root of a container as the machine sees it.
type owner struct{ uid, gid int }

// rootOf asks a configuration that has been accepted, so that it knows.
func rootOf(config *configs.Config) owner {
	uid, _ := config.HostRootUID()
	gid, _ := config.HostRootGID()
	return owner{uid, gid}
}

// own gives a pipe to the container's root, who then can give it to the
// process's user. Other files are left as they are.
func (o owner) own(f *os.File) error {
	if o.uid == 0 {
		return nil
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &stat); err != nil {
		return os.NewSyscallError("fstat", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	return os.NewSyscallError("fchown", unix.Fchown(int(f.Fd()), o.uid, o.gid))
}

// openFIFOs opens the keeper's ends of the FIFOs and reads them.
func (w *workload) openFIFOs() error {
	for _, name := range []string{stdoutFIFO, stderrFIFO} {
		f, err := openNonblock(filepath.Join(w.dir, name), unix.O_RDONLY)
		if err != nil {
			return err
		}
		w.out.pump(name, f)
	}
	if w.rec.Envelope.Stdin {
		f, err := openNonblock(filepath.Join(w.dir, stdinFIFO), unix.O_WRONLY)
		// Nobody reads: the process has closed its standard input.
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return err
		}
		w.input = f
	}
	return nil
}

func openNonblock(path string, flags int) (*os.File, error) {
	fd, err := unix.Open(path, flags|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// openTerminal takes the master end of the workload's terminal from socket.
func (w *workload) openTerminal(socket *os.File) error {
	defer socket.Close()
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(int(socket.Fd()), make([]byte, 4096), oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
	if err != nil {
		return os.NewSyscallError("recvmsg", err)
	}
	files, err := parseFiles(oob[:n])
	if err != nil {
		return err
	}
	if len(files) != 1 {
		return fmt.Errorf("%d descriptors instead of one", len(files))
	}
	w.useTerminal(nonblocking(files[0]))
	return nil
}

func (w *workload) useTerminal(master *os.File) {
	w.mu.Lock()
	w.input = master
	w.mu.Unlock()
	w.out.pump("stdout", master)
}

func newProcess(p *specs.Process) (*libcontainer.Process, error) {
	proc := &libcontainer.Process{
		Args: p.Args, Env: p.Env, Cwd: p.Cwd,
		UID: int(p.User.UID), GID: int(p.User.GID),
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile,
		Label:           p.SelinuxLabel,
	}
	for _, g := range p.User.AdditionalGids {
		proc.AdditionalGroups = append(proc.AdditionalGroups, int(g))
	}
	if c := p.Capabilities; c != nil {
		proc.Capabilities = &configs.Capabilities{
			Bounding: c.Bounding, Effective: c.Effective, Permitted: c.Permitted,
			Inheritable: c.Inheritable, Ambient: c.Ambient,
		}
	}
	if p.ConsoleSize != nil {
		proc.ConsoleWidth, proc.ConsoleHeight = uint16(p.ConsoleSize.Width), uint16(p.ConsoleSize.Height)
	}
	return proc, nil
}

// theirs matches what libcontainer says when the specification cannot work,
// rather than the machine.
var theirs = regexp.MustCompile(`exec: ".*|error mounting .*|chdir to cwd .*|mkdir .*: (?:not a directory|file exists).*`)

func startError(err error) error {
	text := strings.TrimSpace(err.Error())
	if m := theirs.FindString(text); m != "" {
		return status.Error(codes.InvalidArgument, m)
	}
	if strings.Contains(text, "OOM-killed") {
		return status.Error(codes.InvalidArgument, "container init was OOM-killed (memory limit too low?)")
	}
	return fmt.Errorf("start container: %w", err)
}
