package pressure

import (
	"context"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/kubernetes/pkg/kubelet/events"
)

const (
	// Unused images are collected when the disk is fuller than high percent,
	// until it is no fuller than low: a kubelet's defaults.
	high, low       = 85, 80
	collectInterval = time.Minute
)

// over is how many bytes more than so many percent of a disk are in use. What
// only root may still fill counts as used.
func over(disk *stats.FsStats, percent int64) int64 {
	capacity := int64(*disk.CapacityBytes)
	return capacity - int64(*disk.AvailableBytes) - capacity/100*percent
}

// collect removes unused images whenever the disk gets full, until ctx ends.
func (m *Manager) collect(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(collectInterval):
		}
		if err := m.collectOnce(ctx); err != nil && ctx.Err() == nil {
			m.Log.Warn("cannot make room by removing images", "err", err)
		}
	}
}

func (m *Manager) collectOnce(ctx context.Context) error {
	node, err := m.Usage.Node()
	if err != nil {
		return fmt.Errorf("measure the disk: %w", err)
	}
	if over(node.Fs, high) <= 0 {
		return nil
	}
	need := over(node.Fs, low)
	freed, err := m.Images.Reclaim(ctx, func(freed int64) bool {
		// What images had compressed is known; that they had more on disk,
		// the disk may tell at once, or (btrfs) later.
		node, err := m.Usage.Node()
		return freed >= need || err == nil && over(node.Fs, low) <= 0
	})
	if err != nil {
		return fmt.Errorf("remove unused images: %w", err)
	}
	m.Log.Info("removed unused images to make room", "bytes", freed, "wanted", need)
	if freed == 0 {
		m.Recorder.Event(m.node, v1.EventTypeWarning, events.FreeDiskSpaceFailed, fmt.Sprintf(
			"Failed to garbage collect required amount of images. Attempted to free %d bytes, but only found 0 bytes eligible to free.", need))
	}
	return nil
}

// DeleteUnusedImages implements the manager's ImageGC: all that can be pulled
// again must go before a pod does.
func (m *Manager) DeleteUnusedImages(ctx context.Context) error {
	freed, err := m.Images.Reclaim(ctx, func(int64) bool { return false })
	if freed > 0 {
		m.Log.Info("removed all unused images to make room", "bytes", freed)
	}
	return err
}

// DeleteAllUnusedContainers implements the manager's ContainerGC.
func (m *Manager) DeleteAllUnusedContainers(ctx context.Context) error { return m.Pods.RemoveDead(ctx) }
