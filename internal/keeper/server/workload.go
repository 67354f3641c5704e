//go:build cgo

package server

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper/protocol"
)

type phase string

const (
	creating phase = "creating"
	created  phase = "created" // it waits to be started, if it was not
	running  phase = "running"
	exited   phase = "exited"
)

// record is what a keeper leaves to the next one about a workload.
type record struct {
	ID       string
	Envelope *protocol.Envelope
	Phase    phase
	// Boot is the boot that PID and StartTicks belong to.
	Boot       string
	PID        int
	StartTicks uint64
	Started    time.Time
	Finished   time.Time
	// Status is what wait(2) said.
	Status    unix.WaitStatus
	OOMKilled bool
	Unknown   bool
	// Cgroups are the workload's own groups by controller.
	Cgroups map[string]string
	// OwnPIDs says that the first process is init of a PID namespace, so that
	// the others die with it.
	OwnPIDs bool
}

// workload is a record and what belongs to it while it runs. The directory
// holds the record, the process part of its specification and its FIFOs.
type workload struct {
	dir string
	// launched is closed when the start has succeeded or failed with
	// startErr; ended when it has exited, all it said is in the log and that
	// is recorded; cleared when its groups are gone too.
	launched, ended, cleared chan struct{}
	startErr                 error

	mu    sync.Mutex
	rec   record
	pidfd *os.File
	out   *output
	// input is the keeper's side of its standard input or its terminal.
	input *os.File
}

const (
	recordFile  = "workload.json"
	processFile = "process.json"
)

func newWorkload(dir string) *workload {
	return &workload{
		dir:      dir,
		launched: make(chan struct{}),
		ended:    make(chan struct{}),
		cleared:  make(chan struct{}),
	}
}

// recordCreated notes the first process of a container that was made and has
// not begun.
func (w *workload) recordCreated(pid int) error {
	ticks, err := process.StartTicks(pid)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.rec.Phase, w.rec.PID, w.rec.StartTicks = created, pid, ticks
	return w.save()
}

// save writes the record so that a reader sees the old or the new one. It is
// not forced to the disk: what it tells of does not survive the machine.
func (w *workload) save() error {
	data, err := json.Marshal(&w.rec)
	if err != nil {
		return err
	}
	path := filepath.Join(w.dir, recordFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (w *workload) load() error {
	data, err := os.ReadFile(filepath.Join(w.dir, recordFile))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, &w.rec)
}

func (w *workload) saveProcess(p *specs.Process) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(w.dir, processFile), data, 0o600)
}

func (w *workload) loadProcess() (*specs.Process, error) {
	data, err := os.ReadFile(filepath.Join(w.dir, processFile))
	if err != nil {
		return nil, err
	}
	p := new(specs.Process)
	return p, json.Unmarshal(data, p)
}

func (w *workload) message() *protocol.Workload {
	w.mu.Lock()
	defer w.mu.Unlock()
	r := &w.rec
	m := &protocol.Workload{
		Id: r.ID, Envelope: r.Envelope,
		Running: r.Phase == running,
		Pid:     int32(r.PID), StartTicks: r.StartTicks,
		StartedUnixNano: r.Started.UnixNano(),
	}
	if m.Running {
		return m
	}
	m.FinishedUnixNano = r.Finished.UnixNano()
	m.OomKilled, m.Unknown = r.OOMKilled, r.Unknown
	if r.Unknown {
		m.ExitCode = 255
	} else {
		m.ExitCode, m.Signal = exitCode(r.Status)
		m.CoreDumped = r.Status.CoreDump()
	}
	return m
}

// exitCode says it as shells do.
func exitCode(status unix.WaitStatus) (code, signal int32) {
	if status.Signaled() {
		return 128 + int32(status.Signal()), int32(status.Signal())
	}
	return int32(status.ExitStatus()), 0
}

// groups returns the workload's control groups, nil when it has none yet.
func (w *workload) groups() (cgroups.Manager, error) {
	w.mu.Lock()
	paths := w.rec.Cgroups
	w.mu.Unlock()
	if len(paths) == 0 {
		return nil, nil // no paths would mean the keeper's own groups
	}
	return manager.NewWithPaths(&cgroups.Cgroup{Resources: &cgroups.Resources{SkipDevices: true}}, paths)
}

// signal sends sig to the first process; SIGKILL reaches all of them.
func (w *workload) signal(sig unix.Signal) error {
	w.mu.Lock()
	pidfd, own := w.pidfd, w.rec.OwnPIDs
	is := w.rec.Phase
	w.mu.Unlock()
	if is != running {
		return nil
	}
	err := process.Signal(pidfd, sig)
	if err == process.ErrGone || (err != nil && isClosed(err)) {
		return nil
	}
	if err == nil && sig == unix.SIGKILL && !own {
		return w.killAll()
	}
	return err
}

// killAll kills every process in the workload's groups and returns when they
// have ended.
func (w *workload) killAll() error {
	w.mu.Lock()
	paths := w.rec.Cgroups
	w.mu.Unlock()
	// Version 2 has one hierarchy; of those of version 1 every process of a
	// container is in each.
	for _, controller := range []string{"", "devices"} {
		if dir := paths[controller]; dir != "" {
			if err := cgroup.Kill(dir); err != nil {
				return fmt.Errorf("kill processes of %s: %w", w.rec.ID, err)
			}
		}
	}
	return nil
}

func notFound(id string) error { return status.Errorf(codes.NotFound, "workload %s not found", id) }

func notRunning(id string) error {
	return status.Errorf(codes.FailedPrecondition, "workload %s is not running", id)
}

// bootID names this boot of the machine.
var bootID = sync.OnceValue(func() string {
	data, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(data))
})
