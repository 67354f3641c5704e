package volume

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func tempDir(t *testing.T) string {
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := UnmountBelow(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestTmpfs(t *testing.T) {
	dir := filepath.Join(tempDir(t), "a", "b")
	tmpfs := Tmpfs{Size: 1 << 20, Mode: 0o777 | fs.ModeSetgid, GID: 1234}
	must(t, tmpfs.Mount(dir))
	must(t, os.WriteFile(filepath.Join(dir, "kept"), []byte("x"), 0o600))
	must(t, tmpfs.Mount(dir))
	if _, err := os.Stat(filepath.Join(dir, "kept")); err != nil {
		t.Fatalf("mounting twice hid what was there: %v", err)
	}
	var stat unix.Stat_t
	must(t, unix.Stat(dir, &stat))
	if stat.Mode&0o7777 != 0o2777 || stat.Gid != 1234 {
		t.Errorf("mode %o gid %d", stat.Mode&0o7777, stat.Gid)
	}
	var fsStat unix.Statfs_t
	must(t, unix.Statfs(dir, &fsStat))
	if size := int64(fsStat.Blocks) * fsStat.Bsize; size != 1<<20 {
		t.Errorf("size %d", size)
	}
	must(t, UnmountBelow(dir))
	must(t, UnmountBelow(dir))
	if mounted, err := Mounted(dir); err != nil || mounted {
		t.Errorf("still mounted: %v, %v", mounted, err)
	}
}

// What is bound into a pod's directory belongs to somebody else.
func TestRemoveSparesWhatIsMounted(t *testing.T) {
	dir := tempDir(t)
	data, pod := filepath.Join(dir, "data"), filepath.Join(dir, "pod")
	target := filepath.Join(pod, "sub", "x")
	must(t, os.MkdirAll(data, 0o755))
	must(t, os.MkdirAll(target, 0o755))
	precious := filepath.Join(data, "precious")
	must(t, os.WriteFile(precious, nil, 0o600))
	must(t, Bind(data, target))
	must(t, Bind(data, target)) // one over the other
	must(t, Remove(pod))
	if _, err := os.Stat(pod); !os.IsNotExist(err) {
		t.Errorf("still there: %v", err)
	}
	if _, err := os.Stat(precious); err != nil {
		t.Errorf("removed through a mount: %v", err)
	}
	must(t, Remove(pod))
}

func TestMeasure(t *testing.T) {
	dir := tempDir(t)
	must(t, Tmpfs{Mode: 0o755}.Mount(filepath.Join(dir, "memory")))
	empty, err := Measure(dir)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(dir, "memory", "f"), make([]byte, 1<<20), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "f"), make([]byte, 1<<16), 0o600))
	must(t, os.Link(filepath.Join(dir, "f"), filepath.Join(dir, "g")))
	full, err := Measure(dir)
	must(t, err)
	if got := full.Bytes - empty.Bytes; got < 1<<16 || got >= 1<<17 || full.Inodes != empty.Inodes+1 {
		t.Errorf("64 KiB written in one file of two names: %+v after %+v", full, empty)
	}
}
