// Package container runs workloads as OCI containers. It prepares their ground
// and their file systems in the data directory and has the keeper start and
// hold them:
//
//	pods/<uid>/pod.json                              the pod as it was opened
//	pods/<uid>/ns/{ipc,uts,pid,user,net}             its pinned namespaces
//	pods/<uid>/shm                                   its /dev/shm
//	pods/<uid>/containers/<name>/<attempt>/          upper, work, root
//	/run/<cgroup root>/<uid>_<name>_<attempt>/root   the root in a pod with a user namespace
package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/internal/runtime"
)

// Config of a Runtime.
type Config struct {
	// Dir is the data directory.
	Dir string
	// CgroupRoot is the control group that holds all others: "tutti-1a2b".
	CgroupRoot string
	// Class sets this runtime's workloads apart from those of others with the
	// same keeper: List and Watch tell of no others. "" is "container".
	Class string
	// Program is the path of an OCI runtime with runc's command line that makes
	// the containers; "": the keeper does so itself.
	Program string
	// Machine makes the roots of workloads that have the machine's own file
	// system; nil: there are none.
	Machine func(w runtime.Workload, dir string) (Root, error)
	Keeper  *keeper.Client
	Log     *slog.Logger
}

// Root is what a workload finds at "/".
type Root struct {
	// Path is a directory that is to become it, with Mounts, in this order.
	Path     string
	Mounts   []specs.Mount
	ReadOnly bool
	Masked   []string // paths that are shown empty
	// Programs is where users, groups and programs can be looked up before
	// that has happened.
	Programs string
}

// Runtime implements runtime.Runtime.
type Runtime struct {
	Config
	locks     locks
	records   sync.Map     // those on disk of pods that this Runtime has opened, by ID
	canMapIDs func() error // looks once
}

var _ runtime.Runtime = (*Runtime)(nil)

// New returns the runtime of a data directory.
func New(c Config) (*Runtime, error) {
	if c.Dir == "" || strings.Trim(c.CgroupRoot, "/") == "" || c.Keeper == nil {
		return nil, errors.New("container runtime: data directory, cgroup root and keeper are needed")
	}
	if c.Class == "" {
		c.Class = defaultClass
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	dir, err := filepath.Abs(c.Dir)
	if err != nil {
		return nil, err
	}
	c.Dir = dir
	r := &Runtime{Config: c}
	r.canMapIDs = sync.OnceValue(r.probeIDs)
	if c.Program != "" {
		r.canMapIDs = func() error { return errNoUsers }
	}
	return r, nil
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, w runtime.Workload) (runtime.Status, error) {
	if w.Name == "" || strings.ContainsAny(w.Pod+w.Name, "/_") {
		return runtime.Status{}, fmt.Errorf("%w: %q is no name for a container", runtime.ErrInvalid, w.Name)
	}
	defer r.locks.lock(w.ID.String())()
	pod, err := r.pod(w.Pod)
	if err != nil {
		return runtime.Status{}, err
	}
	dir := r.attemptDir(w.ID)
	if _, err := os.Stat(dir); err == nil {
		// Something of it is there: it may have been started.
		known, err := r.Keeper.Get(ctx, w.ID.String())
		if err == nil {
			return r.status(known), nil
		}
		if !errors.Is(err, keeper.ErrNotFound) {
			return runtime.Status{}, fmt.Errorf("start %s: %w", w.ID, err)
		}
	}
	if pod.SharePID {
		if err := r.startPause(ctx, pod); err != nil {
			return runtime.Status{}, fmt.Errorf("start %s: %w", w.ID, err)
		}
	}
	started, err := r.start(ctx, pod, w, dir)
	if err != nil && ctx.Err() != nil {
		// The keeper is not interrupted: what it was asked to start runs, or
		// is about to, from this directory. The next Start finds out.
		return runtime.Status{}, fmt.Errorf("start %s: %w", w.ID, err)
	}
	if err != nil {
		if cerr := r.removeAttempt(w.ID, dir); cerr != nil {
			r.Log.Error("failed start left something behind", "workload", w.ID.String(), "err", cerr)
		}
		return runtime.Status{}, fmt.Errorf("start %s: %w", w.Name, convert(err))
	}
	return r.status(started), nil
}

func (r *Runtime) start(ctx context.Context, pod runtime.Pod, w runtime.Workload, dir string) (*protocol.Workload, error) {
	if err := r.removeAttempt(w.ID, dir); err != nil {
		return nil, err
	}
	root, err := r.root(pod, w, dir)
	if err != nil {
		return nil, err
	}
	spec, err := r.spec(ctx, pod, w, root)
	if err != nil {
		return nil, err
	}
	if w.JoinPID != nil && !pod.HostPID && !pod.SharePID {
		ns, err := r.pidNamespace(ctx, pod, *w.JoinPID)
		if err != nil {
			return nil, fmt.Errorf("join the processes of %s: %w", w.JoinPID.Name, err)
		}
		defer ns.Close()
		i := slices.IndexFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.PIDNamespace })
		spec.Linux.Namespaces[i].Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
	}
	rules, err := r.landlock(ctx, spec, w)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	labels := map[string]string{
		labelClass: r.Class, labelPod: w.Pod, labelName: w.Name, labelAttempt: strconv.Itoa(w.Attempt),
		labelStopSignal: strconv.Itoa(int(w.StopSignal)),
	}
	u := spec.Process.User
	user, err := json.Marshal(runtime.User{UID: int64(u.UID), GID: int64(u.GID), Groups: int64s(u.AdditionalGids)})
	if err != nil {
		return nil, err
	}
	labels[labelProcessUser] = string(user)
	if rules != "" {
		labels[labelLandlock] = rules
	}
	for k, v := range w.Labels {
		labels[labelUser+k] = v
	}
	return r.Keeper.Start(ctx, w.ID.String(), data, &protocol.Envelope{
		Log: w.Log, Tty: w.TTY, Stdin: w.Stdin, StdinOnce: w.StdinOnce, Labels: labels, Program: r.Program,
	})
}

