package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

func open(t testing.TB, dir string) *Local {
	t.Helper()
	l, err := Open(t.Context(), Options{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func reopen(t testing.TB, l *Local) *Local {
	t.Helper()
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return open(t, l.dir)
}

// weight is what content and layers take, in bytes, without the databases.
func weight(t testing.TB, l *Local) (sum int64) {
	t.Helper()
	for _, dir := range []string{"content", "layers/snapshots"} {
		filepath.WalkDir(filepath.Join(l.dir, dir), func(_ string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				if info, err := d.Info(); err == nil {
					sum += info.Size()
				}
			}
			return nil
		})
	}
	return sum
}

func wait(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still not: %s", what)
		}
	}
}

func waitEmpty(t testing.TB, l *Local) {
	t.Helper()
	wait(t, "nothing left on disk", func() bool { return weight(t, l) == 0 })
}

// see reads a path of an image as its program would: from the highest layer
// that has it, unless a whiteout hides it.
func see(layers []string, name string) (string, error) {
	for i := len(layers) - 1; i >= 0; i-- {
		info, err := os.Lstat(filepath.Join(layers[i], name))
		if err == nil {
			if info.Mode()&fs.ModeCharDevice != 0 {
				return "", fs.ErrNotExist
			}
			data, err := os.ReadFile(filepath.Join(layers[i], name))
			return string(data), err
		}
		for dir := filepath.Dir(name); dir != "."; dir = filepath.Dir(dir) {
			opaque := make([]byte, 1)
			if n, err := unix.Lgetxattr(filepath.Join(layers[i], dir), "trusted.overlay.opaque", opaque); err == nil && n == 1 {
				return "", fs.ErrNotExist
			}
		}
	}
	return "", fs.ErrNotExist
}

func TestImport(t *testing.T) {
	cfg := Config{
		Entrypoint: []string{"/bin/busybox"}, Cmd: []string{"sleep", "1h"}, Env: []string{"A=1"}, User: "65534:65534",
		WorkingDir: "/etc", StopSignal: "SIGQUIT", Volumes: []string{"/data"}, ExposedPorts: []string{"80/tcp"},
		Labels: map[string]string{"a": "b"},
	}
	rootfs := busyboxTar(t)
	for name, archive := range map[string][]byte{"tar": rootfs, "gzip": gz(t, rootfs), "zstd": zst(t, rootfs)} {
		t.Run(name, func(t *testing.T) {
			l := open(t, t.TempDir())
			var reported Progress
			ctx := WithProgress(t.Context(), func(p Progress) { reported = p })
			img, err := l.Import(ctx, "busybox", bytes.NewReader(archive), cfg)
			if err != nil {
				t.Fatal(err)
			}
			if img.Name != "docker.io/library/busybox:latest" || !reflect.DeepEqual(img.Config, cfg) {
				t.Errorf("got %+v", img)
			}
			if want := (Progress{Bytes: int64(len(archive)), Layers: 1, TotalLayers: 1}); reported != want {
				t.Errorf("last progress %+v, want %+v", reported, want)
			}
			again, err := l.Import(t.Context(), "busybox", bytes.NewReader(archive), cfg)
			if err != nil || again.Digest != img.Digest {
				t.Errorf("imported again: %s, %v; want the same digest", again.Digest, err)
			}
			layers, err := l.Hold(t.Context(), img, "pod")
			if err != nil || len(layers) != 1 {
				t.Fatalf("layers %v, %v", layers, err)
			}
			if _, err := see(layers, "bin/busybox"); err != nil {
				t.Error(err)
			}
			if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || bytes.Contains(mounts, []byte(l.dir)) {
				t.Errorf("mounts are left behind: %v", err)
			}
		})
	}
}

