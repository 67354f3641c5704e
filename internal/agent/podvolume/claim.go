package podvolume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/component-helpers/storage/ephemeral"
	k8svolume "k8s.io/kubernetes/pkg/volume"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/agent/volumeplugin"
)

// makeClaim finds the directory behind a claim. inline is the volume that the
// claim was made from, if the pod owns it.
func (m *Manager) makeClaim(ctx context.Context, pod *v1.Pod, name, claim string, readOnly bool, inline *v1.Volume) (made, error) {
	pvc, err := retryForbidden(ctx, func() (*v1.PersistentVolumeClaim, error) {
		return m.cfg.Client.CoreV1().PersistentVolumeClaims(pod.Namespace).Get(ctx, claim, metav1.GetOptions{})
	})
	if err != nil {
		return made{}, err
	}
	if inline != nil {
		if err := ephemeral.VolumeIsForPod(pod, pvc); err != nil {
			return made{}, err
		}
	}
	if pvc.Status.Phase != v1.ClaimBound || pvc.Spec.VolumeName == "" {
		return made{}, fmt.Errorf("PersistentVolumeClaim %q is not bound yet", claim)
	}
	pv, err := retryForbidden(ctx, func() (*v1.PersistentVolume, error) {
		return m.cfg.Client.CoreV1().PersistentVolumes().Get(ctx, pvc.Spec.VolumeName, metav1.GetOptions{})
	})
	if err != nil {
		return made{}, err
	}
	if ref := pv.Spec.ClaimRef; ref == nil || ref.UID != pvc.UID {
		return made{}, fmt.Errorf("PersistentVolume %q is not bound to PersistentVolumeClaim %q", pv.Name, claim)
	}
	if m.cfg.Plugins != nil && volumeplugin.Makes(k8svolume.NewSpecFromPersistentVolume(pv, readOnly)) {
		return m.makeByPlugin(ctx, pod, name)
	}
	done := made{readOnly: readOnly, block: ptr.Deref(pv.Spec.VolumeMode, v1.PersistentVolumeFilesystem) == v1.PersistentVolumeBlock}
	switch source := pv.Spec.PersistentVolumeSource; {
	case source.HostPath != nil && done.block:
		return made{}, fmt.Errorf("PersistentVolume %q: a hostPath is no block device; make it a local volume, or use volumeMode Filesystem", pv.Name)
	case source.HostPath != nil:
		by, err := m.makeHostPath(source.HostPath)
		done.path = by.path
		return done, err
	case source.Local != nil:
		done.path = source.Local.Path
	default:
		return made{}, fmt.Errorf("PersistentVolume %q: volume type %s is not supported by tutti; use local, hostPath or csi", pv.Name, sourceName(source))
	}
	info, err := os.Stat(done.path)
	if err != nil {
		return made{}, fmt.Errorf("PersistentVolume %q: %w", pv.Name, err)
	}
	if done.block {
		if info.Mode().Type() != fs.ModeDevice {
			return made{}, fmt.Errorf("PersistentVolume %q: %s is not a block device; name one, or use volumeMode Filesystem", pv.Name, done.path)
		}
		return done, nil
	}
	if !info.IsDir() {
		return made{}, fmt.Errorf("PersistentVolume %q: %s is not a directory", pv.Name, done.path)
	}
	// The link shows where the data is, and that the pod's group owns it
	// already: the tree may be large, and a restarted agent asks again.
	link := m.layout.Volume(string(pod.UID), "persistentVolumeClaim", name)
	if target, err := os.Readlink(link); err == nil && target == done.path {
		return done, nil
	}
	if err := owned(pod, done.path, false); err != nil {
		return made{}, fmt.Errorf("PersistentVolume %q: set owner: %w", pv.Name, err)
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return made{}, err
	}
	if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return made{}, err
	}
	return done, os.Symlink(done.path, link)
}
