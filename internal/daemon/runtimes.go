package daemon

import (
	"context"
	"fmt"
	"maps"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/container"
)

// runtimes are this machine's, by the handler that a RuntimeClass names: the
// keeper's own, which is the default, and the programs that are here.
func (s *server) runtimes(ctx context.Context) (map[string]runtime.Runtime, error) {
	all := map[string]runtime.Runtime{}
	add := func(class, program string) error {
		rt, err := container.New(container.Config{
			Dir: string(s.dir), CgroupRoot: cgroupRoot(s.dir), Class: class, Program: program, Keeper: s.rooms.keeper, Log: s.log.With("room", class),
		})
		if err != nil {
			return fmt.Errorf("make the runtime %s: %w", class, err)
		}
		all[class] = rt
		return nil
	}
	const usual = "container"
	if err := add(usual, ""); err != nil {
		return nil, err
	}
	all[""] = all[usual]
	// A program that was taken away has workloads to be seen and ended.
	programs, err := container.ProgramsInUse(ctx, s.rooms.keeper)
	if err != nil {
		return nil, err
	}
	maps.Copy(programs, container.Programs())
	for class, program := range programs {
		if err := add(class, program); err != nil {
			return nil, err
		}
		s.log.Info("another OCI runtime is here", "class", class, "program", program)
	}
	return all, nil
}
