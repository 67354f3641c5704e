package container

import (
	"os/exec"

	"tutti.dev/tutti/internal/host/cgroup"
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
