package container

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/opencontainers/runtime-spec/specs-go"

	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/internal/runtime"
)

// confiner is where a workload that is confined by Landlock finds the program
// that does it, the keeper's: in its /dev, which is nobody else's.
const confiner = "/dev/tutti-landlock"

// confined puts before a program what confines it.
func confined(rules string, args []string) []string {
	return append([]string{confiner, protocol.Confine, rules}, args...)
}

// landlock has a workload confine itself and returns the rules, "" for none.
func (r *Runtime) landlock(ctx context.Context, s *specs.Spec, w runtime.Workload) (rules string, err error) {
	if w.Landlock == nil {
		return "", nil
	}
	info, err := r.Keeper.Info(ctx)
	if err != nil {
		return "", fmt.Errorf("find the keeper's program: %w", err)
	}
	data, err := json.Marshal(protocol.Landlock(*w.Landlock))
	if err != nil {
		return "", err
	}
	s.Mounts = append(s.Mounts, specs.Mount{
		Destination: confiner, Type: "bind", Source: info.Binary, Options: []string{"bind", "private", "ro", "nosuid", "nodev"},
	})
	s.Process.Args = confined(string(data), s.Process.Args)
	return string(data), nil
}
