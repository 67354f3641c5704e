package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/unpack"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// upperdir is the label by which the overlay snapshotter tells where a layer is.
const upperdir = "containerd.io/snapshot/overlay.upperdir"

// maxDownloads is how many layers of one image are fetched at once.
const maxDownloads = 3

// maxDescription bounds the manifests and configurations that are read into
// memory.
const maxDescription = 8 << 20

// admit walks what target points at for this machine's platform, makes sure of
// each blob with fetch, unpacks the layers and gives the result its name.
// pulled says that a registry has it.
func (l *Local) admit(ctx context.Context, named reference.Named, target ocispec.Descriptor, pulled bool, p *progress, fetch images.HandlerFunc) (Image, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	unpacker, err := unpack.NewUnpacker(ctx, l.content,
		unpack.WithFetchAllContent(),
		unpack.WithLimiter(semaphore.NewWeighted(maxDownloads)),
		unpack.WithUnpackPlatform(unpack.Platform{
			SnapshotterKey: snapshotter,
			Snapshotter:    l.snapshots,
			Applier:        applier{apply.NewFileSystemApplier(l.content), p},
			// The database is synced at each step; files that a power cut
			// could lose must be on disk before it says that they are.
			ApplyOpts: []diff.ApplyOpt{diff.WithSyncFs(true)},
		}))
	if err != nil {
		return Image{}, err
	}
	children := images.SetChildrenLabels(l.content, l.children(p))
	walkErr := images.Dispatch(ctx, unpacker.Unpack(images.Handlers(fetch, children)), nil, target)
	if walkErr != nil {
		cancel()
	}
	_, unpackErr := unpacker.Wait()
	if err := firstCause(walkErr, unpackErr); err != nil {
		return Image{}, err
	}
	p.update(func(now *Progress) { now.Layers = now.TotalLayers })
	return l.record(ctx, named, target, pulled)
}

// firstCause returns the error that is not merely the echo of the other.
func firstCause(errs ...error) error {
	var cause error
	for _, err := range errs {
		if err != nil && (cause == nil || errors.Is(cause, context.Canceled)) {
			cause = err
		}
	}
	return cause
}

// children lists what belongs to the image on this platform: of an index the
// one manifest that fits best, of a manifest all.
func (l *Local) children(p *progress) images.HandlerFunc {
	return func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if !images.IsLayerType(desc.MediaType) && desc.Size > maxDescription {
			return nil, failed(ErrBroken, nil, "its description %s is too large: %d bytes", desc.Digest, desc.Size)
		}
		found, err := images.Children(ctx, l.content, desc)
		if err != nil {
			return nil, err
		}
		switch {
		case images.IsIndexType(desc.MediaType):
			if found, err = l.choose(found); err != nil {
				return nil, err
			}
		case images.IsManifestType(desc.MediaType):
			if !slices.ContainsFunc(found, func(d ocispec.Descriptor) bool { return images.IsConfigType(d.MediaType) }) {
				return nil, failed(ErrBroken, nil, "it is not a container image")
			}
		case images.IsConfigType(desc.MediaType):
			platform, err := images.ConfigPlatform(ctx, l.content, desc)
			if err != nil {
				return nil, err
			}
			if platform.OS != "" && !l.platform.Match(platform) {
				return nil, l.wrongPlatform(platforms.Format(platform))
			}
		}
		p.expect(found...)
		return found, nil
	}
}

// choose picks from an index what fits this machine best.
func (l *Local) choose(index []ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	var fit []ocispec.Descriptor
	others := map[string]struct{}{}
	for _, d := range index {
		switch {
		case d.Annotations["vnd.docker.reference.type"] != "": // an attestation
		case d.Platform == nil || l.platform.Match(*d.Platform):
			fit = append(fit, d)
		default:
			others[platforms.Format(*d.Platform)] = struct{}{}
		}
	}
	if len(fit) == 0 {
		return nil, l.wrongPlatform(slices.Sorted(maps.Keys(others))...)
	}
	slices.SortStableFunc(fit, func(a, b ocispec.Descriptor) int {
		switch {
		case a.Platform != nil && (b.Platform == nil || l.platform.Less(*a.Platform, *b.Platform)):
			return -1
		case b.Platform != nil && (a.Platform == nil || l.platform.Less(*b.Platform, *a.Platform)):
			return 1
		}
		return 0
	})
	return fit[:1], nil
}

func (l *Local) wrongPlatform(others ...string) error {
	mine := platforms.Format(platforms.Normalize(platforms.DefaultSpec()))
	if len(others) == 0 {
		return failed(ErrBroken, nil, "it has no image for %s", mine)
	}
	return failed(ErrBroken, nil, "it has no image for %s, only for %s", mine, strings.Join(others, ", "))
}

// present is the fetch of an image whose blobs must be here already.
func (l *Local) present(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	_, err := l.content.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return nil, failed(ErrBroken, err, "the archive lacks %s, which its manifest names", desc.Digest)
	}
	return nil, err
}

