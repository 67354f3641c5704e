package podvolume

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/cri-client/pkg/logs"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	volumevalidation "k8s.io/kubernetes/pkg/volume/validation"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"
	"k8s.io/mount-utils"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/volume"
)

// Mounts returns what one run of a container of a prepared pod gets mounted:
// its volumes, the files below /etc unless it mounts something there itself,
// and the file for its termination message. env is the container's
// environment (for subPathExpr). The text of an error is meant for the pod's
// owner.
func (m *Manager) Mounts(pod *v1.Pod, c *v1.Container, attempt int, env, podIPs []string) ([]runtime.Mount, error) {
	var mounts []runtime.Mount
	for i := range c.VolumeMounts {
		mount, err := m.mount(pod, c, i, env)
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, mount)
	}
	add := func(target, source string, readOnly bool) {
		if !slices.ContainsFunc(mounts, func(have runtime.Mount) bool { return path.Clean(have.Target) == target }) {
			mounts = append(mounts, runtime.Mount{Source: source, Target: target, ReadOnly: readOnly})
		}
	}
	etc, err := m.etc(pod, podIPs)
	if err != nil {
		return nil, err
	}
	readOnlyRoot := c.SecurityContext != nil && ptr.Deref(c.SecurityContext.ReadOnlyRootFilesystem, false)
	for _, name := range etc {
		// A kubelet leaves the hosts file writable even then.
		add("/etc/"+name, m.layout.Etc(string(pod.UID), name), readOnlyRoot && name != "hosts")
	}
	last, err := m.terminationFile(pod, c, attempt)
	if err != nil {
		return nil, err
	}
	add(path.Clean(terminationPath(c)), last, false)

	// What is mounted below another mount comes after it.
	slices.SortStableFunc(mounts, func(a, b runtime.Mount) int {
		return strings.Count(path.Clean(a.Target), "/") - strings.Count(path.Clean(b.Target), "/")
	})
	return mounts, nil
}

// Devices returns the block devices that a container of a prepared pod gets.
// The text of an error is meant for the pod's owner.
func (m *Manager) Devices(pod *v1.Pod, c *v1.Container) ([]runtime.Device, error) {
	var devices []runtime.Device
	for _, d := range c.VolumeDevices {
		v, err := m.madeVolume(pod.UID, d.Name)
		if err != nil {
			return nil, err
		}
		if !v.block {
			return nil, fmt.Errorf("volume %q has volumeMode Filesystem, but is specified in volumeDevices; use volumeMounts", d.Name)
		}
		devices = append(devices, runtime.Device{Source: v.path, Target: path.Join("/", d.DevicePath), ReadOnly: v.readOnly})
	}
	return devices, nil
}

func terminationPath(c *v1.Container) string {
	if c.TerminationMessagePath == "" {
		return v1.TerminationMessagePathDefault
	}
	return path.Join("/", c.TerminationMessagePath)
}

func (m *Manager) terminationFile(pod *v1.Pod, c *v1.Container, attempt int) (string, error) {
	file := m.layout.Termination(string(pod.UID), c.Name, attempt)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return "", fmt.Errorf("make the termination message file: %w", err)
	}
	if err := os.WriteFile(file, nil, 0o666); err != nil {
		return "", fmt.Errorf("make the termination message file: %w", err)
	}
	// The container's user must be able to write, whatever the umask.
	return file, os.Chmod(file, 0o666)
}

// etc writes the files that every container of the pod gets and returns their
// names.
func (m *Manager) etc(pod *v1.Pod, podIPs []string) ([]string, error) {
	hostname, err := m.Hostname(pod)
	if err != nil {
		return nil, err
	}
	if err := m.writeEtc(pod, "hostname", hostname+"\n"); err != nil {
		return nil, err
	}
	names := []string{"hostname", "resolv.conf"}
	if len(podIPs) > 0 || pod.Spec.HostNetwork {
		content, err := m.hostsContent(pod, podIPs)
		if err != nil {
			return nil, err
		}
		if err := m.writeEtc(pod, "hosts", content); err != nil {
			return nil, err
		}
		names = append(names, "hosts")
	}
	return names, nil
}

func (m *Manager) mount(pod *v1.Pod, c *v1.Container, index int, env []string) (runtime.Mount, error) {
	vm := &c.VolumeMounts[index]
	v, err := m.madeVolume(pod.UID, vm.Name)
	if err != nil {
		return runtime.Mount{}, err
	}
	if v.block {
		return runtime.Mount{}, fmt.Errorf("volume %q has volumeMode Block, but is specified in volumeMounts; use volumeDevices", vm.Name)
	}
	result := runtime.Mount{Source: v.path, Target: path.Join("/", vm.MountPath), ReadOnly: vm.ReadOnly || v.readOnly}
	switch mode := ptr.Deref(vm.MountPropagation, v1.MountPropagationNone); mode {
	case v1.MountPropagationNone:
		result.Propagation = "private"
	case v1.MountPropagationHostToContainer:
		result.Propagation = "rslave"
	case v1.MountPropagationBidirectional:
		result.Propagation = "rshared"
	default:
		return runtime.Mount{}, fmt.Errorf("volume %q: invalid mount propagation %q", vm.Name, mode)
	}
	if mode := ptr.Deref(vm.RecursiveReadOnly, v1.RecursiveReadOnlyDisabled); mode != v1.RecursiveReadOnlyDisabled {
		if !vm.ReadOnly || result.Propagation != "private" {
			return runtime.Mount{}, fmt.Errorf("volume %q requested recursive read-only mode, but it is not read-only or it is propagated", vm.Name)
		}
		result.RecursiveReadOnly = true
	}
	sub := vm.SubPath
	if vm.SubPathExpr != "" {
		if sub, err = expandSubPath(vm.SubPathExpr, env); err != nil {
			return runtime.Mount{}, fmt.Errorf("volume %q: subPathExpr: %w", vm.Name, err)
		}
	}
	if sub != "" {
		result.Source, err = m.subPath(pod, c, index, v.path, sub)
	}
	return result, err
}