func TestLoadDockerSave(t *testing.T) {
	l := open(t, t.TempDir())
	archive := dockerSave(t, []string{"shop:1", "registry.example/team/shop:1"}, ocispec.ImageConfig{Cmd: []string{"/web"}},
		tarOf(t, text("web", "program"), text("old", "x")), tarOf(t, text("etc/conf", "2"), text(".wh.old", "")))
	loaded, err := l.Load(t.Context(), bytes.NewReader(gz(t, archive)))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, img := range loaded {
		names = append(names, img.Name)
	}
	if want := []string{"docker.io/library/shop:1", "registry.example/team/shop:1"}; !reflect.DeepEqual(names, want) {
		t.Errorf("loaded %v, want %v", names, want)
	}
	img, err := l.Get(t.Context(), "shop:1")
	if err != nil || img.Config.Cmd[0] != "/web" {
		t.Fatalf("got %+v, %v", img, err)
	}
	layers, err := l.Hold(t.Context(), img, "pod")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := see(layers, "etc/conf"); got != "2" {
		t.Errorf("etc/conf: %q, %v", got, err)
	}
	if _, err := see(layers, "old"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a removed file is seen: %v", err)
	}
}

// threeLayers is plain, gzip and zstd, with a file and a directory removed.
func threeLayers(t testing.TB) *parts {
	return imageOf(t, here(), ocispec.ImageConfig{User: "7"},
		tarOf(t, text("a", "1"), text("b", "1"), text("dir/low", "1")),
		tarOf(t, text("b", "2"), text(".wh.a", "")),
		tarOf(t, text("dir/high", "3"), text("dir/.wh..wh..opq", "")))
}

