package namespace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
)

func TestMake(t *testing.T) {
	self := func() string {
		link, err := os.Readlink("/proc/self/ns/uts")
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	before := self()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	// Often enough for the main thread to be among those that are asked.
	for range 200 {
		dir := t.TempDir()
		inside := ""
		if err := Make(dir, []Kind{IPC, UTS}, nil, func() (err error) {
			if err := unix.Sethostname([]byte("inside")); err != nil {
				return err
			}
			inside, err = os.Readlink("/proc/thread-self/ns/uts")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if inside == before || self() != before {
			t.Fatalf("namespace inside %s, before %s, now %s", inside, before, self())
		}
		for _, kind := range []Kind{IPC, UTS} {
			path := filepath.Join(dir, string(kind))
			if !mount.Is(path) {
				t.Errorf("%s is not pinned", kind)
			}
			for range 2 {
				if err := Unpin(path); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if now, err := os.Hostname(); err != nil || now != name {
		t.Errorf("the machine's name became %q: %v", now, err)
	}
}

func TestMakeOwned(t *testing.T) {
	dir := t.TempDir()
	path := func(kind Kind) string { return filepath.Join(dir, string(kind)) }
	defer func() {
		for _, kind := range []Kind{Net, IPC, User} {
			if err := Unpin(path(kind)); err != nil {
				t.Error(err)
			}
		}
	}()
	const first = 5 << 16
	for range 2 {
		if err := MakeOwned(dir, first, 1<<16, []Kind{Net, IPC}); err != nil {
			t.Fatal(err)
		}
	}
	user := inode(t, path(User))
	for _, kind := range []Kind{Net, IPC} {
		f, err := os.Open(path(kind))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		owner, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_USERNS)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(owner)
		if got := inode(t, fmt.Sprintf("/proc/self/fd/%d", owner)); got != user {
			t.Errorf("the %s namespace belongs to user namespace %d, want %d", kind, got, user)
		}
	}

	// What belongs to 7 in a directory belongs to first+7 where it is mapped,
	// and what first+7 makes there belongs to 7.
	source, target := filepath.Join(dir, "source"), filepath.Join(dir, "target")
	for _, d := range []string{source, target} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(source, 7, 8); err != nil {
		t.Fatal(err)
	}
	err := mount.IDMapped(source, target, path(User))
	if fs := new(unix.Statfs_t); errors.Is(err, mount.ErrUnmappable) && unix.Statfs(source, fs) == nil && fs.Type == unix.TMPFS_MAGIC {
		t.Skip(err) // before Linux 6.3
	}
	if err != nil {
		t.Fatal(err)
	}
	defer mount.Unmount(target)
	var stat unix.Stat_t
	if err := unix.Stat(target, &stat); err != nil || stat.Uid != first+7 || stat.Gid != first+8 {
		t.Errorf("owner %d:%d, want %d:%d: %v", stat.Uid, stat.Gid, first+7, first+8, err)
	}
	if err := os.Chown(target, first+9, first+10); err != nil {
		t.Fatal(err)
	}
	if err := unix.Stat(source, &stat); err != nil || stat.Uid != 9 || stat.Gid != 10 {
		t.Errorf("owner %d:%d, want 9:10: %v", stat.Uid, stat.Gid, err)
	}
	// proc is one that cannot.
	if err := mount.IDMapped("/proc", "", path(User)); !errors.Is(err, mount.ErrUnmappable) {
		t.Errorf("/proc: %v", err)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatal(err)
	}
	return stat.Ino
}
