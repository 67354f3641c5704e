package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// guarded opens a store with a directory beside it that nothing may touch,
// and returns a check that nothing has.
func guarded(f *testing.F) (l *Local, beside string, intact func(testing.TB)) {
	dir := f.TempDir()
	beside = filepath.Join(dir, "beside")
	if err := os.Mkdir(beside, 0o755); err != nil {
		f.Fatal(err)
	}
	file := filepath.Join(beside, "file")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		f.Fatal(err)
	}
	l = open(f, filepath.Join(dir, "images"))
	return l, beside, func(t testing.TB) {
		t.Helper()
		entries, err := os.ReadDir(beside)
		if err != nil || len(entries) != 1 {
			t.Fatalf("something was made beside the store: %v %v", entries, err)
		}
		info, err := os.Lstat(file)
		if err != nil || info.Mode() != 0o600 {
			t.Fatalf("a file beside the store was changed: %v %v", info, err)
		}
		if data, err := os.ReadFile(file); err != nil || string(data) != "mine" {
			t.Fatalf("a file beside the store was written: %q %v", data, err)
		}
	}
}

// FuzzLayer unpacks a layer of two entries: a first that may prepare the
// ground, a second that may walk over it, out of the image's root.
func FuzzLayer(f *testing.F) {
	l, beside, intact := guarded(f)
	up := strings.Repeat("../", 12) + beside[1:]
	for _, name := range []string{"file", "dir/file", "/file", "../file", up + "/file", beside + "/file", ".wh.file", ".wh...", ".wh..wh..opq", "", "."} {
		for _, link := range []string{"", beside, up, "../..", "/", name} {
			f.Add(byte(tar.TypeSymlink), "dir", link, byte(tar.TypeReg), name, "", []byte("theirs"))
		}
		f.Add(byte(tar.TypeReg), name, "", byte(tar.TypeLink), "other", beside+"/file", []byte("theirs"))
		f.Add(byte(tar.TypeSymlink), "a", beside, byte(tar.TypeLink), "b", "a/file", []byte("theirs"))
		f.Add(byte(tar.TypeDir), name, "", byte(tar.TypeChar), "null", "", []byte{})
		f.Add(byte(tar.TypeBlock), name, "", byte(tar.TypeFifo), name, "", []byte{})
	}
	f.Fuzz(func(t *testing.T, kind1 byte, name1, link1 string, kind2 byte, name2, link2 string, body []byte) {
		var layer bytes.Buffer
		w := tar.NewWriter(&layer)
		for _, h := range []*tar.Header{
			{Typeflag: kind1, Name: name1, Linkname: link1, Mode: 0o777},
			{Typeflag: kind2, Name: name2, Linkname: link2, Mode: 0o6777},
		} {
			if h.Typeflag == tar.TypeReg {
				h.Size = int64(len(body))
			}
			if w.WriteHeader(h) != nil {
				t.Skip("not a tar")
			}
			if h.Size > 0 {
				if _, err := w.Write(body); err != nil {
					t.Skip("not a tar")
				}
			}
		}
		if w.Close() != nil {
			t.Skip("not a tar")
		}
		if _, err := l.Import(t.Context(), "fuzz:1", &layer, Config{}); err == nil {
			if err := l.Remove(t.Context(), "fuzz:1", false); err != nil {
				t.Errorf("remove what was imported: %v", err)
			}
		}
		intact(t)
	})
}

