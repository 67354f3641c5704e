package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"testing"

	"github.com/containerd/platforms"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// file is one entry of a test archive; a nil body makes a directory.
type file struct {
	name string
	body []byte
}

func text(name, body string) file { return file{name, []byte(body)} }

func tarOf(t testing.TB, files ...file) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: 0o755, Size: int64(len(f.body)), Typeflag: tar.TypeReg}
		if f.body == nil {
			h.Typeflag, h.Name = tar.TypeDir, f.name+"/"
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func gz(t testing.TB, b []byte) []byte {
	return squeeze(t, b, func(w io.Writer) (io.WriteCloser, error) { return gzip.NewWriter(w), nil })
}

func zst(t testing.TB, b []byte) []byte {
	return squeeze(t, b, func(w io.Writer) (io.WriteCloser, error) { return zstd.NewWriter(w) })
}

func squeeze(t testing.TB, b []byte, open func(io.Writer) (io.WriteCloser, error)) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := open(&out)
	if err != nil {
		t.Fatal(err)
	}
	w.Write(b)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// busyboxTar is a root file system with one program that needs nothing else.
func busyboxTar(t testing.TB) []byte {
	t.Helper()
	program, err := os.ReadFile("/bin/busybox")
	if err != nil {
		t.Fatalf("package busybox-static is needed: %v", err)
	}
	return tarOf(t, file{"bin", nil}, file{"bin/busybox", program}, text("etc/passwd", "root:x:0:0::/:/bin/sh\n"))
}

// parts is an image in pieces, as a registry or an OCI layout has it.
type parts struct {
	blobs    map[digest.Digest][]byte
	manifest ocispec.Descriptor
	config   ocispec.Descriptor
	layers   []ocispec.Descriptor
}

func (p *parts) add(mediaType string, data []byte) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	p.blobs[d.Digest] = data
	return d
}

func (p *parts) addJSON(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return p.add(mediaType, data)
}

// imageOf makes an image of layers, which are tars; the first stays plain, the
// second is compressed with gzip, the third with zstd, and so on.
func imageOf(t testing.TB, platform ocispec.Platform, config ocispec.ImageConfig, layers ...[]byte) *parts {
	t.Helper()
	p := &parts{blobs: map[digest.Digest][]byte{}}
	var diffs []digest.Digest
	for i, layer := range layers {
		diffs = append(diffs, digest.FromBytes(layer))
		switch i % 3 {
		case 0:
			p.layers = append(p.layers, p.add(ocispec.MediaTypeImageLayer, layer))
		case 1:
			p.layers = append(p.layers, p.add(ocispec.MediaTypeImageLayerGzip, gz(t, layer)))
		case 2:
			p.layers = append(p.layers, p.add(ocispec.MediaTypeImageLayerZstd, zst(t, layer)))
		}
	}
	p.config = p.addJSON(t, ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platform, Config: config, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	p.manifest = p.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: p.config, Layers: p.layers})
	return p
}

func (p *parts) size() (sum int64) {
	for _, data := range p.blobs {
		sum += int64(len(data))
	}
	return sum
}

func here() ocispec.Platform { return platforms.Normalize(platforms.DefaultSpec()) }

// ociLayout is a tar of an OCI image layout.
func ociLayout(t testing.TB, p *parts, top ...ocispec.Descriptor) []byte {
	t.Helper()
	index, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: top})
	if err != nil {
		t.Fatal(err)
	}
	files := []file{text("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), {"index.json", index}}
	for d, data := range p.blobs {
		files = append(files, file{path.Join("blobs", d.Algorithm().String(), d.Encoded()), data})
	}
	return tarOf(t, files...)
}

func named(d ocispec.Descriptor, name string) ocispec.Descriptor {
	d.Annotations = map[string]string{"io.containerd.image.name": name, ocispec.AnnotationRefName: "latest"}
	return d
}

// dockerSave is an archive as docker save wrote them before it used OCI layouts.
func dockerSave(t testing.TB, tags []string, config ocispec.ImageConfig, layers ...[]byte) []byte {
	t.Helper()
	var (
		files []file
		names []string
		diffs []digest.Digest
	)
	for i, layer := range layers {
		name := fmt.Sprintf("%064d/layer.tar", i)
		files, names, diffs = append(files, file{name, layer}), append(names, name), append(diffs, digest.FromBytes(layer))
	}
	image, err := json.Marshal(ocispec.Image{Platform: here(), Config: config, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: diffs}})
	if err != nil {
		t.Fatal(err)
	}
	configName := digest.FromBytes(image).Encoded() + ".json"
	manifest, err := json.Marshal([]map[string]any{{"Config": configName, "RepoTags": tags, "Layers": names}})
	if err != nil {
		t.Fatal(err)
	}
	return tarOf(t, append(files, file{configName, image}, file{"manifest.json", manifest})...)
}
