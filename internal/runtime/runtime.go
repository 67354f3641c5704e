// Package runtime is the contract between the agent and the things that can
// run a workload: containers, plain processes, and later virtual machines.
// It knows nothing of Kubernetes; the agent translates.
//
// Vocabulary. A Pod here is the ground that workloads of one Kubernetes pod
// share: pinned namespaces, a control group, a directory. A Workload is one
// run of one container of that pod: restarting a container makes a new
// workload with a higher attempt. Identifiers are derived, never drawn, so
// that every call can be repeated: starting what runs already is a no-op and
// nothing can run twice.
package runtime

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"time"
)

var (
	// ErrNotFound says that no workload or pod has the given identifier.
	ErrNotFound = errors.New("not found")
	// ErrNotRunning says that the workload exists but has no process.
	ErrNotRunning = errors.New("not running")
	// ErrRunsAsRoot says that a workload must not run as root but its image
	// or specification resolves to user 0, or to a name that cannot be
	// resolved to a number.
	ErrRunsAsRoot = errors.New("runs as root")
	// ErrInvalid says that the workload can never start as specified (no such
	// program, no such user, bad mount). The text is meant for the pod's
	// owner.
	ErrInvalid = errors.New("cannot start as specified")
)

// ID names one workload on this machine: the pod's UID, the container's name
// and the attempt, starting at 0.
type ID struct {
	Pod     string
	Name    string
	Attempt int
}

// String is stable: it is the runtime's own name for the workload and, behind
// the scheme, the containerID that the API shows.
func (id ID) String() string { return fmt.Sprintf("%s_%s_%d", id.Pod, id.Name, id.Attempt) }

// Runtime runs workloads of one class. All methods are safe for concurrent
// use and idempotent unless they say otherwise. A Runtime survives its own
// process: a new one over the same directory sees the same workloads.
type Runtime interface {
	// Open makes the ground for a pod. Opening an open pod changes nothing. The
	// ground's name is another when it had to be made anew, because the machine
	// was started again or everything on it was stopped.
	Open(ctx context.Context, pod Pod) (ground string, err error)
	// Close kills what still runs in the pod, removes its workloads and its
	// ground. Closing an unknown pod is no error.
	Close(ctx context.Context, podID string) error

	// Start creates and starts a workload of an open pod and returns once its
	// program has been executed. If the workload exists already, running or
	// exited, its status is returned and nothing is started.
	Start(ctx context.Context, w Workload) (Status, error)
	// Signal sends a signal to the workload's first process; SIGKILL goes to
	// every process of the workload. A workload that has exited is no error.
	Signal(ctx context.Context, id ID, sig syscall.Signal) error
	// UpdatePod changes the limits of an open pod in place. On some kernels
	// none of its workloads may have more than the pod.
	UpdatePod(ctx context.Context, podID string, r Resources) error
	// Update changes the limits of a running workload in place.
	Update(ctx context.Context, id ID, r Resources) error
	// Remove forgets an exited workload and deletes its writable layer. Its
	// log stays. Removing a running workload is an error; an unknown one not.
	Remove(ctx context.Context, id ID) error

	// List returns every workload that has not been removed.
	List(ctx context.Context) ([]Status, error)
	// Watch delivers the status of each workload whose state changed since
	// the call, at least once, and is closed when ctx ends or the connection
	// is lost: call again, then List.
	Watch(ctx context.Context) (<-chan Status, error)

	// Exec runs a program inside a running workload and returns its exit
	// code. Streams end with the program.
	Exec(ctx context.Context, id ID, e Exec) (code int, err error)
	// Attach connects to the streams of the workload's first process until
	// ctx ends, the client closes, or the process exits.
	Attach(ctx context.Context, id ID, s Streams) error
	// Stats returns what the workload uses now.
	Stats(ctx context.Context, id ID) (Stats, error)
}

// Pod is the ground that the workloads of one pod share.
type Pod struct {
	ID       string // the pod's UID
	Hostname string
	// NetNS is the path of the pod's pinned network namespace, "" for the
	// machine's.
	NetNS string
	// HostIPC and HostPID use the machine's namespace. SharePID gives all
	// workloads one PID namespace with a small init that reaps.
	HostIPC, HostPID, SharePID bool
	// HostUTS leaves the pod's programs the machine's host name.
	HostUTS bool
	// Cgroup is the pod's group below the runtime's root: "burstable/pod<uid>".
	Cgroup string
	// Resources limits the pod as a whole; zero fields do not limit.
	Resources Resources
	// Sysctls are set in the pod's namespaces.
	Sysctls map[string]string
	// IDs gives the pod a user namespace, for runtimes that have them.
	IDs IDs
}

// IDs says that the users and groups 0 to Size-1 of a pod are First to
// First+Size-1 of the machine. Size 0: they are the machine's own.
type IDs struct{ First, Size uint32 }

// UserNamespaces is what a Runtime offers that can keep the users of a pod
// apart from the machine's (IDs of Pod).
type UserNamespaces interface {
	// CanMapIDs says what this machine lacks for it, in words for the pod's
	// owner, nil: nothing.
	CanMapIDs() error
	// OpenNamespaces makes the namespaces of a pod with IDs and returns the
	// path of its network namespace, which is one of them: it is called
	// before Open, which needs the network. It is idempotent; Close undoes it.
	OpenNamespaces(ctx context.Context, pod Pod) (netns string, err error)
}

