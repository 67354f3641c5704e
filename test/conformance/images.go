package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// recipe says what an image of the suite is made of. Where upstream's is
// Alpine with some packages, ours is Debian with the same programs.
type recipe struct {
	packages []string          // of Debian; what they need comes along
	programs map[string]string // path in the image → program built from upstream's module
	sources  map[string]string // path in the image → file of upstream's test/images
	texts    map[string]string // path in the image → content
	links    map[string]string // path in the image → target
	setuid   bool              // the programs are set-user-id and set-group-id
	registry bool              // with the files of a registry that it can be
	config   ocispec.ImageConfig
}

// tools is a root file system with what cases run in it, by whatever libc.
var tools = []string{"busybox", "libc-bin", "bash", "curl", "bind9-dnsutils", "netcat-openbsd", "iproute2", "iputils-ping", "iperf", "wget", "coreutils"}

// recipes are the images that can be made, by their names without registry
// and tag: https://github.com/kubernetes/kubernetes/tree/v1.36.3/test/images.
var recipes = map[string]recipe{
	"agnhost": {
		packages: tools,
		programs: map[string]string{"/agnhost": "agnhost", "/coredns": "coredns"},
		sources:  map[string]string{"/localhost.crt": "agnhost/porter/localhost.crt", "/localhost.key": "agnhost/porter/localhost.key"},
		links:    map[string]string{"/agnhost-2": "agnhost", "/usr/bin/nc": "nc.openbsd"},
		texts: map[string]string{
			"/etc/passwd":        passwd + "user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n",
			"/etc/group":         group + "user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n",
			"/uploads/.keep":     "",
			"/etc/nsswitch.conf": "hosts: files dns\n",
		},
		registry: true,
		config:   run("/agnhost", "pause"),
	},
	// Its shell hands on variables whose names it could not set, as that of
	// Debian's busybox does not.
	"busybox":           {packages: []string{"busybox", "bash"}, links: map[string]string{"/usr/bin/sh": "bash"}, config: run("", "sh")},
	"etcd":              {programs: map[string]string{"/usr/local/bin/etcd": "etcd"}},
	"glibc-dns-testing": {packages: tools, config: run("", "bash")},
	"ipc-utils":         {packages: []string{"busybox", "util-linux"}, config: run("", "sh")},
	"kitten":            animal("kitten"),
	"nautilus":          animal("nautilus"),
	"nginx": {
		packages: []string{"nginx", "busybox"},
		links:    map[string]string{"/etc/nginx/sites-enabled/default": "/etc/nginx/sites-available/default"},
		config:   run("nginx", "-g", "daemon off;"),
	},
	"nonewprivs": {
		packages: []string{"busybox"}, programs: map[string]string{"/usr/local/bin/nnp": "nonewprivs"}, setuid: true,
		config: run("", "nnp"),
	},
	"nonroot":          {packages: []string{"busybox"}, config: ocispec.ImageConfig{Cmd: []string{"sh"}, User: "1234"}},
	"pause":            {programs: map[string]string{"/pause": "pause"}, config: run("/pause")},
	"sample-apiserver": {programs: map[string]string{"/sample-apiserver": "sample-apiserver"}, config: run("/sample-apiserver")},
}

const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nwww-data:x:33:33:www-data:/var/www:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
	group  = "root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n"
	// A case reads this to know that it looks at an image and not at the node.
	release = "PRETTY_NAME=\"Debian in the place of Alpine Linux\"\nID=debian\n"
)

func run(entrypoint string, args ...string) ocispec.ImageConfig {
	c := ocispec.ImageConfig{Cmd: args}
	if entrypoint != "" {
		c.Entrypoint = []string{entrypoint}
	}
	return c
}

// animal is one of the two images that the guest book rolls between.
func animal(name string) recipe {
	return recipe{
		packages: []string{"busybox"},
		programs: map[string]string{"/agnhost": "agnhost"},
		sources:  map[string]string{"/data.json": name + "/html/data.json", "/" + name + ".jpg": name + "/html/" + name + ".jpg"},
		config:   run("/agnhost", "test-webserver"),
	}
}

// makeImages makes those images of the suite for which there is a recipe,
// and says for which there is none.
func (j *judge) makeImages(ctx context.Context) (r registry, without []string, err error) {
	names, err := exec.CommandContext(ctx, j.program("e2e.test"), "--list-images").Output()
	if err != nil {
		return r, nil, fmt.Errorf("list the suite's images: %w", err)
	}
	r = registry{filepath.Join(j.dir, "images"), map[string]string{}}
	if err := os.MkdirAll(filepath.Join(r.dir, "blobs"), 0o755); err != nil {
		return r, nil, err
	}
	// The registry that agnhost can be serves the image pause.
	bases := []string{"pause"}
	for _, name := range strings.Fields(string(names)) {
		repository, ours := strings.CutPrefix(name, registryName+"/")
		base, _, _ := strings.Cut(name[strings.LastIndex(name, "/")+1:], ":")
		if _, ok := recipes[base]; !ok || !ours {
			without = append(without, name)
			continue
		}
		r.manifests[repository] = base
		if !slices.Contains(bases, base) {
			bases = append(bases, base)
		}
	}
	for _, base := range bases {
		if err := j.makeImage(ctx, r, base, recipes[base]); err != nil {
			return r, nil, fmt.Errorf("make image %s: %w", base, err)
		}
	}
	return r, without, nil
}