// root makes what a workload finds at "/". dir is the attempt's own.
func (r *Runtime) root(pod runtime.Pod, w runtime.Workload, dir string) (Root, error) {
	if w.Machine == "" {
		path, err := r.mountRoot(pod, w, dir)
		return Root{Path: path, Programs: path, ReadOnly: w.ReadOnlyRoot}, err
	}
	if r.Machine == nil || pod.IDs.Size > 0 {
		return Root{}, fmt.Errorf("give the machine's file system to a container: %w", errors.ErrUnsupported)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Root{}, err
	}
	return r.Machine(w, dir)
}

// mountRoot mounts a workload's layers and its writable one.
func (r *Runtime) mountRoot(pod runtime.Pod, w runtime.Workload, dir string) (root string, err error) {
	root, layers := r.rootDir(pod, w.ID), w.Layers
	upper, work := filepath.Join(dir, UpperDir), filepath.Join(dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	if pod.IDs.Size == 0 {
		if err := os.MkdirAll(root, 0o755); err != nil {
			return "", err
		}
		return root, mount.Overlay(root, layers, upper, work)
	}
	if err := r.makeOpenRoot(pod, w.ID); err != nil {
		return "", err
	}
	if err := os.Chown(upper, int(pod.IDs.First), int(pod.IDs.First)); err != nil {
		return "", err
	}
	layers, done, err := r.mapLayers(pod, layers, filepath.Join(dir, mappedDir))
	if err == nil {
		err = mount.Overlay(root, layers, upper, work)
	}
	return root, errors.Join(err, done())
}

// Names in an attempt's directory: what the workload writes outside of its
// volumes, on disk and in memory.
const (
	UpperDir  = "upper"
	MemoryDir = "memory"
)

// What the keeper keeps for this package, and under labelUser for its caller.
const (
	labelClass      = "class"
	labelPod        = "pod"
	labelName       = "name"
	labelAttempt    = "attempt"
	labelStopSignal = "stop-signal"
	labelUser       = "label/"
	// labelProcessUser has a runtime.User in JSON.
	labelProcessUser = "user"
	// labelLandlock has the rules that programs in the workload are held to.
	labelLandlock = "landlock"
)

// defaultClass is that of workloads which have no label of one, too: there was
// no other when they were started.
const defaultClass = "container"

// shows tells whether a workload of the keeper is one that List and Watch tell
// of.
func (r *Runtime) shows(w *protocol.Workload) bool {
	class, labelled := w.GetEnvelope().GetLabels()[labelClass]
	if !labelled {
		class = defaultClass
	}
	return class == r.Class && !isPause(w)
}

func int64s(list []uint32) []int64 {
	out := make([]int64, len(list))
	for i, n := range list {
		out[i] = int64(n)
	}
	return out
}

func (r *Runtime) status(w *protocol.Workload) runtime.Status {
	labels := w.GetEnvelope().GetLabels()
	attempt, _ := strconv.Atoi(labels[labelAttempt])
	stop, _ := strconv.Atoi(labels[labelStopSignal])
	s := runtime.Status{
		ID:         runtime.ID{Pod: labels[labelPod], Name: labels[labelName], Attempt: attempt},
		State:      runtime.Running,
		PID:        int(w.Pid),
		StartedAt:  time.Unix(0, w.StartedUnixNano).UTC(),
		Log:        w.GetEnvelope().GetLog(),
		StopSignal: syscall.Signal(stop),
	}
	if user := new(runtime.User); json.Unmarshal([]byte(labels[labelProcessUser]), user) == nil {
		s.User = user
	}
	for k, v := range labels {
		if name, ok := strings.CutPrefix(k, labelUser); ok {
			if s.Labels == nil {
				s.Labels = map[string]string{}
			}
			s.Labels[name] = v
		}
	}
	if !w.Running {
		s.State = runtime.Exited
		s.FinishedAt = time.Unix(0, w.FinishedUnixNano).UTC()
		s.ExitCode, s.Signal = int(w.ExitCode), syscall.Signal(w.Signal)
		s.OOMKilled, s.CoreDumped, s.Unknown = w.OomKilled, w.CoreDumped, w.Unknown
	}
	return s
}

// Signal implements runtime.Runtime.
func (r *Runtime) Signal(ctx context.Context, id runtime.ID, sig syscall.Signal) error {
	if err := r.Keeper.Signal(ctx, id.String(), sig); err != nil {
		return fmt.Errorf("signal %s: %w", id, convert(err))
	}
	return nil
}

// Update implements runtime.Runtime.
func (r *Runtime) Update(ctx context.Context, id runtime.ID, res runtime.Resources) error {
	data, err := json.Marshal(resources(res))
	if err != nil {
		return err
	}
	if err := r.Keeper.Update(ctx, id.String(), data); err != nil {
		return fmt.Errorf("update %s: %w", id, convert(err))
	}
	return nil
}

// Remove implements runtime.Runtime.
func (r *Runtime) Remove(ctx context.Context, id runtime.ID) error {
	defer r.locks.lock(id.String())()
	if err := r.Keeper.Remove(ctx, id.String(), false); err != nil {
		return fmt.Errorf("remove %s: %w", id, convert(err))
	}
	if err := r.removeAttempt(id, r.attemptDir(id)); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	// The container's own directory goes with its last attempt.
	_ = os.Remove(filepath.Dir(r.attemptDir(id)))
	return nil
}

// List implements runtime.Runtime.
func (r *Runtime) List(ctx context.Context) ([]runtime.Status, error) {
	all, err := r.Keeper.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list workloads: %w", err)
	}
	list := make([]runtime.Status, 0, len(all))
	for _, w := range all {
		if r.shows(w) {
			list = append(list, r.status(w))
		}
	}
	return list, nil
}