// record gives an unpacked image its name, in place of what had it before. To
// pull what was loaded by hand already does not make it less worth keeping.
func (l *Local) record(ctx context.Context, named reference.Named, target ocispec.Descriptor, pulled bool) (Image, error) {
	l.change.Lock()
	defer l.change.Unlock()
	img := images.Image{Name: named.String(), Target: ocispec.Descriptor{
		MediaType: target.MediaType, Digest: target.Digest, Size: target.Size}}
	if pulled {
		img.Labels = map[string]string{pulledLabel: "true"}
	}
	l.mu.Lock()
	before := l.images[img.Name]
	l.mu.Unlock()
	if before != nil && before.Digest == target.Digest.String() && (pulled || !before.pulled) {
		return before.Image, nil
	}
	stored, err := l.names.Create(ctx, img)
	if errdefs.IsAlreadyExists(err) {
		stored, err = l.names.Update(ctx, img)
	}
	if err != nil {
		return Image{}, fmt.Errorf("record: %w", err)
	}
	e, layers, err := l.describe(ctx, stored)
	if err != nil {
		return Image{}, err
	}
	l.mu.Lock()
	l.images[e.Name], l.layers[e.ID] = e, layers
	l.mu.Unlock()
	if before != nil {
		l.collectLater()
	}
	return e.Image, nil
}

// describe reads what is to be known of a named image that is unpacked.
func (l *Local) describe(ctx context.Context, img images.Image) (*entry, []string, error) {
	named, err := parseName(img.Name)
	if err != nil {
		return nil, nil, err
	}
	e := &entry{repository: named.Name(), manifest: img.Target.Digest.String(), pulled: img.Labels[pulledLabel] != ""}
	size := img.Target.Size
	desc := img.Target
	if images.IsIndexType(desc.MediaType) {
		children, err := images.Children(ctx, l.content, desc)
		if err != nil {
			return nil, nil, err
		}
		best, err := l.choose(children)
		if err != nil {
			return nil, nil, err
		}
		desc = best[0]
		e.manifest = desc.Digest.String()
		size += desc.Size
	}
	var manifest ocispec.Manifest
	if err := l.readJSON(ctx, desc, &manifest); err != nil {
		return nil, nil, err
	}
	size += manifest.Config.Size
	for _, layer := range manifest.Layers {
		size += layer.Size
	}
	var config ocispec.Image
	if err := l.readJSON(ctx, manifest.Config, &config); err != nil {
		return nil, nil, err
	}
	e.Image = Image{
		Name: img.Name, Digest: img.Target.Digest.String(), ID: manifest.Config.Digest.String(),
		Size: size, Time: img.UpdatedAt,
		Config: Config{
			Entrypoint: config.Config.Entrypoint, Cmd: config.Config.Cmd, Env: config.Config.Env,
			User: config.Config.User, WorkingDir: config.Config.WorkingDir, StopSignal: config.Config.StopSignal,
			Volumes:      slices.Sorted(maps.Keys(config.Config.Volumes)),
			ExposedPorts: slices.Sorted(maps.Keys(config.Config.ExposedPorts)),
			Labels:       config.Config.Labels,
		},
	}
	layers, err := l.layersOf(ctx, config.RootFS.DiffIDs)
	return e, layers, err
}

// layersOfConfig returns the layers of an image that may have no name.
func (l *Local) layersOfConfig(ctx context.Context, id string) ([]string, error) {
	info, err := l.content.Info(ctx, digest.Digest(id))
	if err != nil {
		return nil, err
	}
	var config ocispec.Image
	if err := l.readJSON(ctx, ocispec.Descriptor{Digest: info.Digest, Size: info.Size}, &config); err != nil {
		return nil, err
	}
	return l.layersOf(ctx, config.RootFS.DiffIDs)
}

// layersOf returns the directories of unpacked layers, lowest first.
func (l *Local) layersOf(ctx context.Context, diffs []digest.Digest) ([]string, error) {
	if len(diffs) == 0 {
		empty := filepath.Join(l.dir, "empty")
		return []string{empty}, os.MkdirAll(empty, 0o755)
	}
	var layers []string
	for _, chain := range identity.ChainIDs(slices.Clone(diffs)) {
		info, err := l.snapshots.Stat(ctx, chain.String())
		if err != nil {
			return nil, fmt.Errorf("find layer: %w", err)
		}
		dir := info.Labels[upperdir]
		if _, err := os.Stat(dir); err != nil {
			return nil, fmt.Errorf("find layer: %w", err)
		}
		layers = append(layers, dir)
	}
	return layers, nil
}

func (l *Local) readJSON(ctx context.Context, desc ocispec.Descriptor, into any) error {
	data, err := content.ReadBlob(ctx, l.content, desc)
	if err != nil {
		return err
	}
	if digest.FromBytes(data) != desc.Digest {
		return failed(ErrBroken, nil, "the content of %s has changed on disk", desc.Digest)
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("read %s: %w", desc.Digest, err)
	}
	return nil
}

// applier unpacks one layer and counts it.
type applier struct {
	diff.Applier
	progress *progress
}

func (a applier) Apply(ctx context.Context, desc ocispec.Descriptor, mounts []mount.Mount, opts ...diff.ApplyOpt) (ocispec.Descriptor, error) {
	// The lowest layer comes as a bind mount. Said as the overlay that it will
	// be part of, it is written in place like all others, without a mount that
	// a crash could leave behind.
	if len(mounts) == 1 && mounts[0].Type == "bind" {
		mounts = []mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"upperdir=" + mounts[0].Source}}}
	}
	applied, err := a.Applier.Apply(ctx, desc, mounts, opts...)
	if err == nil {
		a.progress.update(func(now *Progress) { now.Layers++ })
	}
	return applied, err
}
