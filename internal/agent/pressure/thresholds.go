package pressure

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/resource"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/kubernetes/pkg/kubelet/eviction"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

// Default is what is kept free of a machine that was told nothing: a kubelet's
// defaults, and process ids besides. A kubelet also wants 15 % of the image
// file system free. Here images are on the same disk as everything else, where
// unused ones are collected from just there on: pods need not pay for it.
const Default = "memory.available<100Mi,nodefs.available<10%,nodefs.inodesFree<5%,pid.available<10%"

// None as thresholds means that no pod is evicted for the machine's sake.
// Limits of pods hold all the same.
const None = "none"

// signals are what thresholds can be about. That of the images' file system
// is the data directory's, as is nodefs.
var signals = []evictionapi.Signal{
	evictionapi.SignalMemoryAvailable,
	evictionapi.SignalNodeFsAvailable, evictionapi.SignalNodeFsInodesFree,
	evictionapi.SignalImageFsAvailable, evictionapi.SignalImageFsInodesFree,
	evictionapi.SignalPIDAvailable,
}

// Parse reads thresholds as a kubelet's --eviction-hard has them:
// SIGNAL<QUANTITY, separated by commas, a quantity being an amount or a
// percentage. "" is Default. One that is named replaces the default of its
// signal; the others stay.
func Parse(text string) ([]evictionapi.Threshold, error) {
	if text == None {
		return nil, nil
	}
	want := map[string]string{}
	for _, list := range []string{Default, text} {
		for _, item := range strings.Split(list, ",") {
			if item == "" {
				continue
			}
			signal, value, ok := strings.Cut(item, "<")
			if !ok || !slices.Contains(signals, evictionapi.Signal(signal)) {
				return nil, fmt.Errorf("--eviction-hard: %q is no threshold; give a list such as %s, or %s", item, Default, None)
			}
			want[signal] = value
		}
	}
	// What is to be kept free of the machine's memory is also to be kept free
	// of that which all pods together may have.
	parsed, err := eviction.ParseThresholdConfig([]string{kubetypes.NodeAllocatableEnforcementKey}, want, nil, nil, nil)
	if err != nil {
		return nil, fmt.Errorf("--eviction-hard: %w; give a list such as %s, or %s", err, Default, None)
	}
	// In one order, whatever the map's.
	slices.SortFunc(parsed, func(a, b evictionapi.Threshold) int { return strings.Compare(string(a.Signal), string(b.Signal)) })
	return parsed, nil
}

// Map writes thresholds as a kubelet's configuration has them.
func Map(thresholds []evictionapi.Threshold) map[string]string {
	m := map[string]string{}
	for _, t := range thresholds {
		if t.Signal == evictionapi.SignalAllocatableMemoryAvailable {
			continue // follows from the other
		}
		m[string(t.Signal)] = fmt.Sprintf("%.4g%%", t.Value.Percentage*100)
		if t.Value.Quantity != nil {
			m[string(t.Signal)] = t.Value.Quantity.String()
		}
	}
	return m
}

// crossed says whether the machine has less of something than it should keep.
func crossed(thresholds []evictionapi.Threshold, n *stats.NodeStats) bool {
	has := observed(n)
	return slices.ContainsFunc(thresholds, func(t evictionapi.Threshold) bool {
		o, ok := has[t.Signal]
		return ok && o.available < evictionapi.GetThresholdQuantity(t.Value, resource.NewQuantity(o.capacity, resource.BinarySI)).Value()
	})
}

type observation struct{ available, capacity int64 }

// observed is what a machine has, by the signal that tells it.
func observed(n *stats.NodeStats) map[evictionapi.Signal]observation {
	has := map[evictionapi.Signal]observation{}
	if m := n.Memory; m != nil && m.AvailableBytes != nil && m.WorkingSetBytes != nil {
		has[evictionapi.SignalMemoryAvailable] = observation{int64(*m.AvailableBytes), int64(*m.AvailableBytes + *m.WorkingSetBytes)}
	}
	for _, c := range n.SystemContainers {
		if m := c.Memory; c.Name == stats.SystemContainerPods && m != nil && m.AvailableBytes != nil && m.WorkingSetBytes != nil {
			has[evictionapi.SignalAllocatableMemoryAvailable] = observation{int64(*m.AvailableBytes), int64(*m.AvailableBytes + *m.WorkingSetBytes)}
		}
	}
	if d := n.Fs; d != nil {
		bytes, inodes := observation{int64(*d.AvailableBytes), int64(*d.CapacityBytes)}, observation{int64(*d.InodesFree), int64(*d.Inodes)}
		maps.Copy(has, map[evictionapi.Signal]observation{
			evictionapi.SignalNodeFsAvailable: bytes, evictionapi.SignalImageFsAvailable: bytes,
			evictionapi.SignalNodeFsInodesFree: inodes, evictionapi.SignalImageFsInodesFree: inodes,
		})
	}
	if r := n.Rlimit; r != nil && r.MaxPID != nil && r.NumOfRunningProcesses != nil {
		has[evictionapi.SignalPIDAvailable] = observation{*r.MaxPID - *r.NumOfRunningProcesses, *r.MaxPID}
	}
	return has
}
