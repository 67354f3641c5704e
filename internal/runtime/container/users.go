package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/host/namespace"
	"tutti.dev/tutti/internal/runtime"
)

// openRoots is where the roots of pods with a user namespace are mounted: as
// other users than root, they can reach nothing in the data directory.
func openRoots(cgroupRoot string) string { return filepath.Join("/run", cgroupRoot) }

// mappedDir is where, in an attempt's directory, layers are mounted meanwhile.
const mappedDir = "layers"

var _ runtime.UserNamespaces = (*Runtime)(nil)

// owned are the namespaces in which a pod with a user namespace has a say.
var owned = []namespace.Kind{namespace.IPC, namespace.UTS, namespace.Net}

// errNoUsers: runtimes differ in whether they join a user namespace that is
// there already, and mount with other owners.
var errNoUsers = errors.New("the pod's RuntimeClass has no user namespaces; use the class container, or leave hostUsers out")

// OpenNamespaces implements runtime.UserNamespaces.
func (r *Runtime) OpenNamespaces(_ context.Context, pod runtime.Pod) (netns string, err error) {
	if pod.ID == "" || strings.ContainsAny(pod.ID, "/_") || pod.IDs.Size == 0 || pod.IDs.First < pod.IDs.Size {
		return "", fmt.Errorf("%w: pod %q with IDs %+v", runtime.ErrInvalid, pod.ID, pod.IDs)
	}
	defer r.locks.lock(pod.ID)()
	dir := filepath.Join(r.podDir(pod.ID), "ns")
	netns = filepath.Join(dir, string(namespace.Net))
	if mount.Is(filepath.Join(dir, string(namespace.User))) {
		return netns, nil
	}
	err = os.MkdirAll(dir, 0o711)
	if err == nil {
		err = namespace.MakeOwned(dir, pod.IDs.First, pod.IDs.Size, owned)
	}
	if err != nil {
		return "", fmt.Errorf("open pod %s: %w", pod.ID, err)
	}
	return netns, nil
}

// setUpNamespaces brings those that OpenNamespaces made to what the pod asks
// for.
func (r *Runtime) setUpNamespaces(pod runtime.Pod, dir string) error {
	if pod.NetNS == "" || pod.HostIPC || pod.HostPID || !mount.Is(filepath.Join(dir, string(namespace.User))) {
		return fmt.Errorf("%w: a pod with a user namespace needs its other namespaces, made with it", runtime.ErrInvalid)
	}
	join := map[namespace.Kind]string{}
	for _, kind := range owned {
		join[kind] = filepath.Join(dir, string(kind))
	}
	return namespace.Make(dir, nil, join, func() error { return r.configureNamespaces(pod) })
}

// userNS is the path of the pod's user namespace, "" for the machine's.
func (r *Runtime) userNS(pod runtime.Pod) string {
	if pod.IDs.Size == 0 {
		return ""
	}
	return filepath.Join(r.podDir(pod.ID), "ns", string(namespace.User))
}

// CanMapIDs implements runtime.UserNamespaces.
func (r *Runtime) CanMapIDs() error { return r.canMapIDs() }

// probeIDs makes a user namespace and mounts with other owners from what holds
// image layers and volumes, on disk and in memory.
func (r *Runtime) probeIDs() error {
	dir, err := os.MkdirTemp(r.Dir, "user-namespace-")
	if err != nil {
		return err
	}
	defer func() {
		if err := errors.Join(mount.UnmountBelow(dir), os.RemoveAll(dir)); err != nil {
			r.Log.Warn("something is left of the look for user namespaces", "err", err)
		}
	}()
	const first, size = 1 << 16, 1 << 16
	if err := namespace.MakeOwned(dir, first, size, nil); err != nil {
		return noUserNamespaces(err)
	}
	memory := filepath.Join(dir, "memory")
	if err := os.Mkdir(memory, 0o700); err != nil {
		return err
	}
	if err := mount.Tmpfs(memory, 1<<16, 0o700); err != nil {
		return err
	}
	for _, source := range []string{dir, memory} {
		var fs unix.Statfs_t
		if err := unix.Statfs(source, &fs); err != nil {
			return err
		}
		if err := mount.IDMapped(source, "", filepath.Join(dir, string(namespace.User))); err != nil {
			return noMapping(filepath.Dir(source), int64(fs.Type))
		}
	}
	return nil
}

func noUserNamespaces(err error) error {
	return fmt.Errorf("this machine's kernel gives no user namespaces (%w); raise user.max_user_namespaces, or leave hostUsers out", err)
}

func noMapping(dir string, fileSystem int64) error {
	return fmt.Errorf("this machine cannot mount %s with other owners (file system type %#x; Linux 6.3 can for tmpfs, ext4, xfs and btrfs); use another machine, or leave hostUsers out", dir, fileSystem)
}

// rootDir is where the root of a workload or of the pod's init is mounted.
func (r *Runtime) rootDir(pod runtime.Pod, id runtime.ID) string {
	if pod.IDs.Size > 0 {
		return filepath.Join(r.openDir(id), "root")
	}
	return filepath.Join(r.attemptDir(id), "root")
}

func (r *Runtime) openDir(id runtime.ID) string {
	return filepath.Join(openRoots(r.CgroupRoot), id.String())
}

// makeOpenRoot makes the directory of a root such that the pod's users alone
// get there, and below.
func (r *Runtime) makeOpenRoot(pod runtime.Pod, id runtime.ID) error {
	if err := os.MkdirAll(openRoots(r.CgroupRoot), 0o711); err != nil {
		return err
	}
	dir := r.openDir(id)
	if err := os.MkdirAll(filepath.Join(dir, "root"), 0o755); err != nil {
		return err
	}
	return errors.Join(os.Chown(dir, 0, int(pod.IDs.First)), os.Chmod(dir, 0o710))
}

// mapLayers shows the layers with the pod's owners at directories of dir. They
// are needed only until the overlay is mounted.
func (r *Runtime) mapLayers(pod runtime.Pod, layers []string, dir string) (mapped []string, done func() error, err error) {
	done = func() error { return removeMapped(dir) }
	for i, layer := range layers {
		target := filepath.Join(dir, fmt.Sprint(i))
		if err := os.MkdirAll(target, 0o755); err != nil {
			return nil, done, err
		}
		if err := mount.IDMapped(layer, target, r.userNS(pod)); err != nil {
			return nil, done, fmt.Errorf("layer of the image: %w", err)
		}
		mapped = append(mapped, target)
	}
	return mapped, done, nil
}

func removeMapped(dir string) error {
	layers, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, l := range layers {
		path := filepath.Join(dir, l.Name())
		// What is still mounted would be emptied, were it removed with all
		// that is below.
		errs = append(errs, mount.Unmount(path), os.Remove(path))
	}
	return errors.Join(append(errs, os.Remove(dir))...)
}

// removeOpenRoot takes away the root of the workload with an identifier.
func (r *Runtime) removeOpenRoot(id string) error {
	dir := filepath.Join(openRoots(r.CgroupRoot), id)
	if err := mount.Unmount(filepath.Join(dir, "root")); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// removeOpenRoots takes away the roots of all workloads of a pod.
func (r *Runtime) removeOpenRoots(pod string) error {
	dirs, err := os.ReadDir(openRoots(r.CgroupRoot))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	errs := []error{err}
	for _, d := range dirs {
		if strings.HasPrefix(d.Name(), pod+"_") {
			errs = append(errs, r.removeOpenRoot(d.Name()))
		}
	}
	return errors.Join(errs...)
}
