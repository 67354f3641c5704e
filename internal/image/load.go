package image

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Load takes in the images of an archive, as `docker save` and OCI layouts in
// a tar have it, plain or compressed, and returns them. An image replaces what
// had its name. After an error nothing of the archive is left, but images
// named before the broken one are kept.
func (l *Local) Load(ctx context.Context, r io.Reader) (loaded []Image, err error) {
	const doing = "load images"
	ctx, end, err := l.lease(ctx, l.unique("load"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", doing, err)
	}
	defer func() {
		end(true)
		l.collectLater() // an archive has more in it than its images
	}()
	p := new(progress).watch(ctx)
	src := p.reader(r)
	index, err := l.readArchive(ctx, src)
	if err != nil {
		return nil, l.archiveError(ctx, doing, src.err, err)
	}
	names := 0
	for _, m := range index.Manifests {
		named, err := archiveName(m.Annotations)
		if err != nil {
			return loaded, fmt.Errorf("%s: %w", doing, err)
		}
		if named == nil {
			continue
		}
		names++
		img, err := l.admit(ctx, named, m, false, p, l.present)
		if err != nil {
			return loaded, l.archiveError(ctx, doing+": "+named.String(), nil, err)
		}
		loaded = append(loaded, img)
	}
	if names == 0 {
		return nil, failed(ErrBroken, nil, "%s: the archive does not name its image; save it again with a name, like shop:1", doing)
	}
	return loaded, nil
}

// readArchive brings an archive's blobs into the content store.
func (l *Local) readArchive(ctx context.Context, r io.Reader) (*ocispec.Index, error) {
	stream, err := compression.DecompressStream(r)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	desc, err := archive.ImportIndex(ctx, apart{l.content, l.unique("archive")}, stream)
	if err != nil {
		return nil, err
	}
	// What follows the tar's end may still tell that it arrived damaged.
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return nil, err
	}
	var index ocispec.Index
	return &index, l.readJSON(ctx, desc, &index)
}

// archiveName is the name that an archive gives to one of its images, nil if
// it has none. A mere tag, which OCI layouts may carry, is no name.
func archiveName(annotations map[string]string) (reference.Named, error) {
	if name := annotations[images.AnnotationImageName]; name != "" {
		return parseName(name)
	}
	if name := annotations[ocispec.AnnotationRefName]; strings.ContainsAny(name, "/:") {
		return parseName(name)
	}
	return nil, nil
}

// Import makes an image of one layer from a root file system in a tar, plain
// or compressed, and a configuration. The same file system and configuration
// give the same image.
func (l *Local) Import(ctx context.Context, name string, r io.Reader, cfg Config) (_ Image, err error) {
	named, err := parseName(name)
	if err != nil {
		return Image{}, fmt.Errorf("import image: %w", err)
	}
	if _, ok := named.(reference.Digested); ok {
		return Image{}, failed(ErrName, nil, "import image: %q gives a digest, which only the content can; name it with a tag", name)
	}
	doing := "import " + named.String()
	ctx, end, err := l.lease(ctx, l.unique("import"))
	if err != nil {
		return Image{}, fmt.Errorf("%s: %w", doing, err)
	}
	defer func() {
		end(true)
		if err != nil {
			l.collectLater()
		}
	}()
	p := new(progress).watch(ctx)
	src := p.reader(r)
	layer, diffID, err := l.importLayer(ctx, src)
	if err != nil {
		return Image{}, l.archiveError(ctx, doing, src.err, err)
	}
	target, err := l.compose(ctx, layer, diffID, cfg)
	if err == nil {
		var img Image
		if img, err = l.admit(ctx, named, target, false, p, l.present); err == nil {
			return img, nil
		}
	}
	return Image{}, l.archiveError(ctx, doing, nil, err)
}

// importLayer stores a tar as it comes and returns it with the digest of its
// plain form.
func (l *Local) importLayer(ctx context.Context, r io.Reader) (_ ocispec.Descriptor, plain digest.Digest, _ error) {
	ref := l.unique("import")
	w, err := content.OpenWriter(ctx, l.content, content.WithRef(ref))
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer w.Close()
	stored := io.TeeReader(r, w)
	stream, err := compression.DecompressStream(stored)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	defer stream.Close()
	if plain, err = digest.FromReader(stream); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if _, err := io.Copy(io.Discard, stored); err != nil {
		return ocispec.Descriptor{}, "", err
	}
	status, err := w.Status()
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	if status.Offset == 0 {
		return ocispec.Descriptor{}, "", failed(ErrBroken, nil, "the archive is empty")
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: w.Digest(), Size: status.Offset}
	switch stream.GetCompression() {
	case compression.Gzip:
		desc.MediaType = ocispec.MediaTypeImageLayerGzip
	case compression.Zstd:
		desc.MediaType = ocispec.MediaTypeImageLayerZstd
	}
	err = w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(map[string]string{labels.LabelUncompressed: plain.String()}))
	if errdefs.IsAlreadyExists(err) {
		err = nil
	}
	return desc, plain, err
}

// compose writes the configuration and manifest of an image with one layer.
func (l *Local) compose(ctx context.Context, layer ocispec.Descriptor, diffID digest.Digest, cfg Config) (ocispec.Descriptor, error) {
	config, err := l.writeJSON(ctx, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platforms.Normalize(platforms.DefaultSpec()),
		Config: ocispec.ImageConfig{
			Entrypoint: cfg.Entrypoint, Cmd: cfg.Cmd, Env: cfg.Env,
			User: cfg.User, WorkingDir: cfg.WorkingDir, StopSignal: cfg.StopSignal,
			Volumes: set(cfg.Volumes), ExposedPorts: set(cfg.ExposedPorts), Labels: cfg.Labels,
		},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diffID}},
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return l.writeJSON(ctx, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest,
		Config:    config,
		Layers:    []ocispec.Descriptor{layer},
	})
}

func set(list []string) map[string]struct{} {
	if len(list) == 0 {
		return nil
	}
	m := map[string]struct{}{}
	for _, s := range list {
		m[s] = struct{}{}
	}
	return m
}

func (l *Local) writeJSON(ctx context.Context, mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, content.WriteBlob(ctx, l.content, l.unique("json"), bytes.NewReader(data), desc)
}

// Save writes an image as an archive that Load and docker load take.
func (l *Local) Save(ctx context.Context, name string, w io.Writer) error {
	img, err := l.Get(ctx, name)
	if err != nil {
		return fmt.Errorf("save image: %w", err)
	}
	if err := archive.Export(scoped(ctx), l.content, w, archive.WithImage(l.names, img.Name), archive.WithPlatform(l.platform)); err != nil {
		return fmt.Errorf("save image %s: %w", img.Name, err)
	}
	return nil
}

// apart keeps the unfinished blobs of one archive apart from those of others,
// whose files may have the same names.
type apart struct {
	content.Store
	prefix string
}

func (a apart) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	var o content.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	return a.Store.Writer(ctx, append(opts, content.WithRef(a.prefix+"-"+o.Ref))...)
}
