package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Collect removes content that no manifest names and returns how many bytes
// that has freed. With untagged, manifests go too that neither a tag nor
// another manifest names, unless they refer to one that stays, as signatures
// do. It waits until nobody has pushed for a while;
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
	files, all, err := r.storage(ctx)
	if err != nil {
		return 0, fmt.Errorf("collect garbage of the registry: %w", err)
	}
	if untagged {
		if err := removeUntagged(ctx, files, all); err != nil {
			return 0, fmt.Errorf("collect garbage of the registry: remove what has no tag: %w", err)
		}
	}
	if err := storage.MarkAndSweep(ctx, files, all, storage.GCOpts{Quiet: true}); err != nil {
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

// removeUntagged removes the manifests to which nothing leads: no tag, no
// other manifest, and no subject that stays. MarkAndSweep's own way knows of
// no subjects.
func removeUntagged(ctx context.Context, files driver.StorageDriver, all distribution.Namespace) error {
	repositories, ok := all.(distribution.RepositoryEnumerator)
	if !ok {
		return fmt.Errorf("%T cannot be enumerated", all)
	}
	vacuum := storage.NewVacuum(ctx, files)
	return repositories.Enumerate(ctx, func(name string) error {
		named, err := reference.WithName(name)
		if err != nil {
			return err
		}
		var manifests []digest.Digest
		leads := map[digest.Digest][]digest.Digest{} // to what of the repository a manifest leads
		err = eachManifest(ctx, all, named, func(desc ocispec.Descriptor, says refers, m distribution.Manifest) {
			manifests = append(manifests, desc.Digest)
			for _, d := range m.References() {
				leads[desc.Digest] = append(leads[desc.Digest], d.Digest)
			}
			if says.Subject != nil {
				leads[says.Subject.Digest] = append(leads[says.Subject.Digest], desc.Digest)
			}
		})
		if err != nil {
			return err
		}
		kept := map[digest.Digest]bool{}
		var keep func(digest.Digest)
		keep = func(d digest.Digest) {
			if !kept[d] {
				kept[d] = true
				for _, next := range leads[d] {
					keep(next)
				}
			}
		}
		repository, err := all.Repository(ctx, named)
		if err != nil {
			return err
		}
		tags, err := repository.Tags(ctx).All(ctx)
		if err != nil && !errors.As(err, new(distribution.ErrRepositoryUnknown)) { // which is one without tags
			return err
		}
		for _, tag := range tags {
			desc, err := repository.Tags(ctx).Get(ctx, tag)
			if err != nil {
				return err
			}
			keep(desc.Digest)
		}
		for _, d := range manifests {
			if kept[d] {
				continue
			}
			if err := vacuum.RemoveManifest(name, d, tags); err != nil {
				return err
			}
		}
		return nil
	})
}

// size is how many bytes all blobs have.
func (r *Registry) size() (int64, error) {
	return size(filepath.Join(r.dir, "docker", "registry", "v2", "blobs"))
}
