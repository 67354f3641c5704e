package process

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/container"
)

// The root of a program of the machine is an empty directory of its attempt.
// In the private mount namespace each directory of the machine's root is bound
// to its place in it, then what the machine has mounted below, each by itself:
// bound recursively, every process would hold the mounts of all pods.
//
// A mount point that the machine lacks must not be made on it. At the top it is
// made in that directory. Elsewhere the nearest directory that there is becomes
// a view: a directory of the attempt in which each entry of the machine's is
// bound to its place, next to the new mount point.

// maxEntries is how much a view may have to show: each entry is a mount.
const maxEntries = 1000

// private are directories in which new files are the attempt's own, unless the
// root is shared: everybody writes there, and nobody counts on it to last.
var private = []string{"/tmp", "/var/tmp"}

// run is like private, but what is there is seen: programs of the machine are
// reached by its sockets.
const run = "/run"

// machineRoot plans the root of a workload that has the machine's, and makes
// what that needs in dir, the attempt's directory.
func machineRoot(c container.Config, w runtime.Workload, dir string) (container.Root, error) {
	mounted, err := mount.List()
	if err != nil {
		return container.Root{}, fmt.Errorf("list the machine's mounts: %w", err)
	}
	p := &plan{
		mode: w.Machine, dir: dir, readOnly: w.ReadOnlyRoot,
		hidden: []string{c.Dir, path.Join("/run", c.CgroupRoot)},
		places: map[string]specs.Mount{}, views: map[string]string{}, own: map[string]bool{},
	}
	if w.ReadOnlyRoot {
		p.mode = runtime.ReadOnlyRoot
	}
	if err := p.make(w, mounted); err != nil {
		return container.Root{}, err
	}
	root := container.Root{Path: p.root(), Mounts: p.mounts(), Programs: "/", ReadOnly: p.mode != runtime.OverlayRoot}
	if !w.Privileged {
		// It has the secrets of all pods and the keys of the cluster.
		root.Masked = []string{c.Dir}
	}
	return root, nil
}

type plan struct {
	mode     runtime.MachineRoot
	readOnly bool     // without exceptions
	dir      string   // the attempt's
	hidden   []string // what is mounted below these is left out
	mounted  []mount.Mounted
	targets  []string               // where the workload's mounts and its own file systems are
	places   map[string]specs.Mount // by Destination
	views    map[string]string      // the directory of the attempt, by place
	own      map[string]bool        // places where what is missing is made in the attempt's directory
}

func (p *plan) root() string { return filepath.Join(p.dir, "root") }

func (p *plan) make(w runtime.Workload, mounted []mount.Mounted) error {
	switch p.mode {
	case runtime.SharedRoot, runtime.ReadOnlyRoot:
	case runtime.OverlayRoot:
		memory := filepath.Join(p.dir, container.MemoryDir)
		if err := os.MkdirAll(memory, 0o755); err != nil {
			return err
		}
		// Pages count for who writes them: the workload's limit is the bound.
		if err := unix.Mount("tmpfs", memory, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("mount tmpfs on %s: %w", memory, err)
		}
	default:
		return fmt.Errorf("root %q of the machine: %w", p.mode, runtime.ErrInvalid)
	}
	if err := os.MkdirAll(p.root(), 0o755); err != nil {
		return err
	}
	for _, m := range mounted {
		if !p.leftOut(m) {
			p.mounted = append(p.mounted, m)
		}
	}
	if err := p.top(); err != nil {
		return err
	}
	for _, m := range p.mounted {
		if m.Path == "/" {
			continue
		}
		if _, err := os.Lstat(m.Path); err != nil {
			continue // another mount hides it
		}
		if err := p.show(m.Path, true); err != nil {
			return err
		}
	}
	if p.mode != runtime.SharedRoot && !p.readOnly {
		if err := p.makePrivate(); err != nil {
			return err
		}
	}
	for _, m := range w.Mounts {
		at, rest, err := resolve(m.Target)
		if err != nil {
			return fmt.Errorf("%w: mount on %s: %v", runtime.ErrInvalid, m.Target, err)
		}
		p.targets = append(p.targets, path.Join(append([]string{at}, rest...)...))
	}
	p.targets = append(p.targets, "/proc", "/sys", "/dev")
	for _, m := range w.Mounts {
		if err := p.place(m); err != nil {
			return err
		}
	}
	return p.checkDir(w)
}

// leftOut are mounts that every root has its own of, those of pods, and those
// that container engines make for theirs.
func (p *plan) leftOut(m mount.Mounted) bool {
	return m.Path != "/" && (m.Type == "overlay" || m.Type == "nsfs") ||
		slices.ContainsFunc(append([]string{"/proc", "/sys", "/dev"}, p.hidden...), func(dir string) bool { return within(m.Path, dir) })
}

func within(name, dir string) bool { return name == dir || strings.HasPrefix(name, dir+"/") }