// Watch implements runtime.Runtime.
func (r *Runtime) Watch(ctx context.Context) (<-chan runtime.Status, error) {
	changes, err := r.Keeper.Watch(ctx)
	if err != nil {
		return nil, fmt.Errorf("watch workloads: %w", err)
	}
	statuses := make(chan runtime.Status)
	go func() {
		defer close(statuses)
		for w := range changes {
			if !r.shows(w) {
				continue
			}
			select {
			case statuses <- r.status(w):
			case <-ctx.Done():
				return
			}
		}
	}()
	return statuses, nil
}

// Exec implements runtime.Runtime.
func (r *Runtime) Exec(ctx context.Context, id runtime.ID, e runtime.Exec) (int, error) {
	w, err := r.Keeper.Get(ctx, id.String())
	if err != nil {
		return 0, fmt.Errorf("exec in %s: %w", id, convert(err))
	}
	args := e.Args
	if rules := w.GetEnvelope().GetLabels()[labelLandlock]; rules != "" {
		args = confined(rules, args)
	}
	code, err := r.Keeper.Exec(ctx, id.String(), args, streams(ctx, e.Streams))
	if err != nil {
		return 0, fmt.Errorf("exec in %s: %w", id, convert(err))
	}
	return code, nil
}

// Attach implements runtime.Runtime.
func (r *Runtime) Attach(ctx context.Context, id runtime.ID, s runtime.Streams) error {
	if err := r.Keeper.Attach(ctx, id.String(), streams(ctx, s)); err != nil {
		return fmt.Errorf("attach to %s: %w", id, convert(err))
	}
	return nil
}

func streams(ctx context.Context, s runtime.Streams) keeper.Streams {
	k := keeper.Streams{Stdin: s.Stdin, Stdout: s.Stdout, Stderr: s.Stderr, TTY: s.TTY}
	if s.Resize != nil {
		sizes := make(chan keeper.Size, 1)
		k.Resize = sizes
		select {
		case size, ok := <-s.Resize:
			if ok {
				sizes <- keeper.Size(size)
			}
		default:
		}
		go func() {
			defer close(sizes)
			for {
				select {
				case size, ok := <-s.Resize:
					if !ok {
						return
					}
					select {
					case sizes <- keeper.Size(size):
					case <-ctx.Done():
						return
					}
				case <-ctx.Done():
					return
				}
			}
		}()
	}
	return k
}

