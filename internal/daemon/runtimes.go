package daemon

import (
	"context"
	"fmt"
	"maps"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/container"
	"tutti.dev/tutti/internal/runtime/process"
)

// runtimes are this machine's, by the handler that a RuntimeClass names: the
// keeper's own, which is the default, plain processes, and the programs that
// are here.
func (s *server) runtimes(ctx context.Context) (map[string]runtime.Runtime, error) {
	all := map[string]runtime.Runtime{}
	config := func(class, program string) container.Config {
		return container.Config{
			Dir: string(s.dir), CgroupRoot: cgroupRoot(s.dir), Class: class, Program: program, Keeper: s.rooms.keeper, Log: s.log.With("room", class),
		}
	}
	add := func(class, program string) error {
		rt, err := container.New(config(class, program))
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
	processes, err := process.New(config(process.Class, ""))
	if err != nil {
		return nil, err
	}
	all[process.Class] = processes
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
