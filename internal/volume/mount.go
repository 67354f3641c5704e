package volume

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
)

// Tmpfs is a memory file system to be mounted.
type Tmpfs struct {
	Size int64 // bytes; 0: half of the machine's memory, as the kernel has it
	Mode fs.FileMode
	GID  int
}

// Mount mounts the file system at dir, which is made if it is missing. If a
// file system is mounted there already, it is left as it is.
func (t Tmpfs) Mount(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("mount tmpfs: %w", err)
	}
	if mounted, err := Mounted(dir); err != nil || mounted {
		return err
	}
	options := fmt.Sprintf("mode=%o,gid=%d", unixMode(t.Mode), t.GID)
	if t.Size > 0 {
		options += fmt.Sprintf(",size=%d", t.Size)
	}
	// What is in memory on purpose should not be swapped out; kernels before
	// 6.4 do not know the option.
	err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options+",noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, options)
	}
	if err != nil {
		return fmt.Errorf("mount tmpfs at %s: %w", dir, err)
	}
	return nil
}

// Layers mounts the layers of an image, lowest first, at dir, which is made if
// it is missing: to be read only. If something is mounted there already, it is
// left as it is.
func Layers(dir string, layers []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("mount layers: %w", err)
	}
	if mounted, err := Mounted(dir); err != nil || mounted {
		return err
	}
	return mount.OverlayReadOnly(dir, layers)
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	if m&fs.ModeSetgid != 0 {
		mode |= unix.S_ISGID
	}
	if m&fs.ModeSticky != 0 {
		mode |= unix.S_ISVTX
	}
	return mode
}

// Mounted reports whether a file system of its own is mounted at dir. It does
// not see a bind mount from the same file system.
func Mounted(dir string) (bool, error) {
	here, err := device(dir)
	if err != nil {
		return false, err
	}
	above, err := device(filepath.Dir(dir))
	return here != above, err
}

func device(path string) (uint64, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Dev, nil
}

// Bind mounts source, a file or directory, at target, which exists.
func Bind(source, target string) error {
	if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s at %s: %w", source, target, err)
	}
	return nil
}

// UnmountBelow unmounts everything at and below dir. It can be repeated, and
// dir need not exist.
func UnmountBelow(dir string) error {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("unmount below %s: %w", dir, err)
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	// A mount can lie over another: look again until nothing is left.
	for range 10 {
		mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
			return m.Mountpoint != dir && !strings.HasPrefix(m.Mountpoint, dir+"/"), false
		})
		if err != nil {
			return fmt.Errorf("unmount below %s: %w", dir, err)
		}
		if len(mounts) == 0 {
			return nil
		}
		for _, m := range slices.Backward(mounts) {
			err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("unmount %s: %w", m.Mountpoint, err)
			}
		}
	}
	return fmt.Errorf("unmount below %s: mounts keep appearing", dir)
}

// Remove deletes dir and all it holds. What is mounted below is unmounted
// first and its contents stay. A missing dir is no error.
func Remove(dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := UnmountBelow(dir); err != nil {
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove %s: %w", dir, err)
	}
	return nil
}

// Used is what files occupy on their file system.
type Used struct{ Bytes, Inodes int64 }

// Add counts other in.
func (u *Used) Add(other Used) { u.Bytes, u.Inodes = u.Bytes+other.Bytes, u.Inodes+other.Inodes }

// Measure returns what dir and the files below it occupy on their file
// system; other file systems mounted below are not counted. Files that vanish
// meanwhile, or lie too deep to be looked at, do not count.
func Measure(dir string) (used Used, err error) {
	top, err := device(dir)
	if err != nil {
		return Used{}, fmt.Errorf("size of %s: %w", dir, err)
	}
	seen := map[uint64]bool{} // files with several names, by inode
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return nil
		}
		stat := info.Sys().(*syscall.Stat_t)
		if stat.Dev != top {
			if entry.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if stat.Nlink > 1 && !entry.IsDir() {
			if seen[stat.Ino] {
				return nil
			}
			seen[stat.Ino] = true
		}
		used.Add(Used{Bytes: stat.Blocks * 512, Inodes: 1})
		return nil
	})
	if err != nil {
		return Used{}, fmt.Errorf("size of %s: %w", dir, err)
	}
	return used, nil
}
