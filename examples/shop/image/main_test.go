package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestArchive(t *testing.T) {
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, "usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(root, "usr/bin/tool"), []byte("tool"), 0o755),
		os.Symlink("usr/bin", filepath.Join(root, "bin")),
		os.WriteFile(filepath.Join(dir, "front"), []byte("front"), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var archives [2][]byte
	for i := range archives {
		out := filepath.Join(dir, "out.tar")
		c := config{User: "999", Entrypoint: []string{"/app/front"}, StopSignal: "SIGINT"}
		if err := run(out, "shop/front:1", root, []string{filepath.Join(dir, "front") + ":/app/front"}, c); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		archives[i] = data
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same input gave two archives")
	}
	files := read(t, archives[0])
	var index struct{ Manifests []descriptor }
	decode(t, files["index.json"], &index)
	if n := index.Manifests[0].Annotations["io.containerd.image.name"]; n != "docker.io/shop/front:1" {
		t.Errorf("name %q", n)
	}
	blob := func(d descriptor) []byte {
		data := files["blobs/sha256/"+d.Digest[len("sha256:"):]]
		if fmt.Sprintf("sha256:%x", sha256.Sum256(data)) != d.Digest || len(data) != d.Size {
			t.Errorf("blob %s is not what it says", d.Digest)
		}
		return data
	}
	var manifest struct {
		Config descriptor
		Layers []descriptor
	}
	decode(t, blob(index.Manifests[0]), &manifest)
	var image struct {
		Config config
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		}
	}
	decode(t, blob(manifest.Config), &image)
	if image.Config.StopSignal != "SIGINT" || image.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
		t.Errorf("configuration %+v", image)
	}
	layer := read(t, blob(manifest.Layers[0]))
	var names []string
	for n := range layer {
		names = append(names, n)
	}
	slices.Sort(names)
	if want := []string{"app/", "app/front", "bin", "usr/", "usr/bin/", "usr/bin/tool"}; !slices.Equal(names, want) {
		t.Errorf("layer holds %q, want %q", names, want)
	}
	if string(layer["app/front"]) != "front" {
		t.Errorf("front holds %q", layer["app/front"])
	}
}

func decode(t *testing.T, data []byte, v any) {
	t.Helper()
	if err := json.Unmarshal(data, v); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, archive []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(archive)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}