func checkThreeLayers(t *testing.T, l *Local, img Image) {
	t.Helper()
	layers, err := l.Hold(t.Context(), img, "check")
	if err != nil || len(layers) != 3 {
		t.Fatalf("layers %v, %v", layers, err)
	}
	for name, want := range map[string]string{"a": "", "b": "2", "dir/low": "", "dir/high": "3"} {
		if got, _ := see(layers, name); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	// The kernel must see the same.
	merged := t.TempDir()
	lower := layers[2] + ":" + layers[1] + ":" + layers[0]
	if err := unix.Mount("overlay", merged, "overlay", unix.MS_RDONLY, "lowerdir="+lower); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(merged, unix.MNT_DETACH)
	for name, want := range map[string]string{"a": "", "b": "2", "dir/low": "", "dir/high": "3"} {
		if got, _ := os.ReadFile(filepath.Join(merged, name)); string(got) != want {
			t.Errorf("mounted %s: %q, want %q", name, got, want)
		}
	}
	if err := l.Release(t.Context(), "check"); err != nil {
		t.Fatal(err)
	}
}

func TestLoadOCILayout(t *testing.T) {
	l := open(t, t.TempDir())
	p := threeLayers(t)
	loaded, err := l.Load(t.Context(), bytes.NewReader(ociLayout(t, p, named(p.manifest, "docker.io/library/three:1"))))
	if err != nil || len(loaded) != 1 {
		t.Fatalf("loaded %v, %v", loaded, err)
	}
	img := loaded[0]
	if img.ID != p.config.Digest.String() || img.Digest != p.manifest.Digest.String() || img.Config.User != "7" {
		t.Errorf("got %+v", img)
	}
	checkThreeLayers(t, l, img)

	var saved bytes.Buffer
	if err := l.Save(t.Context(), "three:1", &saved); err != nil {
		t.Fatal(err)
	}
	other := open(t, t.TempDir())
	if loaded, err = other.Load(t.Context(), &saved); err != nil || len(loaded) != 1 || loaded[0].ID != img.ID {
		t.Fatalf("loaded what was saved: %v, %v", loaded, err)
	}
	checkThreeLayers(t, other, loaded[0])
}

func TestLoadChoosesPlatform(t *testing.T) {
	l := open(t, t.TempDir())
	p := threeLayers(t)
	other := ocispec.Platform{OS: "linux", Architecture: "s390x"}
	foreign := imageOf(t, other, ocispec.ImageConfig{}, tarOf(t, text("x", "x")))
	for d, data := range foreign.blobs {
		p.blobs[d] = data
	}
	mine, theirs := p.manifest, foreign.manifest
	platform := here()
	mine.Platform, theirs.Platform = &platform, &other
	index := p.addJSON(t, ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{theirs, mine}})
	loaded, err := l.Load(t.Context(), bytes.NewReader(ociLayout(t, p, named(index, "both:1"))))
	if err != nil || len(loaded) != 1 || loaded[0].ID != p.config.Digest.String() || loaded[0].Digest != index.Digest.String() {
		t.Fatalf("loaded %+v, %v", loaded, err)
	}
	for _, name := range []string{"both@" + index.Digest.String(), "both:1@" + p.manifest.Digest.String()} {
		if _, err := l.Get(t.Context(), name); err != nil {
			t.Error(err)
		}
	}
	l = reopen(t, l)
	img, err := l.Get(t.Context(), "both:1")
	if err != nil {
		t.Fatal(err)
	}
	checkThreeLayers(t, l, img)
	_, err = l.Load(t.Context(), bytes.NewReader(ociLayout(t, foreign, named(theirs, "foreign:1"))))
	if want := "load images: docker.io/library/foreign:1: it has no image for " + platforms.Format(here()) + ", only for linux/s390x"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestBrokenArchives(t *testing.T) {
	p := threeLayers(t)
	good := ociLayout(t, p, named(p.manifest, "good:1"))
	lacking := imageOf(t, here(), ocispec.ImageConfig{}, tarOf(t, text("a", "1")))
	delete(lacking.blobs, lacking.layers[0].Digest)
	wrong := imageOf(t, here(), ocispec.ImageConfig{}, tarOf(t, text("a", "1")))
	wrong.config = wrong.addJSON(t, ocispec.MediaTypeImageConfig, ocispec.Image{Platform: here(),
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromString("other")}}})
	wrong.manifest = wrong.addJSON(t, ocispec.MediaTypeImageManifest, ocispec.Manifest{
		MediaType: ocispec.MediaTypeImageManifest, Config: wrong.config, Layers: wrong.layers})
	damaged := gz(t, good)
	damaged[len(damaged)/2] ^= 0xff

	for name, c := range map[string]struct {
		archive []byte
		want    string // what the error tells
	}{
		"empty":        {nil, "load images: the archive is broken (unrecognized image format); make or copy it again"},
		"text":         {[]byte(strings.Repeat("not a tar at all ", 100)), "load images: the archive is broken, or is no tar archive; make or copy it again"},
		"cut off":      {good[:len(good)/2], "load images: the archive is cut off; make or copy it again"},
		"gzip cut off": {gz(t, good)[:len(good)/20], "load images: the archive is cut off; make or copy it again"},
		"damaged":      {damaged, "load images: the archive is broken"},
		"lacks a blob": {ociLayout(t, lacking, named(lacking.manifest, "lacking:1")),
			"load images: docker.io/library/lacking:1: the archive lacks " + lacking.layers[0].Digest.String()},
		"wrong content": {ociLayout(t, wrong, named(wrong.manifest, "wrong:1")),
			"load images: docker.io/library/wrong:1: the archive is broken (wrong diff id calculated"},
		"no name": {ociLayout(t, p, p.manifest), "load images: the archive does not name its image; save it again with a name, like shop:1"},
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t, t.TempDir())
			loaded, err := l.Load(t.Context(), bytes.NewReader(c.archive))
			if !errors.Is(err, ErrBroken) || !strings.HasPrefix(err.Error(), strings.Split(c.want, " calculated")[0]) || strings.Contains(err.Error(), "\n") {
				t.Errorf("loaded %v, error %v, want %s", loaded, err, c.want)
			}
			waitEmpty(t, l)
		})
	}
	for name, archive := range map[string][]byte{
		"import of nothing":  {},
		"import of text":     []byte(strings.Repeat("not a tar at all ", 100)),
		"import cut off":     busyboxTar(t)[:100_000],
		"import gzip cutoff": gz(t, busyboxTar(t))[:100_000],
	} {
		t.Run(name, func(t *testing.T) {
			l := open(t, t.TempDir())
			if _, err := l.Import(t.Context(), "x", bytes.NewReader(archive), Config{}); !errors.Is(err, ErrBroken) {
				t.Errorf("error %v, want ErrBroken", err)
			}
			waitEmpty(t, l)
		})
	}
	t.Run("reading fails", func(t *testing.T) {
		l := open(t, t.TempDir())
		r := io.MultiReader(bytes.NewReader(good[:len(good)/2]), failing{})
		if _, err := l.Load(t.Context(), r); !errors.Is(err, errFailing) || errors.Is(err, ErrBroken) {
			t.Errorf("error %v: the reader's was %v", err, errFailing)
		}
		waitEmpty(t, l)
	})
}

