package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"tutti.dev/tutti/internal/agent/volumeplugin"
	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/runtime/container"
)

// cleanupTimeout bounds a Cleanup; killing thousands of processes takes time.
const cleanupTimeout = time.Minute

// Cleanup ends what runs for a data directory without its server: workloads
// and their keeper, the network, mounts and control groups. With purge the
// data goes too. The caller sees to it that no server runs. Nothing to do is
// no error, and one failure does not keep the rest from being tried.
func Cleanup(ctx context.Context, dir api.DataDir, purge bool, log *slog.Logger) error {
	if _, err := dir.Check(); err != nil {
		return err
	}
	if _, err := os.Stat(string(dir)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	in := func(name string) string { return filepath.Join(string(dir), name) }
	var errs []error
	try := func(what string, err error) {
		if err != nil {
			log.Warn("cleanup", "of", what, "err", err)
			errs = append(errs, fmt.Errorf("clean up %s: %w", what, err))
		}
	}
	if _, err := os.Stat(in("keeper")); err == nil {
		try("workloads", keeper.Shutdown(ctx, in("keeper")))
	}
	try("control groups", cgroup.Remove(cgroupRoot(dir)))
	// Mounts first: some pin what the network is to remove.
	try("mounts", errors.Join(unmountIn(string(dir)), container.RemoveRoots(cgroupRoot(dir))))
	if _, err := os.Stat(in("network")); err == nil {
		try("the network", network.Purge(ctx, in("network")))
	}
	if purge {
		try("the name of the kubelet's directory", volumeplugin.RemoveLink(string(dir)))
	}
	if err := errors.Join(errs...); err != nil || !purge {
		return err
	}
	return remove(string(dir))
}

// unmountIn takes away what is mounted in a directory, but not on it: that
// was somebody else.
func unmountIn(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() {
			errs = append(errs, mount.UnmountBelow(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// remove deletes a directory with all that is in it. One that something is
// mounted on stays, empty.
func remove(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove the data: %w", err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("remove the data: %w", err)
		}
	}
	if mount.Is(dir) {
		return nil
	}
	if err := os.Remove(dir); err != nil {
		return fmt.Errorf("remove the data: %w", err)
	}
	return nil
}
