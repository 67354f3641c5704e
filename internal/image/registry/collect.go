package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
)

// Collect removes content that no manifest names and returns how many bytes
// that has freed. With untagged, manifests go too that neither a tag nor
// another manifest names. It waits until nobody has pushed for a while;
// pushes that begin meanwhile wait for it. Pulls go on.
func (r *Registry) Collect(ctx context.Context, untagged bool) (freed int64, err error) {
	return r.collect(ctx, untagged, func() {})
}

func (r *Registry) collect(ctx context.Context, untagged bool, begun func()) (int64, error) {
	defer begun() // if it never does
	if err := r.close(ctx); err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: wait for pushes: %w", err)
	}
	defer r.gate.Unlock()
	begun()
	if _, err := os.Stat(filepath.Join(r.dir, "docker", "registry", "v2", "repositories")); errors.Is(err, fs.ErrNotExist) {
		return 0, nil // nobody has pushed yet
	}
	before, err := r.size()
	if err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	driver, err := filesystem.FromParameters(map[string]any{"rootdirectory": r.dir})
	if err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	all, err := storage.NewRegistry(ctx, driver, storage.EnableDelete)
	if err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	if err := storage.MarkAndSweep(ctx, driver, all, storage.GCOpts{RemoveUntagged: untagged, Quiet: true}); err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	after, err := r.size()
	if err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	return before - after, nil
}

// close waits for quiet and takes the gate. It never stands in line for it:
// that would hold up other pushes for as long as one goes on.
func (r *Registry) close(ctx context.Context) error {
	for {
		r.mu.Lock()
		wait := r.quiet - time.Since(r.changed)
		r.mu.Unlock()
		if wait <= 0 && r.gate.TryLock() {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(max(wait, r.quiet/10)):
		}
	}
}

// size is how many bytes all blobs have.
func (r *Registry) size() (int64, error) {
	return size(filepath.Join(r.dir, "docker", "registry", "v2", "blobs"))
}