// FuzzArchive loads an archive of an image: its index, its manifest and its
// configuration as they come, and its layer. Where one names another by digest
// and size, as @manifest and @size-of-manifest, it gets the true ones: only so
// what is wrong with the other is met.
func FuzzArchive(f *testing.F) {
	l, _, intact := guarded(f)
	const (
		index = `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"@manifest","size":@size-of-manifest,` +
			`"platform":{"os":"linux","architecture":"amd64"},"annotations":{"io.containerd.image.name":"docker.io/library/seed:1","org.opencontainers.image.ref.name":"1"}}]}`
		manifest = `{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json",` +
			`"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"@config","size":@size-of-config},` +
			`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"@layer","size":@size-of-layer}]}`
		config = `{"os":"linux","architecture":"amd64","config":{"Cmd":["/file"],"Env":["A=b"],"User":"1:2","ExposedPorts":{"80/tcp":{}},"Volumes":{"/data":{}}},` +
			`"rootfs":{"type":"layers","diff_ids":["@layer"]},"history":[{"created_by":"seed"}]}`
	)
	layer := tarOf(f, text("file", "seed"))
	swap := strings.ReplaceAll
	f.Add(index, manifest, config, layer)
	f.Add(swap(index, "seed", "../seed"), manifest, config, layer)
	f.Add(swap(index, "@manifest", "sha256:../../beside/file"), manifest, config, layer)
	f.Add(swap(index, "@size-of-manifest", "-1"), manifest, config, layer)
	f.Add(swap(index, "oci.image.manifest", "oci.image.index"), manifest, config, layer)
	f.Add(index, swap(manifest, "@config", "@manifest"), config, layer)
	f.Add(index, swap(manifest, "@size-of-layer", "9223372036854775807"), config, layer)
	f.Add(index, swap(manifest, "v1.tar", "v1.tar+gzip"), config, gz(f, layer))
	f.Add(index, swap(manifest, "oci.image.layer.v1.tar", "docker.image.rootfs.foreign.diff.tar"), config, layer)
	f.Add(index, manifest, `{"rootfs":{"type":"layers","diff_ids":["sha256:../../beside"]}}`, layer)
	f.Add(index, manifest, swap(config, `["@layer"]`, `[]`), layer)
	f.Add(index, manifest, swap(config, `"linux"`, `"plan9"`), layer)
	f.Fuzz(func(t *testing.T, index, manifest, config string, layer []byte) {
		named := func(s, name string, b []byte) string {
			return strings.NewReplacer("@"+name, digest.FromBytes(b).String(), "@size-of-"+name, strconv.Itoa(len(b))).Replace(s)
		}
		config = named(config, "layer", layer)
		manifest = named(named(manifest, "layer", layer), "config", []byte(config))
		index = named(index, "manifest", []byte(manifest))
		blob := func(b string) file { return text("blobs/sha256/"+digest.FromString(b).Encoded(), b) }
		archive := tarOf(t, text("oci-layout", `{"imageLayoutVersion":"1.0.0"}`), text("index.json", index), blob(manifest), blob(config), blob(string(layer)))
		loaded, err := l.Load(t.Context(), bytes.NewReader(archive))
		for _, img := range loaded {
			_ = l.Remove(t.Context(), img.Name, false)
		}
		if err != nil && strings.Contains(err.Error(), "\n") {
			t.Errorf("an error of several lines: %v", err)
		}
		intact(t)
	})
}

// FuzzStream loads and imports any bytes as an archive.
func FuzzStream(f *testing.F) {
	l, _, intact := guarded(f)
	seed := tarOf(f, text("manifest.json", `[{"Config":"config.json","RepoTags":["a:1"],"Layers":["layer.tar"]}]`), text("config.json", `{}`), text("layer.tar", ""))
	for _, b := range [][]byte{nil, []byte("no archive"), seed, gz(f, seed), zst(f, seed), seed[:700]} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > 1<<16 {
			t.Skip("a compressed megabyte may be a gigabyte")
		}
		loaded, _ := l.Load(t.Context(), bytes.NewReader(b))
		for _, img := range loaded {
			_ = l.Remove(t.Context(), img.Name, false)
		}
		if _, err := l.Import(t.Context(), "fuzz:1", bytes.NewReader(b), Config{}); err == nil {
			_ = l.Remove(t.Context(), "fuzz:1", false)
		}
		intact(t)
	})
}
