package container

import (
	"context"
	"fmt"
	"os/exec"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/keeper"
)

// Programs are the paths of the other OCI runtimes that this machine has, by
// the names of their classes: those with runc's command line that are known to
// pass the contract's suite.
func Programs() map[string]string {
	found := map[string]string{}
	for _, name := range []string{"runc", "crun"} {
		// crun wants control groups of one version.
		if name == "crun" && !cgroup.Unified() {
			continue
		}
		if path, err := exec.LookPath(name); err == nil {
			found[name] = path
		}
	}
	return found
}

// ProgramsInUse are those that a keeper's workloads were started with, in the
// form of Programs. They may not be on the machine any more.
func ProgramsInUse(ctx context.Context, k *keeper.Client) (map[string]string, error) {
	all, err := k.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("list workloads: %w", err)
	}
	used := map[string]string{}
	for _, w := range all {
		if path := w.GetEnvelope().GetProgram(); path != "" {
			used[w.GetEnvelope().GetLabels()[labelClass]] = path
		}
	}
	return used, nil
}