// top shows the entries of the machine's root.
func (p *plan) top() error {
	entries, err := os.ReadDir("/")
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := "/" + e.Name()
		switch {
		case name == "/proc" || name == "/sys" || name == "/dev":
		case e.Type() == fs.ModeSymlink:
			if err := copyLink(name, filepath.Join(p.root(), name)); err != nil {
				return err
			}
		default:
			if err := p.show(name, false); err != nil {
				return err
			}
		}
	}
	return nil
}

func copyLink(from, to string) error {
	target, err := os.Readlink(from)
	if err != nil {
		return err
	}
	return os.Symlink(target, to)
}

// show binds a file or directory of the machine to its place. follow says that
// what the machine will mount there, or takes away, is to be seen.
func (p *plan) show(name string, follow bool) error {
	m := p.at(name)
	if p.mode == runtime.OverlayRoot && overlaid(name, m) {
		return p.overlay(name, m)
	}
	// Mounts of pods would come through, to every process. Of other file
	// systems none is kept from being unmounted.
	propagation := "private"
	if follow && !slices.ContainsFunc(p.hidden, func(dir string) bool { return within(dir, name) }) {
		propagation = "slave"
	}
	options := []string{"bind", propagation}
	if p.mode != runtime.SharedRoot {
		options = append(options, readOnly(m)...)
	}
	p.places[name] = specs.Mount{Destination: name, Type: "bind", Source: name, Options: options}
	return nil
}

// at is the mount that a path of the machine is in.
func (p *plan) at(name string) mount.Mounted {
	var found mount.Mounted
	for _, m := range p.mounted {
		if within(name, strings.TrimSuffix(m.Path, "/")) && len(m.Path) >= len(found.Path) {
			found = m
		}
	}
	return found
}

// readOnly are the options of a mount, which setting one would take away, and
// "ro".
func readOnly(m mount.Mounted) []string {
	return append(slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "rw" || o == "ro" || o == "idmapped" }), "ro")
}

// overlaid tells whether something can be the lower layer of an overlay, for
// what we know; the rest is read-only.
func overlaid(name string, m mount.Mounted) bool {
	info, err := os.Stat(name)
	// A socket is not the same one in an overlay.
	return err == nil && info.IsDir() && !within(name, run) && slices.Contains([]string{"ext4", "xfs", "btrfs", "tmpfs"}, m.Type) && !slices.Contains(m.Options, "ro")
}

// overlay shows a directory of the machine below one in memory, which takes the
// writes.
func (p *plan) overlay(name string, m mount.Mounted) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	memory := filepath.Join(p.dir, container.MemoryDir, flat(name))
	upper, work := filepath.Join(memory, "upper"), filepath.Join(memory, "work")
	if err := errors.Join(os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), likeness(upper, info)); err != nil {
		return err
	}
	options := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool { return o == "rw" || o == "idmapped" })
	p.places[name] = specs.Mount{Destination: name, Type: "overlay", Source: "overlay",
		Options: append(options, "lowerdir="+name, "upperdir="+upper, "workdir="+work)}
	p.own[name] = true
	return nil
}

// flat is a path as the name of one file.
func flat(name string) string { return url.PathEscape(name) }

// likeness gives a directory the owner and the rights of another.
func likeness(dir string, info fs.FileInfo) error {
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		if err := os.Chown(dir, int(stat.Uid), int(stat.Gid)); err != nil {
			return err
		}
	}
	return os.Chmod(dir, info.Mode().Perm()|info.Mode()&(fs.ModeSticky|fs.ModeSetgid|fs.ModeSetuid))
}

// makePrivate gives the attempt its own /tmp and the like.
func (p *plan) makePrivate() error {
	for _, name := range private {
		info, err := os.Lstat(name)
		if err != nil || !info.IsDir() {
			continue
		}
		dir := filepath.Join(p.dir, container.UpperDir, flat(name))
		if err := errors.Join(os.MkdirAll(dir, 0o755), likeness(dir, info)); err != nil {
			return err
		}
		maps.DeleteFunc(p.places, func(place string, _ specs.Mount) bool { return within(place, name) })
		p.places[name] = specs.Mount{Destination: name, Type: "bind", Source: dir, Options: []string{"bind", "private"}}
		p.own[name] = true
	}
	if info, err := os.Lstat(run); err != nil || !info.IsDir() {
		return nil
	}
	return p.view(run)
}

// place sees to it that there is something to mount one of the workload's
// mounts on.
func (p *plan) place(m runtime.Mount) error {
	if m.Propagation == "rshared" {
		// The machine would get the mounts that its view is made of.
		return fmt.Errorf("share mounts below %s with the machine: %w", m.Target, runtime.ErrInvalid)
	}
	at, missing, err := p.missing(m.Target)
	if err != nil || missing == "" {
		return err
	}
	if p.views[at] == "" {
		if err := p.view(at); err != nil {
			return fmt.Errorf("mount on %s: %w", m.Target, err)
		}
	}
	if p.own[at] {
		return nil
	}
	return stub(filepath.Join(p.views[at], missing), m.Source)
}

