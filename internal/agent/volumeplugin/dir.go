package volumeplugin

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
)

// KubeletDir is where drivers that are made for a kubelet look for it: their
// manifests mount what is below it and tell the driver the same paths.
const KubeletDir = "/var/lib/kubelet"

// ownDir is where what drivers keep really is.
func ownDir(dataDir string) string { return filepath.Join(dataDir, "kubelet") }

func below(path, dir string) bool {
	path = filepath.Clean(path)
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// makeDir makes the directory own and, unless something else is there, link
// as its other name. It returns by which name drivers are to know it. It can
// be repeated.
func makeDir(own, link string) (name string, err error) {
	for _, sub := range []string{"plugins", "plugins_registry", "pods"} {
		if err := os.MkdirAll(filepath.Join(own, sub), 0o750); err != nil {
			return "", fmt.Errorf("make the directory of volume plugins: %w", err)
		}
	}
	// What a driver mounts in its container must be seen here, whatever the
	// machine does with the mounts around it: a peer group of its own.
	if !mount.Is(own) {
		if err := mount.Bind(own, own); err != nil {
			return "", err
		}
		for _, kind := range []uintptr{unix.MS_PRIVATE, unix.MS_SHARED} {
			if err := unix.Mount("", own, "", kind, ""); err != nil {
				return "", errors.Join(fmt.Errorf("share the mounts of %s: %w", own, err), mount.Unmount(own))
			}
		}
	}
	err = os.Symlink(own, link)
	if err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EROFS) {
		return "", fmt.Errorf("make %s: %w", link, err)
	}
	if leads(link, own) {
		return link, nil
	}
	return own, nil
}

func leads(link, to string) bool {
	target, err := os.Readlink(link)
	return err == nil && target == to
}

// RemoveLink takes KubeletDir away if it is the name of what is in dataDir.
func RemoveLink(dataDir string) error {
	if !leads(KubeletDir, ownDir(dataDir)) {
		return nil
	}
	return os.Remove(KubeletDir)
}

// removeEmpty removes a directory of directories that hold nothing. What is
// mounted or has files stays.
func removeEmpty(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil || mount.Is(dir) {
		return
	}
	for _, e := range entries {
		if e.IsDir() {
			removeEmpty(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(dir)
}
