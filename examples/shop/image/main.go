// Command image writes a container image with one layer as an OCI archive,
// from files and nothing else: no daemon, no base image. The same input gives
// the same bytes.
//
//	image -o front.tar -name shop/front:1 -entrypoint /front -user 65532 -add bin/front:/front
//	image -o db.tar -name shop/db:1 -entrypoint /entry.sh -user 999 -root rootfs
package main

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strings"
)

type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// config is the part of the OCI image configuration that we use.
type config struct {
	User       string   `json:",omitempty"`
	Env        []string `json:",omitempty"`
	Entrypoint []string `json:",omitempty"`
	StopSignal string   `json:",omitempty"`
}

func main() {
	var c config
	var entrypoint, env, add list
	out := flag.String("o", "", "archive to write")
	name := flag.String("name", "", "name of the image, like shop/front:1")
	root := flag.String("root", "", "directory to become the root file system")
	flag.Var(&add, "add", "SOURCE:TARGET, a file to add; repeatable")
	flag.Var(&entrypoint, "entrypoint", "word of the entry point; repeatable")
	flag.Var(&env, "env", "NAME=value; repeatable")
	flag.StringVar(&c.User, "user", "65532", "user to run as")
	flag.StringVar(&c.StopSignal, "stop-signal", "", "signal that asks to stop, SIGTERM if empty")
	flag.Parse()
	c.Entrypoint, c.Env = entrypoint, env
	if err := run(*out, *name, *root, add, c); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(out, name, root string, add []string, c config) error {
	if out == "" || name == "" || flag.NArg() > 0 {
		return errors.New("-o and -name are needed, and no other arguments")
	}
	var layer bytes.Buffer
	if err := writeLayer(&layer, root, add); err != nil {
		return fmt.Errorf("write the layer of %s: %w", name, err)
	}
	// The name changes at once: an interrupted build leaves no half archive.
	tmp, err := os.CreateTemp(filepath.Dir(out), ".image-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	if err := writeArchive(tmp, name, layer.Bytes(), c); err != nil {
		return fmt.Errorf("write %s: %w", out, err)
	}
	if err := tmp.Close(); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), out)
}

// writeLayer writes root, then the added files. Everything belongs to root,
// has no time and is neither set-user-id nor set-group-id.
func writeLayer(w io.Writer, root string, add []string) error {
	t := tar.NewWriter(w)
	seen := map[string]bool{"": true}
	put := func(h *tar.Header, content string) error {
		h.Name = strings.Trim(h.Name, "/")
		seen[h.Name] = true
		if h.Typeflag == tar.TypeDir {
			h.Name += "/"
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		f, err := os.Open(content)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(t, f)
		return err
	}
	if root != "" {
		err := filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
			if err != nil || file == root {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			h := &tar.Header{Name: strings.TrimPrefix(file, root), Mode: int64(info.Mode().Perm())}
			switch {
			case info.IsDir():
				h.Typeflag = tar.TypeDir
				if info.Mode()&fs.ModeSticky != 0 {
					h.Mode |= 0o1000
				}
			case info.Mode().IsRegular():
				h.Typeflag, h.Size = tar.TypeReg, info.Size()
			case info.Mode()&fs.ModeSymlink != 0:
				h.Typeflag = tar.TypeSymlink
				if h.Linkname, err = os.Readlink(file); err != nil {
					return err
				}
			default:
				return fmt.Errorf("%s is neither file, directory nor symbolic link", file)
			}
			return put(h, file)
		})
		if err != nil {
			return err
		}
	}
	for _, a := range add {
		source, target, ok := strings.Cut(a, ":")
		if !ok || !path.IsAbs(target) {
			return fmt.Errorf("-add %s: want SOURCE:/TARGET", a)
		}
		target = path.Clean(target)
		for i, r := range target {
			if dir := target[:i]; r == '/' && !seen[strings.Trim(dir, "/")] {
				if err := put(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}, ""); err != nil {
					return err
				}
			}
		}
		info, err := os.Stat(source)
		if err != nil {
			return err
		}
		h := &tar.Header{Typeflag: tar.TypeReg, Name: target, Mode: int64(info.Mode().Perm()), Size: info.Size()}
		if err := put(h, source); err != nil {
			return err
		}
	}
	return t.Close()
}

// descriptor points at a blob of the archive.
type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Platform    *platform         `json:"platform,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

type platform struct {
	Architecture string `json:"architecture"`
	OS           string `json:"os"`
}

func writeArchive(w io.Writer, name string, layer []byte, c config) error {
	t := tar.NewWriter(w)
	dirs := []string{"blobs/", "blobs/sha256/"}
	for _, d := range dirs {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d, Mode: 0o755}); err != nil {
			return err
		}
	}
	file := func(name string, data []byte) error {
		if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		_, err := t.Write(data)
		return err
	}
	blob := func(mediaType string, data []byte) (descriptor, error) {
		sum := fmt.Sprintf("%x", sha256.Sum256(data))
		return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: len(data)}, file("blobs/sha256/"+sum, data)
	}
	here := platform{Architecture: runtime.GOARCH, OS: "linux"}
	document := func(mediaType string, v any) (descriptor, error) {
		data, err := json.Marshal(v)
		if err != nil {
			return descriptor{}, err
		}
		return blob(mediaType, data)
	}
	layerBlob, err := blob("application/vnd.oci.image.layer.v1.tar", layer)
	if err != nil {
		return err
	}
	configBlob, err := document("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": here.Architecture,
		"os":           here.OS,
		"config":       c,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{layerBlob.Digest}},
	})
	if err != nil {
		return err
	}
	const manifestType = "application/vnd.oci.image.manifest.v1+json"
	manifest, err := document(manifestType, map[string]any{
		"schemaVersion": 2,
		"mediaType":     manifestType,
		"config":        configBlob,
		"layers":        []descriptor{layerBlob},
	})
	if err != nil {
		return err
	}
	manifest.Platform = &here
	_, tag, _ := strings.Cut(path.Base(name), ":")
	manifest.Annotations = map[string]string{
		"io.containerd.image.name":          "docker.io/" + name,
		"org.opencontainers.image.ref.name": tag,
	}
	index, err := json.Marshal(map[string]any{
		"schemaVersion": 2,
		"mediaType":     "application/vnd.oci.image.index.v1+json",
		"manifests":     []descriptor{manifest},
	})
	if err != nil {
		return err
	}
	if err := file("index.json", index); err != nil {
		return err
	}
	if err := file("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`)); err != nil {
		return err
	}
	return t.Close()
}
