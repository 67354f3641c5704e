// Package process runs workloads as plain processes of the machine: no PID,
// IPC, UTS or user namespace stands between them and it. What they do have of
// their own is a network, if the pod has, and their mounts. All but the root is
// package container's; what the class has otherwise than a container is
// Differences.
package process

import (
	"context"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/container"
)

// Class is the handler of RuntimeClasses for this runtime.
const Class = "process"

// Runtime implements runtime.Runtime.
type Runtime struct{ *container.Runtime }

var _ runtime.Runtime = (*Runtime)(nil)

// New returns the runtime of a data directory. Class and Machine of the
// configuration are its own.
func New(c container.Config) (*Runtime, error) {
	r := &Runtime{}
	c.Class = Class
	c.Machine = func(w runtime.Workload, dir string) (container.Root, error) { return machineRoot(r.Config, w, dir) }
	base, err := container.New(c)
	if err != nil {
		return nil, fmt.Errorf("runtime of processes: %w", err)
	}
	r.Runtime = base
	return r, nil
}

// Open implements runtime.Runtime.
func (r *Runtime) Open(ctx context.Context, pod runtime.Pod) (ground string, err error) {
	if pod.IDs.Size > 0 {
		return "", fmt.Errorf("open pod %s with users of its own: %w", pod.ID, runtime.ErrInvalid)
	}
	for name := range pod.Sysctls {
		if !strings.HasPrefix(name, "net.") && !strings.HasPrefix(name, "net/") {
			return "", fmt.Errorf("set sysctl %s of the machine: %w", name, runtime.ErrInvalid)
		}
	}
	pod.HostPID, pod.SharePID, pod.HostIPC, pod.HostUTS = true, false, true, true
	return r.Runtime.Open(ctx, pod)
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, w runtime.Workload) (runtime.Status, error) {
	// What the machine has is listed before it is mounted, and may be gone by
	// then: a disk, a directory of a daemon that has ended.
	const tries = 5
	for i := 1; ; i++ {
		st, err := r.Runtime.Start(ctx, w)
		if w.Machine == "" || i == tries || err == nil || !strings.Contains(err.Error(), unix.ENOENT.Error()) {
			return st, err
		}
	}
}
