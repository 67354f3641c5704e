package daemon

import (
	"path"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/runtime"
)

// podGroup is the control group that holds all pods; it implements
// runtime.Group. Beside it, in the data directory's group, is the keeper, which
// pods must not starve.
type podGroup string

// Limit implements runtime.Group.
func (g podGroup) Limit(r runtime.Resources) error {
	// What a group may have of the processors depends on the one it is in.
	if err := cgroup.Make(path.Dir(string(g)), cgroup.Limits{CPUShares: r.CPUShares}); err != nil {
		return err
	}
	return cgroup.Make(string(g), cgroup.Limits{CPUShares: r.CPUShares, Memory: r.Memory, Pids: r.Pids})
}

// Memory implements runtime.Group.
func (g podGroup) Memory() (runtime.Memory, error) {
	m, err := cgroup.ReadMemory(string(g))
	return runtime.Memory(m), err
}
