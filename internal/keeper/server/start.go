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
	if err == nil {
		config.Rlimits, err = rlimits(spec.Process.Rlimits)
	}
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

	out, err := newOutput(req.Envelope.Log, s.log)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	w.out = out
	p := &proc{Process: spec.Process}
	streams, err := w.openStreams(p, rootOf(config))
	defer streams.close()
	if err != nil {
		return err
	}
	s.children.begin()
	pid, err := s.engineOf(req.Envelope).start(w, spec, config, p)
	if err != nil {
		pid = 0
	}
	s.children.end(pid)
	if err != nil {
		return startError(err)
	}
	// What is said of a start that failed is not the workload's own.
	w.pump(streams.ours)
	streams.ours = nil
	if streams.terminal != nil {
		if err := w.openTerminal(streams.terminal); err != nil {
			s.log.Error("terminal was not received", "workload", req.Id, "err", err)
		}
	}

	// It runs, and is on record; unless it cannot be watched.
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rec.Phase, w.rec.PID, w.rec.Started = running, pid, time.Now().UTC()
	if w.rec.StartTicks, w.pidfd, err = watch(pid); err != nil {
		s.children.abandon(pid)
		return fmt.Errorf("watch process %d: %w", pid, err)
	}
	if err := w.save(); err != nil {
		s.log.Error("record of workload not written", "workload", req.Id, "err", err)
	}
	return nil
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

// streams are the two sides of a workload's standard streams.
type streams struct {
	child    []*os.File // the process's, to be closed once it has them
	ours     []*os.File // what is read of it
	terminal *os.File   // the socket that its terminal's master end comes from
}

// close closes what nobody has taken.
func (s *streams) close() {
	for _, f := range append(s.child, s.ours...) {
		f.Close()
	}
	if s.terminal != nil {
		s.terminal.Close()
	}
}

// openStreams makes the standard streams of a process.
//
// The process holds each of its FIFOs for reading and writing, so that it
// lives on, at most waiting for room, while there is no keeper.
func (w *workload) openStreams(p *proc, root owner) (s *streams, err error) {
	s = new(streams)
	env := w.rec.Envelope
	if env.Tty {
		s.terminal, p.console, err = utils.NewSockPair("console")
		if err == nil {
			s.child = append(s.child, p.console)
		}
		return s, err
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
			s.child = append(s.child, f)
			err = root.own(f)
		}
		return f, err
	}
	if p.stdout, err = make(stdoutFIFO, unix.O_RDWR); err != nil {
		return s, err
	}
	if p.stderr, err = make(stderrFIFO, unix.O_RDWR); err != nil {
		return s, err
	}
	if env.Stdin {
		// To see its end when the first client has gone, the process must
		// not be a writer itself.
		flags := unix.O_RDWR
		if env.StdinOnce {
			flags = unix.O_RDONLY | unix.O_NONBLOCK
		}
		if p.stdin, err = make(stdinFIFO, flags); err != nil {
			return s, err
		}
	}
	if s.ours, err = w.openFIFOs(); err != nil {
		return s, err
	}
	if env.Stdin && env.StdinOnce {
		err = unix.SetNonblock(int(p.stdin.Fd()), false)
	}
	return s, err
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

// openFIFOs opens the keeper's ends of the FIFOs. Those to be read are named
// after their streams.
func (w *workload) openFIFOs() (read []*os.File, err error) {
	for _, name := range []string{stdoutFIFO, stderrFIFO} {
		f, err := openNonblock(filepath.Join(w.dir, name), unix.O_RDONLY)
		if err != nil {
			return read, err
		}
		read = append(read, f)
	}
	if w.rec.Envelope.Stdin {
		f, err := openNonblock(filepath.Join(w.dir, stdinFIFO), unix.O_WRONLY)
		// Nobody reads: the process has closed its standard input.
		if errors.Is(err, unix.ENXIO) {
			return read, nil
		}
		if err != nil {
			return read, err
		}
		w.input = f
	}
	return read, nil
}

// pump reads what openFIFOs has opened.
func (w *workload) pump(read []*os.File) {
	for _, f := range read {
		w.out.pump(filepath.Base(f.Name()), f)
	}
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

// theirs matches what libcontainer says when the specification cannot work,
// rather than the machine, and then what crun says.
var theirs = regexp.MustCompile(`exec: ".*|error mounting .*|error setting rlimits? .*|chdir to cwd .*|mkdir .*: (?:not a directory|file exists).*` +
	"|(?:open )?executable[: ].*|mount `.*|chdir .*")

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