// Workload says what to run. The zero value of a field means the usual.
type Workload struct {
	ID
	// Layers are the directories of the image's file system, lowest first.
	Layers []string
	// Machine, when not "", gives the workload the machine's own file system
	// in the place of Layers and says what writes outside of Mounts do.
	Machine      MachineRoot `json:",omitempty"`
	ReadOnlyRoot bool

	Args []string
	Env  []string // NAME=value
	Dir  string   // working directory, "" = /

	// User is "user[:group]", names or numbers, resolved in the image. Groups
	// are supplemental, added to those that the image's group file gives, or,
	// with OnlyGroups, in their place.
	User           string
	Groups         []int64
	OnlyGroups     bool
	RequireNonRoot bool

	Privileged      bool
	Capabilities    []string // complete set, CAP_…; ignored when Privileged
	NoNewPrivileges bool
	// Seccomp is "" for none, "default" for the runtime's default profile, or
	// the path of a profile file.
	Seccomp string
	// AppArmor is "" for the runtime's default profile where the machine has
	// it, "default" for that profile or no start, "unconfined", or the name of
	// a profile that is loaded.
	AppArmor string
	// Unmasked leaves /proc and /sys unmasked (procMount: Unmasked).
	Unmasked bool
	// Landlock, when not nil, is all of the file system that the workload may
	// use. It implies NoNewPrivileges.
	Landlock *Landlock `json:",omitempty"`

	Rlimits []Rlimit    `json:",omitempty"`
	Nice    *int        `json:",omitempty"` // -20 to 19
	IO      *IOPriority `json:",omitempty"`

	Mounts      []Mount
	Devices     []Device
	Resources   Resources
	OOMScoreAdj *int

	// JoinPID names a running workload of the same pod whose PID namespace
	// this one joins instead of having its own: ErrNotRunning or ErrNotFound
	// if it does not run. It means nothing in a pod with HostPID or SharePID,
	// where it sees those processes anyway.
	JoinPID *ID `json:",omitempty"`

	// Log is the file that receives stdout and stderr in the CRI log format;
	// its directory exists.
	Log string
	TTY bool
	// Stdin keeps the workload's standard input open; StdinOnce closes it
	// after the first attached client has gone.
	Stdin, StdinOnce bool
	// StopSignal is what a graceful stop sends; the caller uses it, the
	// runtime only keeps it.
	StopSignal syscall.Signal

	// Labels are kept with the workload and returned in its Status.
	Labels map[string]string
}

// MachineRoot says what writes of a workload do in the machine's own file
// system.
type MachineRoot string

const (
	// SharedRoot writes to the machine.
	SharedRoot MachineRoot = "shared"
	// ReadOnlyRoot fails with EROFS, but in /tmp, /var/tmp and /run, where new
	// files are the attempt's own.
	ReadOnlyRoot MachineRoot = "readonly"
	// OverlayRoot keeps what is written in memory, with the attempt.
	OverlayRoot MachineRoot = "overlay"
)

// Landlock are the files and directories, with what is below them, that a
// workload may read and execute, and those that it may write to as well.
type Landlock struct{ ReadOnly, ReadWrite []string }

// Rlimit is a limit of setrlimit(2); Name is as "RLIMIT_NOFILE".
type Rlimit struct {
	Name       string
	Soft, Hard uint64
}

// IOPriority is as of ioprio_set(2): Class is "realtime", "best-effort" or
// "idle", Level 0 (first) to 7.
type IOPriority struct {
	Class string
	Level int
}

// Mount binds Source into the workload at Target.
type Mount struct {
	Source, Target string
	ReadOnly       bool
	// RecursiveReadOnly makes everything below Source read-only too.
	RecursiveReadOnly bool
	// Propagation is "private" (default), "rslave" or "rshared".
	Propagation string
}

// Device gives the workload the device that Source is (links are followed), as
// Target, and the right to read it and, unless ReadOnly, to write to it.
type Device struct {
	Source, Target string
	ReadOnly       bool
}

// Resources are limits in the kernel's terms; zero does not limit.
type Resources struct {
	CPUShares int64 // cgroup v1 scale, 2…262144
	CPUQuota  int64 // microseconds per CPUPeriod
	CPUPeriod int64 // microseconds
	Memory    int64 // bytes
	Pids      int64
	// HugePages limits by page size as the kernel writes it ("2MB"), bytes.
	HugePages map[string]int64
	CPUSet    string
}

// State is where a workload is in its life.
type State string

const (
	Running State = "running"
	Exited  State = "exited"
)

// Status is what is known of a workload. Times are in UTC.
type Status struct {
	ID
	State     State
	PID       int
	StartedAt time.Time
	// Valid when State is Exited:
	FinishedAt time.Time
	ExitCode   int // 128+signal when a signal ended it
	Signal     syscall.Signal
	OOMKilled  bool
	CoreDumped bool // or given to who asks for dumps, core(5)
	// Unknown says that nobody saw the exit: ExitCode is then 255 and made up
	// by no one's guess about success.
	Unknown bool

	Log        string
	StopSignal syscall.Signal
	// User is whom the first process was started as, nil when not known.
	User   *User
	Labels map[string]string
}

// User are a process's numbers inside its workload; Groups has its own group
// too.
type User struct {
	UID, GID int64
	Groups   []int64
}

// Streams are what a client holds of a program's standard streams; nil ones
// are not connected. Resize, when not nil, carries terminal sizes until
// closed.
type Streams struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	TTY    bool
	Resize <-chan Size
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Exec says what to run inside a workload: user, environment, directory and
// privileges are those of the workload.
type Exec struct {
	Args []string
	Streams
}

// Stats is what a workload uses.
type Stats struct {
	Time      time.Time
	CPU       time.Duration // since start
	Memory    int64         // bytes, all
	WorkSet   int64         // bytes that cannot be reclaimed at once
	Processes int64
	// WritableLayer is what the workload has written to its own root, bytes;
	// WritableInodes is in how many files and directories.
	WritableLayer, WritableInodes int64
}