var errFailing = errors.New("cable pulled")

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errFailing }

func TestGetFinds(t *testing.T) {
	l := open(t, t.TempDir())
	img, err := l.Import(t.Context(), "shop/web:1", bytes.NewReader(busyboxTar(t)), Config{})
	if err != nil {
		t.Fatal(err)
	}
	hex := strings.TrimPrefix(img.ID, "sha256:")
	for _, name := range []string{"shop/web:1", "docker.io/shop/web:1", "index.docker.io/shop/web:1",
		"shop/web@" + img.Digest, "shop/web:9@" + img.Digest, img.ID, hex, hex[:12], hex[:4], img.Digest} {
		if got, err := l.Get(t.Context(), name); err != nil || got.ID != img.ID {
			t.Errorf("%s: %v, %v", name, got.Name, err)
		}
	}
	for _, name := range []string{"shop/web", "web:1", "other/web@" + img.Digest, hex[:3], "ffffffff"} {
		if got, err := l.Get(t.Context(), name); !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: %v, %v; want ErrNotFound", name, got.Name, err)
		}
	}
	for _, name := range []string{"", "Shop/Web:1", "shop web", "a:b:c"} {
		if got, err := l.Get(t.Context(), name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v, %v; want ErrName", name, got.Name, err)
		}
	}
}

