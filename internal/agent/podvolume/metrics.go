package podvolume

import (
	"context"

	v1 "k8s.io/api/core/v1"
	k8svolume "k8s.io/kubernetes/pkg/volume"
)

// Metrics tells how large a prepared volume is and what of it is used: of a
// claim, and of an emptyDir in memory. As with a kubelet, a claim that is a
// directory of this machine tells of the whole file system that it is on. Of
// others k8svolume.IsNotSupported is true of the error.
func (m *Manager) Metrics(ctx context.Context, p *v1.Pod, v *v1.Volume) (*k8svolume.Metrics, error) {
	inMemory := v.EmptyDir != nil && v.EmptyDir.Medium == v1.StorageMediumMemory
	if !inMemory && v.PersistentVolumeClaim == nil && v.Ephemeral == nil {
		return nil, k8svolume.NewNotSupportedError()
	}
	made, err := m.madeVolume(p.UID, v.Name)
	switch {
	case err != nil:
		return nil, err
	case made.plugin:
		return m.cfg.Plugins.Metrics(ctx, p.UID, v.Name)
	case made.block:
		return k8svolume.NewMetricsBlock(made.path).GetMetrics()
	}
	return k8svolume.NewMetricsStatFS(made.path).GetMetrics()
}
