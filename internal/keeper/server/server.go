//go:build cgo

// Package server is the keeper: a small process, parent of every workload on
// its machine, that owns their exit codes and their output. It restarts
// nothing and decides nothing. It outlives whoever uses it, and workloads
// outlive it: everything a successor needs is in its directory.
//
//	lock                       flock of the running keeper
//	keeper.sock                the calls of protocol.Keeper, by ttrpc
//	keeper-io.sock             exec and attach, with the client's descriptors
//	runc/<id>/                 libcontainer's own state
//	workloads/<id>/            the record of each workload, its FIFOs, and what
//	                           another OCI runtime keeps of it
package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // without it no container starts
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// Server keeps the workloads of one directory.
type Server struct {
	dir      string
	binary   string
	log      *slog.Logger
	children children
	watchers watchers
	stop     func()

	mu        sync.Mutex
	workloads map[string]*workload
	closing   bool
	starts    sync.WaitGroup // calls of Start that run

	// ending is held for reading from when a workload's exit is taken from
	// the kernel, which tells it once, until it is recorded.
	ending sync.RWMutex

	ttrpc, io net.Listener
	lock      *os.File
}

// Run keeps the workloads of dir until ctx ends or it is asked to shut down.
// ready is called once it can be connected to. When ctx ends, workloads are
// left running for the next keeper.
func Run(ctx context.Context, dir string, log *slog.Logger, ready func()) error {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	s := &Server{
		dir: dir, log: log, stop: stop,
		children:  children{own: map[int]struct{}{}},
		workloads: map[string]*workload{},
	}
	var err error
	if s.binary, err = os.Readlink("/proc/self/exe"); err != nil {
		return err
	}
	for _, d := range []string{dir, s.workloadDir(""), s.runcDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	inherited, err := takeHandover()
	if err != nil {
		return err
	}
	if s.lock = inherited.file(lockName); s.lock == nil {
		if s.lock, err = takeLock(ctx, filepath.Join(dir, lockName)); err != nil {
			return err
		}
	}
	// It is never closed: the lock is free when the process has gone.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become subreaper: %w", err)
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	defer signal.Stop(died)
	s.children.begin() // none is reaped before it is known whose they are
	go func() {
		for {
			select {
			case <-died:
				s.children.sweep()
			case <-ctx.Done():
				return
			}
		}
	}()

	if s.ttrpc, err = s.listen(inherited, protocol.Socket, "unix"); err != nil {
		return err
	}
	defer s.ttrpc.Close()
	if s.io, err = s.listen(inherited, protocol.IOSocket, "unixpacket"); err != nil {
		return err
	}
	defer s.io.Close()
	s.adopt(inherited)
	s.children.end(0)

	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	protocol.RegisterKeeperService(server, s)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(ctx, s.ttrpc) }()
	go s.serveIO(ctx, s.io)
	ready()
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	// Let the answer to Shutdown get out before connections are closed.
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	_ = server.Shutdown(grace)
	_ = server.Close()
	return err
}

const lockName = "lock"

func (s *Server) workloadDir(id string) string { return filepath.Join(s.dir, "workloads", id) }
func (s *Server) runcDir() string              { return filepath.Join(s.dir, "runc") }

// takeLock waits a little, since a keeper that was killed holds its lock until
// the kernel has cleaned up after it.
func takeLock(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	locked := make(chan error, 1)
	go func() { locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-locked:
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
	case <-time.After(5 * time.Second):
		return nil, fmt.Errorf("another keeper holds %s", path)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	return f, nil
}

// listen binds a socket in the keeper's directory, unless it was inherited.
func (s *Server) listen(inherited handover, name, network string) (net.Listener, error) {
	if f := inherited.file(name); f != nil {
		defer f.Close()
		return net.FileListener(f)
	}
	_ = os.Remove(filepath.Join(s.dir, name))
	return listenIn(s.dir, name, network)
}

// listenIn binds a socket by way of a descriptor of its directory, since a
// socket's path may have 107 bytes at most.
func listenIn(path, name, network string) (*net.UnixListener, error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	l, err := net.ListenUnix(network, &net.UnixAddr{
		Name: fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name), Net: network,
	})
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(path, name), err)
	}
	l.SetUnlinkOnClose(false)
	return l, os.Chmod(filepath.Join(path, name), 0o600)
}