func TestRemoveFreesSpace(t *testing.T) {
	l := open(t, t.TempDir())
	rootfs := busyboxTar(t)
	for _, name := range []string{"one", "two"} {
		if _, err := l.Import(t.Context(), name, bytes.NewReader(rootfs), Config{Env: []string{"N=" + name}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Remove(t.Context(), "one", false); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Get(t.Context(), "one"); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed, but Get says %v", err)
	}
	two, err := l.Get(t.Context(), "two")
	if err != nil {
		t.Fatal(err)
	}
	layers, err := l.Hold(t.Context(), two, "pod")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := see(layers, "bin/busybox"); err != nil {
		t.Errorf("a shared layer is gone: %v", err)
	}
	l.Release(t.Context(), "pod")
	if err := l.Remove(t.Context(), two.ID, false); err != nil {
		t.Fatal(err)
	}
	if left := weight(t, l); left != 0 {
		t.Errorf("%d bytes are left", left)
	}
	if err := l.Remove(t.Context(), "two", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
}

func TestHeldLayersStay(t *testing.T) {
	l := open(t, t.TempDir())
	img, err := l.Import(t.Context(), "web", bytes.NewReader(busyboxTar(t)), Config{})
	if err != nil {
		t.Fatal(err)
	}
	layers, err := l.Hold(t.Context(), img, "pod/1")
	if err != nil {
		t.Fatal(err)
	}
	if again, err := l.Hold(t.Context(), img, "pod/1"); err != nil || !reflect.DeepEqual(again, layers) {
		t.Errorf("held again: %v, %v", again, err)
	}
	err = l.Remove(t.Context(), "web", false)
	if want := "remove image: docker.io/library/web:latest is in use by pod/1; stop that first, or force the removal"; !errors.Is(err, ErrHeld) || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if err := l.Remove(t.Context(), "web", true); err != nil {
		t.Fatal(err)
	}
	there := func() bool { _, err := see(layers, "bin/busybox"); return err == nil }
	if !there() {
		t.Fatal("layers went while they were held")
	}

	l = reopen(t, l) // a restart forgets no hold, nor does a second one
	l = reopen(t, l)
	if err := l.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !there() {
		t.Fatal("layers went after a restart while they were held")
	}
	if again, err := l.Hold(t.Context(), img, "pod/2"); err != nil || !reflect.DeepEqual(again, layers) {
		t.Errorf("held without a name: %v, %v", again, err)
	}
	if got := l.Holders(); !reflect.DeepEqual(got, []string{"pod/1", "pod/2"}) {
		t.Errorf("holders %v", got)
	}
	for _, holder := range l.Holders() {
		if !there() {
			t.Error("layers went before the last release")
		}
		if err := l.Release(t.Context(), holder); err != nil {
			t.Fatal(err)
		}
	}
	waitEmpty(t, l)
	if _, err := l.Hold(t.Context(), img, "pod/3"); !errors.Is(err, ErrNotFound) {
		t.Errorf("held what is gone: %v", err)
	}
}

func TestReplacedImageStaysWhileHeld(t *testing.T) {
	l := open(t, t.TempDir())
	before, err := l.Import(t.Context(), "web", bytes.NewReader(tarOf(t, text("v", "1"))), Config{})
	if err != nil {
		t.Fatal(err)
	}
	layers, err := l.Hold(t.Context(), before, "pod")
	if err != nil {
		t.Fatal(err)
	}
	after, err := l.Import(t.Context(), "web", bytes.NewReader(tarOf(t, text("v", "2"))), Config{})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := see(layers, "v"); got != "1" {
		t.Errorf("the held image has %q, %v", got, err)
	}
	if got, err := l.Get(t.Context(), "web"); err != nil || got.ID != after.ID {
		t.Errorf("the name has %+v, %v", got, err)
	}
	l.Release(t.Context(), "pod")
	wait(t, "old layer gone", func() bool { _, err := see(layers, "v"); return err != nil })
	if _, err := l.Hold(t.Context(), after, "pod"); err != nil {
		t.Error(err)
	}
}

func TestReopenKeepsEverything(t *testing.T) {
	l := open(t, t.TempDir())
	p := threeLayers(t)
	if _, err := l.Load(t.Context(), bytes.NewReader(ociLayout(t, p, named(p.manifest, "three:1")))); err != nil {
		t.Fatal(err)
	}
	before, _ := l.List(t.Context())
	l = reopen(t, l)
	after, err := l.List(t.Context())
	if err != nil || !reflect.DeepEqual(before, after) {
		t.Errorf("before %+v\nafter %+v, %v", before, after, err)
	}
	checkThreeLayers(t, l, after[0])
}

func TestOpenTwice(t *testing.T) {
	l := open(t, t.TempDir())
	_, err := Open(t.Context(), Options{Dir: l.dir})
	if want := "open images: " + l.dir + "/metadata.db is in use by another process; stop that first"; err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
}

func TestDamagedDatabase(t *testing.T) {
	for _, db := range []string{"metadata.db", "layers/metadata.db"} {
		for how, damage := range map[string]func(*testing.T, string){
			"garbage": func(t *testing.T, file string) {
				if err := os.WriteFile(file, bytes.Repeat([]byte("garbage "), 8192), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			"cut short": func(t *testing.T, file string) {
				if err := os.Truncate(file, 2*int64(os.Getpagesize())+100); err != nil {
					t.Fatal(err)
				}
			},
			"pages overwritten": func(t *testing.T, file string) {
				f, err := os.OpenFile(file, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				info, _ := f.Stat()
				skip := 2 * int64(os.Getpagesize()) // the two meta pages
				if _, err := f.WriteAt(bytes.Repeat([]byte{0xa5}, int(info.Size()-skip)), skip); err != nil {
					t.Fatal(err)
				}
			},
		} {
			t.Run(db+" "+how, func(t *testing.T) {
				l := open(t, t.TempDir())
				if _, err := l.Import(t.Context(), "web", bytes.NewReader(busyboxTar(t)), Config{}); err != nil {
					t.Fatal(err)
				}
				if err := l.Close(); err != nil {
					t.Fatal(err)
				}
				damage(t, filepath.Join(l.dir, db))
				_, err := Open(t.Context(), Options{Dir: l.dir})
				want := "open images: " + filepath.Join(l.dir, db) + " is damaged (…); stop what runs, move " + l.dir + " away, then load or pull the images again"
				head, tail, _ := strings.Cut(want, "…")
				if err == nil || !strings.HasPrefix(err.Error(), head) || !strings.HasSuffix(err.Error(), tail) || strings.Contains(err.Error(), "\n") {
					t.Errorf("error %v", err)
				}
			})
		}
	}
}

func TestDamagedImageIsRemoved(t *testing.T) {
	l := open(t, t.TempDir())
	rootfs := busyboxTar(t)
	img, err := l.Import(t.Context(), "web", bytes.NewReader(rootfs), Config{})
	if err != nil {
		t.Fatal(err)
	}
	layers, _ := l.Hold(t.Context(), img, "pod")
	l.Release(t.Context(), "pod")
	l.Close()
	if err := os.RemoveAll(layers[0]); err != nil {
		t.Fatal(err)
	}
	l = open(t, l.dir)
	if _, err := l.Get(t.Context(), "web"); !errors.Is(err, ErrNotFound) {
		t.Errorf("a damaged image is offered: %v", err)
	}
	waitEmpty(t, l)
	if img, err = l.Import(t.Context(), "web", bytes.NewReader(rootfs), Config{}); err != nil {
		t.Fatal(err)
	}
	if layers, err = l.Hold(t.Context(), img, "pod"); err != nil {
		t.Fatal(err)
	}
	if _, err := see(layers, "bin/busybox"); err != nil {
		t.Error(err)
	}
}

func TestDiskFull(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=12m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	l := open(t, filepath.Join(dir, "images"))
	defer l.Close()
	if _, err := l.Import(t.Context(), "small", bytes.NewReader(tarOf(t, text("a", "1"))), Config{}); err != nil {
		t.Fatal(err)
	}
	before := weight(t, l)
	noise := make([]byte, 14<<20)
	for i := range noise {
		noise[i] = byte(rand.Uint32())
	}
	for when, size := range map[string]int{"unpacking": 7 << 20, "storing": 14 << 20} {
		_, err := l.Import(t.Context(), "big", bytes.NewReader(tarOf(t, file{"big", noise[:size]})), Config{})
		want := "import docker.io/library/big:latest: no space left in " + l.dir + "; remove unused images or make room"
		if !errors.Is(err, syscall.ENOSPC) || err.Error() != want {
			t.Errorf("%s: error %v, want %s", when, err, want)
		}
		wait(t, "what was there before", func() bool { return weight(t, l) == before })
	}
	if _, err := l.Import(t.Context(), "small2", bytes.NewReader(tarOf(t, text("b", "1"))), Config{}); err != nil {
		t.Errorf("the store does not work after the disk was full: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	l := open(t, t.TempDir())
	rootfs := tarOf(t, text("a", "1"), file{"big", make([]byte, 1<<20)})
	var work sync.WaitGroup
	for i := range 8 {
		work.Go(func() {
			name := fmt.Sprintf("n%d", i%4)
			for range 3 {
				img, err := l.Import(t.Context(), name, bytes.NewReader(rootfs), Config{Env: []string{"N=" + name}})
				if err != nil {
					t.Error(err)
					return
				}
				holder := fmt.Sprint("pod", i)
				// Another may remove it before it is held; never after.
				if layers, err := l.Hold(t.Context(), img, holder); err == nil {
					if err := l.Remove(t.Context(), name, true); err != nil && !errors.Is(err, ErrNotFound) {
						t.Error(err)
					}
					if got, err := see(layers, "a"); got != "1" {
						t.Errorf("held layer: %q, %v", got, err)
					}
				} else if !errors.Is(err, ErrNotFound) {
					t.Error(err)
				}
				if err := l.Release(t.Context(), holder); err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	all, _ := l.List(t.Context())
	for _, img := range all {
		if err := l.Remove(t.Context(), img.Name, false); err != nil {
			t.Error(err)
		}
	}
	waitEmpty(t, l)
}

func TestCancelledLoadLeavesNothing(t *testing.T) {
	l := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	r, w := io.Pipe()
	go func() {
		w.Write(busyboxTar(t)[:1<<20])
		cancel()
		w.CloseWithError(context.Canceled)
	}()
	if _, err := l.Import(ctx, "web", r, Config{}); !errors.Is(err, context.Canceled) || errors.Is(err, ErrBroken) {
		t.Errorf("error %v", err)
	}
	waitEmpty(t, l)
}

func BenchmarkHold(b *testing.B) {
	l := open(b, b.TempDir())
	img, err := l.Import(b.Context(), "web", bytes.NewReader(busyboxTar(b)), Config{})
	if err != nil {
		b.Fatal(err)
	}
	for i := 0; b.Loop(); i++ {
		holder := fmt.Sprint("pod", i)
		if _, err := l.Get(b.Context(), "web"); err != nil {
			b.Fatal(err)
		}
		if _, err := l.Hold(b.Context(), img, holder); err != nil {
			b.Fatal(err)
		}
		if err := l.Release(b.Context(), holder); err != nil {
			b.Fatal(err)
		}
	}
}

// TestKilledWhileImporting starts itself as another process, kills that in the
// middle of an import, and opens what it has left.
func TestKilledWhileImporting(t *testing.T) {
	const dirOfChild = "IMAGE_TEST_DIR"
	if dir := os.Getenv(dirOfChild); dir != "" {
		l := open(t, dir)
		if _, err := l.Import(t.Context(), "kept", bytes.NewReader(tarOf(t, text("a", "1"))), Config{}); err != nil {
			t.Fatal(err)
		}
		l.Import(t.Context(), "web", os.Stdin, Config{})
		t.Fatal("the import ended")
	}
	dir := t.TempDir()
	child := exec.Command(os.Args[0], "-test.run=^TestKilledWhileImporting$")
	child.Env = append(os.Environ(), dirOfChild+"="+dir)
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	defer child.Wait()
	defer child.Process.Kill()
	if _, err := stdin.Write(busyboxTar(t)[:1<<20]); err != nil {
		t.Fatal(err)
	}
	wait(t, "half an archive written", func() bool {
		found, _ := filepath.Glob(filepath.Join(dir, "content/ingest/*/data"))
		return len(found) > 0
	})
	child.Process.Kill()
	child.Wait()
	// One that was killed a moment later or earlier.
	nameless := filepath.Join(dir, "content", "ingest", "nameless")
	if err := errors.Join(os.Mkdir(nameless, 0o755), os.WriteFile(filepath.Join(nameless, "startedat"), nil, 0o644)); err != nil {
		t.Fatal(err)
	}

	l := open(t, dir)
	if all, err := l.List(t.Context()); err != nil || len(all) != 1 || all[0].Name != "docker.io/library/kept:latest" {
		t.Errorf("list %+v, %v", all, err)
	}
	wait(t, "half an archive removed", func() bool {
		found, _ := filepath.Glob(filepath.Join(dir, "content/ingest/*"))
		return len(found) == 0
	})
	if err := l.Remove(t.Context(), "kept", false); err != nil {
		t.Fatal(err)
	}
	waitEmpty(t, l)
}
