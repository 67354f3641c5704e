package podvolume

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes/fake"

	"tutti.dev/tutti/internal/volume"
)

func fuzzManager(f *testing.F) *Manager {
	dir := f.TempDir()
	m := NewManager(Config{Dir: dir, Client: fake.NewClientset(), NodeName: "n1"})
	f.Cleanup(func() {
		m.Close()
		if err := volume.UnmountBelow(dir); err != nil {
			f.Error(err)
		}
	})
	return m
}

// FuzzSubPath binds a part of a volume in which its user has laid a link.
// What is bound must be in the volume.
func FuzzSubPath(f *testing.F) {
	for _, link := range []string{"/", "/etc", "..", "../../..", ".", "dir", "dir/../../..", "//etc//"} {
		for _, sub := range []string{"link", "link/etc", "link/passwd", "dir/link", "dir", "new/deep", "..", "/etc", "link/..", "dir//file", "./link", "file/x"} {
			f.Add("link", link, sub)
		}
		f.Add("dir/link", link, "dir/link/etc")
	}
	m := fuzzManager(f)
	pod := testPod()
	c := &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{{Name: "v", MountPath: "/x"}}}
	vol := filepath.Join(f.TempDir(), "v")
	f.Fuzz(func(t *testing.T, name, link, sub string) {
		if err := os.RemoveAll(vol); err != nil {
			t.Fatal(err)
		}
		must(t, os.MkdirAll(filepath.Join(vol, "dir"), 0o755))
		must(t, os.WriteFile(filepath.Join(vol, "dir", "file"), nil, 0o644))
		if !filepath.IsLocal(name) || os.Symlink(link, filepath.Join(vol, name)) != nil {
			t.Skip("no such link")
		}
		bound, err := m.subPath(pod, c, 0, vol, sub)
		if err != nil {
			return
		}
		defer func() {
			if err := unix.Unmount(bound, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				t.Errorf("unmount: %v", err)
			}
		}()
		var got unix.Stat_t
		must(t, unix.Stat(bound, &got))
		inside := false
		must(t, filepath.WalkDir(vol, func(path string, _ fs.DirEntry, err error) error {
			var is unix.Stat_t
			if err == nil {
				err = unix.Lstat(path, &is)
			}
			inside = inside || is.Dev == got.Dev && is.Ino == got.Ino
			return err
		}))
		if !inside {
			t.Errorf("link %q to %q, subPath %q: bound what is not in the volume", name, link, sub)
		}
	})
}

// FuzzTerminationMessage reads a log as it may be after a crash, for the last
// words of a container.
func FuzzTerminationMessage(f *testing.F) {
	f.Add([]byte("2026-01-01T00:00:00.000000001Z stderr F last words\n"))
	f.Add([]byte("2026-01-01T00:00:00.000000001Z stdout P half a line\n2026-01-01T00:00:00Z stdout F \xff\n"))
	f.Add([]byte("2026-01-01T00:00:00Z stdout"))
	f.Add([]byte("\n\n"))
	m := fuzzManager(f)
	pod := testPod()
	c := &v1.Container{Name: "c", TerminationMessagePolicy: v1.TerminationMessageFallbackToLogsOnError}
	log := filepath.Join(f.TempDir(), "0.log")
	f.Fuzz(func(t *testing.T, b []byte) {
		must(t, os.WriteFile(log, b, 0o600))
		message, err := m.TerminationMessage(t.Context(), pod, c, 0, log, true)
		if err == nil && (len(message) > maxMessageFromLog || !utf8.ValidString(message)) {
			t.Errorf("message of %d bytes: %q", len(message), message)
		}
	})
}