func expandSubPath(expr string, env []string) (string, error) {
	values := map[string]string{}
	for _, v := range env {
		name, value, _ := strings.Cut(v, "=")
		values[name] = value
	}
	var missing []string
	sub := expansion.Expand(expr, func(name string) string {
		if values[name] == "" {
			missing = append(missing, name)
		}
		return values[name]
	})
	if len(missing) > 0 {
		slices.Sort(missing)
		return "", fmt.Errorf("missing value for %s", strings.Join(slices.Compact(missing), ", "))
	}
	return sub, nil
}

// subPath binds a part of a volume to a place that the volume's user cannot
// redirect. Errors tell nothing of the machine's file system.
func (m *Manager) subPath(pod *v1.Pod, c *v1.Container, index int, dir, sub string) (string, error) {
	name := c.VolumeMounts[index].Name
	if filepath.IsAbs(sub) {
		return "", fmt.Errorf("volume %q: subPath %q must not be an absolute path", name, sub)
	}
	if err := volumevalidation.ValidatePathNoBacksteps(sub); err != nil {
		return "", fmt.Errorf("volume %q: subPath %q: %w", name, sub, err)
	}
	full := filepath.Join(dir, sub)
	subpather := subpath.New(newMounter())
	if _, err := os.Stat(full); errors.Is(err, fs.ErrNotExist) {
		// Made now, or else the runtime would, with other rights.
		info, err := os.Stat(dir)
		if err == nil {
			err = subpather.SafeMakeDir(sub, dir, info.Mode().Perm()|info.Mode()&(fs.ModeSetgid|fs.ModeSticky))
		}
		if err != nil {
			m.cfg.Log.Error("cannot make a subPath", "pod", pod.UID, "container", c.Name, "volume", name, "error", err)
			return "", fmt.Errorf("failed to create subPath directory for volumeMount %q of container %q", name, c.Name)
		}
	}
	target, _, err := subpather.PrepareSafeSubpath(subpath.Subpath{
		VolumeMountIndex: index,
		Path:             full,
		VolumeName:       name,
		VolumePath:       dir,
		PodDir:           m.layout.Pod(string(pod.UID)),
		ContainerName:    c.Name,
	})
	if err != nil {
		m.cfg.Log.Error("cannot bind a subPath", "pod", pod.UID, "container", c.Name, "volume", name, "error", err)
		return "", fmt.Errorf("failed to prepare subPath for volumeMount %q of container %q", name, c.Name)
	}
	return target, nil
}

// mounter makes bind mounts by system call where the borrowed code would run
// mount(8).
type mounter struct{ mount.Interface }

func newMounter() mounter { return mounter{mount.New("")} }

func (mounter) MountSensitiveWithoutSystemdWithMountFlags(source, target, _ string, options, _, _ []string) error {
	if !slices.Equal(options, []string{"bind"}) {
		return fmt.Errorf("mount %s: options %q are not those of a bind mount", target, options)
	}
	return volume.Bind(source, target)
}

func (mounter) Unmount(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

const (
	maxMessage         = 4096
	maxMessageFromLog  = 2048
	maxMessageLogLines = 80
)

// TerminationMessage returns the last words of a run that has ended: what it
// wrote to its file, or, if that is nothing, the container's policy wants it
// and the run failed, the end of its log.
func (m *Manager) TerminationMessage(ctx context.Context, pod *v1.Pod, c *v1.Container, attempt int, log string, failed bool) (string, error) {
	file, err := os.Open(m.layout.Termination(string(pod.UID), c.Name, attempt))
	var message []byte
	if err == nil {
		defer file.Close()
		message, err = io.ReadAll(io.LimitReader(file, maxMessage))
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("read the termination message of container %s: %w", c.Name, err)
	}
	if len(message) > 0 || !failed || c.TerminationMessagePolicy != v1.TerminationMessageFallbackToLogsOnError {
		return strings.ToValidUTF8(string(message), "?"), nil
	}
	var end bytes.Buffer
	err = logs.ReadLogs(ctx, log, "", &logs.LogOptions{TailLines: ptr.To[int64](maxMessageLogLines)}, nil, &end, &end)
	if err != nil {
		return "", fmt.Errorf("read the log of container %s for its termination message: %w", c.Name, err)
	}
	text := end.Bytes()
	return strings.ToValidUTF8(string(text[max(0, len(text)-maxMessageFromLog):]), "?"), nil
}