func (s *Server) find(id string) (*workload, error) {
	s.mu.Lock()
	w, ok := s.workloads[id]
	s.mu.Unlock()
	if !ok {
		return nil, notFound(id)
	}
	<-w.launched
	if w.startErr != nil {
		return nil, notFound(id)
	}
	return w, nil
}

// Info says who the keeper is.
func (s *Server) Info(context.Context, *protocol.InfoRequest) (*protocol.InfoResponse, error) {
	return &protocol.InfoResponse{Pid: int32(os.Getpid()), Binary: s.binary}, nil
}

// Start starts a workload unless its id is known. It is not interrupted when
// the caller goes away.
func (s *Server) Start(_ context.Context, req *protocol.StartRequest) (*protocol.Workload, error) {
	if req.Id == "" || req.Envelope == nil {
		return nil, status.Error(codes.InvalidArgument, "a workload needs an id and an envelope")
	}
	if !fs.ValidPath(req.Id) || req.Id == "." || strings.ContainsAny(req.Id, "/\x00") {
		return nil, status.Errorf(codes.InvalidArgument, "id %q is no name of a directory", req.Id)
	}
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil, status.Error(codes.Unavailable, "keeper is closing")
	}
	w, known := s.workloads[req.Id]
	if !known {
		w = newWorkload(s.workloadDir(req.Id))
		s.workloads[req.Id] = w
		s.starts.Add(1)
		defer s.starts.Done()
	}
	s.mu.Unlock()
	if known {
		<-w.launched
		if w.startErr != nil {
			return nil, w.startErr
		}
		return w.message(), nil
	}

	if w.startErr = s.launch(w, req); w.startErr != nil {
		s.forget(w, req.Id)
		close(w.launched)
		return nil, w.startErr
	}
	m := w.message()
	close(w.launched)
	s.watchers.tell(w)
	go s.attend(w)
	return m, nil
}

// forget removes what a failed start has left.
func (s *Server) forget(w *workload, id string) {
	if w.out != nil {
		w.out.finish()
		w.out = nil
	}
	if w.input != nil {
		w.input.Close()
	}
	w.rec.ID = id
	if err := errors.Join(w.killAll(), s.clear(w), os.RemoveAll(w.dir)); err != nil {
		s.log.Error("failed start left something behind", "workload", id, "err", err)
	}
	s.mu.Lock()
	delete(s.workloads, id)
	s.mu.Unlock()
}

// Get returns one workload.
func (s *Server) Get(_ context.Context, req *protocol.WorkloadRequest) (*protocol.Workload, error) {
	w, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	return w.message(), nil
}

// List returns all workloads that were started, by id.
func (s *Server) List(context.Context, *protocol.ListRequest) (*protocol.ListResponse, error) {
	list := &protocol.ListResponse{}
	for _, w := range s.all() {
		select {
		case <-w.launched:
			if w.startErr == nil {
				list.Workloads = append(list.Workloads, w.message())
			}
		default:
		}
	}
	slices.SortFunc(list.Workloads, func(a, b *protocol.Workload) int { return cmp.Compare(a.Id, b.Id) })
	return list, nil
}

func (s *Server) all() []*workload {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*workload, 0, len(s.workloads))
	for _, w := range s.workloads {
		all = append(all, w)
	}
	return all
}

// Watch streams changes until the caller or the keeper goes away.
func (s *Server) Watch(ctx context.Context, _ *protocol.WatchRequest, stream protocol.Keeper_WatchServer) error {
	watcher := s.watchers.add()
	defer s.watchers.remove(watcher)
	if err := stream.Send(&protocol.WatchEvent{}); err != nil {
		return err
	}
	for {
		select {
		case <-watcher.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		for w := range watcher.take() {
			if err := stream.Send(&protocol.WatchEvent{Workload: w.message()}); err != nil {
				return err
			}
		}
	}
}

// Signal sends a signal; to a workload that has ended it does nothing.
func (s *Server) Signal(_ context.Context, req *protocol.SignalRequest) (*protocol.Empty, error) {
	w, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	return &protocol.Empty{}, w.signal(unix.Signal(req.Signal))
}

// Update changes the limits of a running workload.
func (s *Server) Update(_ context.Context, req *protocol.UpdateRequest) (*protocol.Empty, error) {
	w, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	var r specs.LinuxResources
	if err := json.Unmarshal(req.Resources, &r); err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "read resources: %v", err)
	}
	if !w.runs() {
		return nil, notRunning(req.Id)
	}
	groups, err := w.groups()
	if err != nil {
		return nil, err
	}
	if err := groups.Set(limits(&r)); err != nil {
		return nil, fmt.Errorf("update limits of %s: %w", req.Id, err)
	}
	return &protocol.Empty{}, nil
}