// checkDir refuses a working directory that would be made on the machine.
func (p *plan) checkDir(w runtime.Workload) error {
	_, missing, err := p.missing(path.Join("/", w.Dir))
	if err == nil && missing != "" {
		err = fmt.Errorf("%w: working directory %s is not on this machine; make it, or mount a volume there", runtime.ErrInvalid, w.Dir)
	}
	return err
}

// missing splits a path at the end of what the machine has of it. Nothing is
// missing that can be made in a volume or in the attempt's directory.
func (p *plan) missing(name string) (at, missing string, err error) {
	at, rest, err := resolve(name)
	if err != nil {
		return "", "", fmt.Errorf("%w: %s: %v", runtime.ErrInvalid, name, err)
	}
	full := path.Join(append([]string{at}, rest...)...)
	elsewhere := slices.ContainsFunc(p.targets, func(t string) bool { return full != t && within(full, t) })
	if elsewhere || len(rest) == 0 || at == "/" || p.own[p.covering(at)] {
		return at, "", nil
	}
	return at, path.Join(rest...), nil
}

// resolve follows the links of a path as far as the machine has it.
func resolve(name string) (at string, missing []string, err error) {
	split := func(name string) []string { return strings.Split(path.Clean(name)[1:], "/") }
	at, rest := "/", split(path.Join("/", name))
	for links := 0; len(rest) > 0; {
		next := path.Join(at, rest[0])
		info, err := os.Lstat(next)
		if errors.Is(err, fs.ErrNotExist) {
			return at, rest, nil
		}
		if err != nil {
			return "", nil, err
		}
		if rest = rest[1:]; info.Mode().Type() != fs.ModeSymlink {
			at = next
			continue
		}
		target, err := os.Readlink(next)
		if err != nil {
			return "", nil, err
		}
		if links++; links > 40 {
			return "", nil, unix.ELOOP
		}
		if !path.IsAbs(target) {
			target = path.Join(at, target)
		}
		at, rest = "/", append(split(target), rest...)
	}
	return at, nil, nil
}

// covering is the place that a path is in.
func (p *plan) covering(name string) string {
	for ; name != "/"; name = path.Dir(name) {
		if _, ok := p.places[name]; ok {
			return name
		}
	}
	return name
}

// view shows a directory of the machine entry by entry, so that there can be
// more in it. What is written to it, not to its entries, fails, but where it
// would not be kept anyway.
func (p *plan) view(name string) error {
	info, err := os.Stat(name)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(name)
	if err != nil {
		return fmt.Errorf("%w: %v", runtime.ErrInvalid, err)
	}
	if len(entries) > maxEntries {
		return fmt.Errorf("%w: it is not on this machine, and %s has more than %d entries; make it, or annotate the pod with process.tutti.dev/root: overlay", runtime.ErrInvalid, name, maxEntries)
	}
	volatile := !p.readOnly && slices.ContainsFunc(append([]string{run}, private...), func(dir string) bool { return within(name, dir) })
	dir, options := filepath.Join(p.dir, "views", flat(name)), []string{"bind", "private", "ro"}
	if volatile {
		dir, options = filepath.Join(p.dir, container.UpperDir, flat(name)), options[:2]
	}
	if err := errors.Join(os.MkdirAll(dir, 0o755), likeness(dir, info)); err != nil {
		return err
	}
	for _, e := range entries {
		if volatile && e.Type().IsRegular() {
			continue // a lock, a PID file: gone before it is mounted, or another by then
		}
		from, to := path.Join(name, e.Name()), filepath.Join(dir, e.Name())
		if e.Type() == fs.ModeSymlink {
			err = copyLink(from, to)
		} else if err = stub(to, from); err == nil {
			if _, shown := p.places[from]; !shown && !slices.Contains(p.hidden, from) {
				err = p.show(from, false)
			}
		}
		if err != nil {
			return err
		}
	}
	p.views[name], p.own[name] = dir, volatile
	p.places[name] = specs.Mount{Destination: name, Type: "bind", Source: dir, Options: options}
	return nil
}

// stub makes something that source can be mounted on.
func stub(name, source string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	if info.IsDir() {
		return os.MkdirAll(name, 0o755)
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o644)
	if err == nil {
		err = f.Close()
	}
	return err
}

// mounts are the places, each after those that it is in.
func (p *plan) mounts() []specs.Mount {
	return slices.SortedFunc(maps.Values(p.places), func(a, b specs.Mount) int {
		depth := func(m specs.Mount) int { return strings.Count(m.Destination, "/") }
		return cmp.Or(cmp.Compare(depth(a), depth(b)), cmp.Compare(a.Destination, b.Destination))
	})
}