// Stats implements runtime.Runtime.
func (r *Runtime) Stats(ctx context.Context, id runtime.ID) (runtime.Stats, error) {
	s, err := r.Keeper.Stats(ctx, id.String())
	if err != nil {
		return runtime.Stats{}, fmt.Errorf("stats of %s: %w", id, convert(err))
	}
	bytes, inodes := diskUsage(filepath.Join(r.attemptDir(id), UpperDir))
	return runtime.Stats{
		Time:           time.Unix(0, s.UnixNano).UTC(),
		CPU:            time.Duration(s.CpuNanos),
		Memory:         int64(s.Memory),
		WorkSet:        int64(s.WorkSet),
		Processes:      int64(s.Processes),
		WritableLayer:  bytes,
		WritableInodes: inodes,
	}, nil
}

// diskUsage is what dir and the files below it occupy; what goes away
// meanwhile does not count.
func diskUsage(dir string) (bytes, inodes int64) {
	_ = filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if info, err := d.Info(); err == nil {
			if stat, ok := info.Sys().(*syscall.Stat_t); ok {
				bytes, inodes = bytes+stat.Blocks*512, inodes+1
			}
		}
		return nil
	})
	return bytes, inodes
}

func (r *Runtime) attemptDir(id runtime.ID) string {
	return filepath.Join(r.podDir(id.Pod), "containers", id.Name, strconv.Itoa(id.Attempt))
}

func (r *Runtime) podDir(id string) string { return filepath.Join(r.Dir, "pods", id) }

func (r *Runtime) podCgroup(pod runtime.Pod) string { return path.Join("/", r.CgroupRoot, pod.Cgroup) }

// removeAttempt takes away a container's root and writable layer.
func (r *Runtime) removeAttempt(id runtime.ID, dir string) error {
	err := errors.Join(mount.Unmount(filepath.Join(dir, "root")), mount.Unmount(filepath.Join(dir, MemoryDir)), r.removeOpenRoot(id.String()), removeMapped(filepath.Join(dir, mappedDir)))
	if err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// convert turns the keeper's errors into those of the contract.
func convert(err error) error {
	for from, to := range map[error]error{
		keeper.ErrNotFound: runtime.ErrNotFound, keeper.ErrNotRunning: runtime.ErrNotRunning, keeper.ErrInvalid: runtime.ErrInvalid,
	} {
		if errors.Is(err, from) {
			return fmt.Errorf("%w: %s", to, strings.TrimPrefix(err.Error(), from.Error()+": "))
		}
	}
	return err
}

// Purge takes away all that Runtimes of a data directory have made but the
// volumes and logs: processes, mounts, control groups, namespaces, writable
// layers and what the keeper knew. The keeper must have been shut down.
func Purge(ctx context.Context, dir, cgroupRoot string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return err
	}
	errs := []error{keeper.Shutdown(ctx, filepath.Join(dir, "keeper"))}
	if strings.Trim(cgroupRoot, "/") != "" {
		errs = append(errs, cgroup.Remove(cgroupRoot))
		if err := mount.UnmountBelow(openRoots(cgroupRoot)); err != nil {
			errs = append(errs, err)
		} else {
			errs = append(errs, os.RemoveAll(openRoots(cgroupRoot)))
		}
	}
	pods, err := os.ReadDir(filepath.Join(dir, "pods"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, pod := range pods {
		errs = append(errs, removeGround(filepath.Join(dir, "pods", pod.Name())))
	}
	errs = append(errs,
		os.RemoveAll(filepath.Join(dir, "keeper", "workloads")),
		os.RemoveAll(filepath.Join(dir, "keeper", "runc")))
	return errors.Join(errs...)
}

// removeGround takes away what this package keeps in a pod's directory, and
// the directory if nobody else keeps something there.
func removeGround(dir string) error {
	errs := []error{}
	for _, part := range []string{"containers", "ns", "shm"} {
		part = filepath.Join(dir, part)
		if _, err := os.Lstat(part); err != nil {
			continue
		}
		if err := mount.UnmountBelow(part); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, os.RemoveAll(part))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := os.Remove(filepath.Join(dir, podFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

// locks are locks by name, which exist while somebody holds or wants them.
type locks struct {
	mu   sync.Mutex
	held map[string]*lock
}

type lock struct {
	sync.RWMutex
	users int
}

func (l *locks) lock(name string) (unlock func()) {
	k := l.use(name)
	k.Lock()
	return func() { k.Unlock(); l.leave(name, k) }
}

func (l *locks) use(name string) *lock {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.held == nil {
		l.held = map[string]*lock{}
	}
	k := l.held[name]
	if k == nil {
		k = &lock{}
		l.held[name] = k
	}
	k.users++
	return k
}

func (l *locks) leave(name string, k *lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if k.users--; k.users == 0 {
		delete(l.held, name)
	}
}