// makeImage makes an image again only when its recipe or a program has
// changed.
func (j *judge) makeImage(ctx context.Context, r registry, base string, rec recipe) error {
	written, kept := fmt.Appendf(nil, "%+v\n", rec), filepath.Join(r.dir, base+".recipe")
	before, _ := os.ReadFile(kept)
	made, err := os.Stat(r.manifest(base))
	stale := err != nil || !bytes.Equal(before, written)
	for _, p := range rec.programs {
		info, err := os.Stat(j.program(p))
		if err != nil {
			return err
		}
		stale = stale || info.ModTime().After(made.ModTime())
	}
	if !stale {
		return nil
	}
	fmt.Println("making image", base)
	tmp, err := os.CreateTemp(r.dir, ".layer-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	l, err := newLayer(tmp)
	if err != nil {
		return err
	}
	if err := j.fill(ctx, l, base, rec); err != nil {
		return err
	}
	if rec.registry {
		if err := r.copyInto(l, "pause"); err != nil {
			return err
		}
	}
	if err := l.t.Close(); err != nil {
		return err
	}
	if err := r.add(base, tmp, rec.config); err != nil {
		return err
	}
	return os.WriteFile(kept, written, 0o644)
}

// fill writes the recipe's own files first: they win over those of packages.
func (j *judge) fill(ctx context.Context, l *layer, base string, r recipe) error {
	texts := map[string]string{"/etc/passwd": passwd, "/etc/group": group, "/etc/os-release": release}
	maps.Copy(texts, r.texts)
	for _, name := range slices.Sorted(maps.Keys(texts)) {
		if err := l.text(name, texts[name]); err != nil {
			return err
		}
	}
	mode := int64(0o755)
	if r.setuid {
		mode |= 0o6000
	}
	for _, name := range slices.Sorted(maps.Keys(r.programs)) {
		if err := l.file(name, j.program(r.programs[name]), mode); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.sources)) {
		if err := l.file(name, filepath.Join(j.upstream, "test/images", r.sources[name]), 0o644); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.links)) {
		if err := l.link(name, r.links[name]); err != nil {
			return err
		}
	}
	if len(r.packages) == 0 {
		return nil
	}
	debs, err := j.download(ctx, base, r.packages)
	if err != nil {
		return err
	}
	for _, deb := range debs {
		if err := l.deb(deb); err != nil {
			return err
		}
	}
	return applets(ctx, l)
}

// applets gives busybox the names of what no package brought.
func applets(ctx context.Context, l *layer) error {
	list, err := exec.CommandContext(ctx, "busybox", "--list").Output()
	if err != nil {
		return fmt.Errorf("list busybox's applets (make deps installs it): %w", err)
	}
	for _, tool := range strings.Fields(string(list)) {
		if l.seen["usr/bin/"+tool] || l.seen["usr/sbin/"+tool] {
			continue
		}
		if err := l.link("usr/bin/"+tool, "busybox"); err != nil {
			return err
		}
	}
	return nil
}

// download fetches Debian packages and everything that they depend on, as if
// nothing were installed. The machine's own packages stay as they are.
func (j *judge) download(ctx context.Context, base string, packages []string) ([]string, error) {
	dir := filepath.Join(j.dir, "debs", base)
	if err := os.MkdirAll(filepath.Join(dir, "partial"), 0o755); err != nil {
		return nil, err
	}
	status := filepath.Join(dir, "status")
	if err := os.WriteFile(status, nil, 0o644); err != nil {
		return nil, err
	}
	// As root, apt hands downloading to a user who may not write here.
	args := append([]string{"-qq", "-y", "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1", "-o", "Dir::State::status=" + status,
		"-o", "Dir::Cache::archives=" + dir, "--no-install-recommends", "--download-only", "install"}, packages...)
	get := func(args ...string) error {
		if out, err := exec.CommandContext(ctx, "apt-get", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("download Debian packages: %s: %w", out, err)
		}
		return nil
	}
	if get(args...) != nil {
		// The package lists may be missing or name versions that are gone.
		if err := errors.Join(get("-qq", "update"), get(args...)); err != nil {
			return nil, err
		}
	}
	return filepath.Glob(filepath.Join(dir, "*.deb"))
}