func limits(r *specs.LinuxResources) *cgroups.Resources {
	c := &cgroups.Resources{SkipDevices: true, Unified: r.Unified}
	if cpu := r.CPU; cpu != nil {
		if cpu.Shares != nil {
			c.CpuShares = *cpu.Shares
			c.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*cpu.Shares)
		}
		if cpu.Quota != nil {
			c.CpuQuota = *cpu.Quota
		}
		if cpu.Period != nil {
			c.CpuPeriod = *cpu.Period
		}
		c.CpusetCpus = cpu.Cpus
	}
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			c.Memory = *m.Limit
		}
		if m.Swap != nil {
			c.MemorySwap = *m.Swap
		}
	}
	if r.Pids != nil {
		c.PidsLimit = r.Pids.Limit
	}
	for _, h := range r.HugepageLimits {
		c.HugetlbLimit = append(c.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	return c
}

// Remove forgets a workload that has ended, or that it ends first.
func (s *Server) Remove(ctx context.Context, req *protocol.RemoveRequest) (*protocol.Empty, error) {
	w, err := s.find(req.Id)
	if status.Code(err) == codes.NotFound {
		return &protocol.Empty{}, nil
	}
	if err != nil {
		return nil, err
	}
	if w.runs() {
		if !req.Kill {
			return nil, status.Errorf(codes.Aborted, "workload %s is running", req.Id)
		}
		if err := w.signal(unix.SIGKILL); err != nil {
			return nil, err
		}
	}
	select {
	case <-w.cleared:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if err := os.RemoveAll(w.dir); err != nil {
		return nil, err
	}
	s.mu.Lock()
	if s.workloads[req.Id] == w {
		delete(s.workloads, req.Id)
	}
	s.mu.Unlock()
	return &protocol.Empty{}, nil
}

func (w *workload) runs() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.rec.Phase == running
}

// Stats returns what a running workload uses.
func (s *Server) Stats(_ context.Context, req *protocol.WorkloadRequest) (*protocol.StatsResponse, error) {
	w, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	if !w.runs() {
		return nil, notRunning(req.Id)
	}
	groups, err := w.groups()
	if err != nil {
		return nil, err
	}
	stats, err := groups.Stats(&cgroups.StatsOptions{Controllers: cgroups.CPU | cgroups.Memory | cgroups.Pids})
	if err != nil {
		return nil, fmt.Errorf("read usage of %s: %w", req.Id, err)
	}
	m := stats.MemoryStats
	cold := m.Stats["total_inactive_file"]
	if cgroups.IsCgroup2UnifiedMode() {
		cold = m.Stats["inactive_file"]
	}
	return &protocol.StatsResponse{
		UnixNano:  time.Now().UnixNano(),
		CpuNanos:  stats.CpuStats.CpuUsage.TotalUsage,
		Memory:    m.Usage.Usage,
		WorkSet:   m.Usage.Usage - min(cold, m.Usage.Usage),
		Processes: stats.PidsStats.Current,
	}, nil
}

// Settle replaces an unknown exit by one that the caller saw.
func (s *Server) Settle(_ context.Context, req *protocol.SettleRequest) (*protocol.Empty, error) {
	w, err := s.find(req.Id)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	settled := w.rec.Phase == exited && w.rec.Unknown
	if settled {
		w.rec.Unknown, w.rec.Status = false, unix.WaitStatus(req.WaitStatus)
		err = w.save()
	}
	w.mu.Unlock()
	if settled {
		s.watchers.tell(w)
	}
	return &protocol.Empty{}, err
}

// Shutdown kills everything and ends the keeper.
func (s *Server) Shutdown(ctx context.Context, _ *protocol.ShutdownRequest) (*protocol.Empty, error) {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.starts.Wait()
	var errs []error
	for _, w := range s.all() {
		if <-w.launched; w.startErr == nil {
			errs = append(errs, w.signal(unix.SIGKILL))
		}
	}
	for _, w := range s.all() {
		select {
		case <-w.cleared:
		case <-ctx.Done():
			return nil, errors.Join(append(errs, ctx.Err())...)
		}
	}
	s.stop()
	return &protocol.Empty{}, errors.Join(errs...)
}
