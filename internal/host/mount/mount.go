// Package mount makes and removes mounts. Everything here can be repeated.
package mount

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Overlay mounts the layers, lowest first, with upper as the writable one on
// target. work must be an empty directory on upper's file system. Nothing is
// written through to the disk for the sake of a crash (volatile): upper must
// not be used again after one.
func Overlay(target string, layers []string, upper, work string) error {
	return overlay(target, layers, 0, "upperdir", upper, "workdir", work)
}

// OverlayReadOnly mounts the layers, lowest first, on target, an empty
// directory. Nothing in them can be changed or used as a device, and no
// program in them gets its owner's rights.
func OverlayReadOnly(target string, layers []string) error {
	// The kernel wants two layers at least: target itself is the second.
	layers = append([]string{target}, layers...)
	return overlay(target, layers, unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID)
}

// overlay takes further directories as pairs of an option and its value.
func overlay(target string, layers []string, flags uintptr, more ...string) error {
	// The kernel takes one page of options and gives ':' and ',' a meaning,
	// so directories are named by their descriptors.
	var open []*os.File
	defer func() {
		for _, f := range open {
			f.Close()
		}
	}()
	short := func(dir string) (string, error) {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", &os.PathError{Op: "open", Path: dir, Err: err}
		}
		open = append(open, os.NewFile(uintptr(fd), dir))
		return fmt.Sprintf("/proc/self/fd/%d", fd), nil
	}
	lower := make([]string, 0, len(layers))
	for _, layer := range slices.Backward(layers) {
		name, err := short(layer)
		if err != nil {
			return err
		}
		lower = append(lower, name)
	}
	options := "lowerdir=" + strings.Join(lower, ":")
	for pair := range slices.Chunk(more, 2) {
		name, err := short(pair[1])
		if err != nil {
			return err
		}
		options += "," + pair[0] + "=" + name
	}
	if len(more) > 0 {
		options += ",volatile"
	}
	if err := unix.Mount("overlay", target, "overlay", flags, options); err != nil {
		return fmt.Errorf("mount overlay of %d layers on %s: %w", len(layers), target, err)
	}
	return nil
}

// ErrUnmappable says that a file system cannot be mounted with other owners.
var ErrUnmappable = errors.New("it cannot be mounted with other owners (idmapped)")

// IDMapped makes source, a file or a directory, visible at target, which
// exists: what there belongs to an ID of the user namespace at the path userns
// belongs to the machine's own ID of the same number in source. What is
// mounted below source is left out. An empty target only tries.
func IDMapped(source, target, userns string) error {
	ns, err := os.Open(userns)
	if err != nil {
		return err
	}
	defer ns.Close()
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return &os.PathError{Op: "open_tree", Path: source, Err: err}
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(ns.Fd())}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) {
			err = ErrUnmappable
		}
		return fmt.Errorf("%s: %w", source, err)
	}
	if target == "" {
		return nil
	}
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source, target, err)
	}
	return nil
}

// Bind makes source, a file or a directory, visible at target, which exists.
func Bind(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", source, target, err)
	}
	return nil
}

// Tmpfs mounts an empty file system in memory.
func Tmpfs(target string, bytes int64, mode os.FileMode) error {
	m := mode.Perm()
	perm := uint32(m)
	if mode&os.ModeSticky != 0 {
		perm |= 0o1000
	}
	options := fmt.Sprintf("mode=%o,size=%d", perm, bytes)
	if err := unix.Mount("tmpfs", target, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("mount tmpfs on %s: %w", target, err)
	}
	return nil
}

// Is tells whether something is mounted on path itself.
func Is(path string) bool {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, 0, &stat); err != nil {
		return false
	}
	return stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0
}

// Unmount takes away all that is mounted on path; it is detached if in use.
// Nothing there is no error.
func Unmount(path string) error {
	for {
		err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
		if errors.Is(err, unix.EBUSY) {
			err = unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
		}
		switch {
		case errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT):
			return nil // not a mount, or not any more
		case err != nil:
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
}

// Mounted is one mount of this process's mount namespace.
type Mounted struct {
	Path    string
	Type    string   // of the file system
	Options []string // of this mount: "ro", "nosuid", …
}

// List lists what is mounted, in the order of mounting.
func List() ([]Mounted, error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var list []Mounted
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		own, rest, ok := strings.Cut(lines.Text(), " - ")
		fields := strings.Fields(own)
		if !ok || len(fields) < 6 {
			continue
		}
		kind, _, _ := strings.Cut(rest, " ")
		list = append(list, Mounted{Path: unescape.Replace(fields[4]), Type: kind, Options: strings.Split(fields[5], ",")})
	}
	return list, lines.Err()
}

// Below lists what is mounted on dir or below it, in the order of mounting.
func Below(dir string) ([]string, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	all, err := List()
	var found []string
	for _, m := range all {
		if m.Path == dir || strings.HasPrefix(m.Path, dir+"/") {
			found = append(found, m.Path)
		}
	}
	return found, err
}

var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// UnmountBelow takes away all that is mounted on dir or below it.
func UnmountBelow(dir string) error {
	paths, err := Below(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range slices.Backward(paths) {
		errs = append(errs, Unmount(path))
	}
	return errors.Join(errs...)
}
