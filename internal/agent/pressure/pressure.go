// Package pressure defends the machine against its pods. When memory, disk,
// inodes or process ids run short it tells so, collects what nobody uses and
// then evicts pods, one at a time; and it evicts pods that write more than
// their own limits allow.
//
// Whom, when and with what words is decided by the kubelet's own eviction
// manager, which is used whole. This package measures for it, and sparingly:
// what the machine has is looked at each second, which costs next to nothing;
// to know what pods have written takes a walk through all their files, and is
// done for those with limits only, until there is not enough for all.
package pressure

import (
	"context"
	"fmt"
	"log/slog"
	goruntime "runtime"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	resourcehelper "k8s.io/component-helpers/resource"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/kubernetes/pkg/kubelet/eviction"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	"k8s.io/utils/clock"
)

const (
	// interval is how often the machine is looked at. A kubelet takes 10 s; in
	// that time a fast writer fills what was to be kept free of a small disk.
	interval = time.Second
	// limitInterval is how often pods are held against their own limits.
	limitInterval = 10 * time.Second
	// transition is how long a condition lasts after what it tells of is over,
	// so that it does not come and go with each pod. A kubelet takes 5 min.
	transition = time.Minute
)

// Usage is what is asked of what the machine and its pods use.
type Usage interface {
	// Node is cheap.
	Node() (stats.NodeStats, error)
	// Measure walks through all files of the pods.
	Measure(ctx context.Context, pods []*v1.Pod, disk *stats.FsStats) []stats.PodStats
}

// Pods is what is asked of the agent.
type Pods interface {
	// Active are the pods that run, or are to.
	Active() []*v1.Pod
	// Evict stops a pod, tells the API the status that fn gives it, and
	// returns when nothing of it runs any more.
	Evict(p *v1.Pod, evicted bool, grace *int64, fn func(*v1.PodStatus)) error
	// Closed says that nothing of the pod is left on the machine.
	Closed(*v1.Pod) bool
	// RemoveDead removes what finished pods have left: their logs.
	RemoveDead(context.Context) error
}

// Images can be done without.
type Images interface {
	// Reclaim removes unused images until enough says so of the bytes freed.
	Reclaim(ctx context.Context, enough func(freed int64) bool) (freed int64, err error)
}

// Config is what a Manager works with.
type Config struct {
	NodeName   string
	Thresholds []evictionapi.Threshold
	Usage      Usage
	Pods       Pods
	Images     Images
	Recorder   record.EventRecorder
	Log        *slog.Logger
}

// Manager watches over one machine. Make it with New, then Run it once.
type Manager struct {
	Config
	node    *v1.ObjectReference
	manager eviction.Manager
	admit   lifecycle.PodAdmitHandler

	mu       sync.Mutex
	measured time.Time // when pods were last held against their limits
}

// New makes a Manager; it looks at nothing before Run.
func New(c Config) *Manager {
	// As with a kubelet, events of the node have its name for UID.
	m := &Manager{Config: c, node: &v1.ObjectReference{Kind: "Node", Name: c.NodeName, UID: types.UID(c.NodeName)}}
	m.manager, m.admit = eviction.NewManager(m, eviction.Config{
		PressureTransitionPeriod: transition, Thresholds: slices.Clone(c.Thresholds),
	}, c.Pods.Evict, m, m, c.Recorder, m.node, clock.RealClock{}, true)
	return m
}

// Has says whether the machine has one of the conditions MemoryPressure,
// DiskPressure and PIDPressure.
func (m *Manager) Has(kind v1.NodeConditionType) bool {
	switch kind {
	case v1.NodeMemoryPressure:
		return m.manager.IsUnderMemoryPressure()
	case v1.NodeDiskPressure:
		return m.manager.IsUnderDiskPressure()
	case v1.NodePIDPressure:
		return m.manager.IsUnderPIDPressure()
	}
	return false
}

// Admit implements lifecycle.PodAdmitHandler: a machine in need takes no pod
// that would make it worse.
func (m *Manager) Admit(at *lifecycle.PodAdmitAttributes) lifecycle.PodAdmitResult {
	return m.admit.Admit(at)
}

// Run watches until ctx ends.
func (m *Manager) Run(ctx context.Context) {
	m.manager.Start(ctx, oneDisk{}, func() []*v1.Pod {
		if ctx.Err() != nil {
			// The manager's loop has no end of its own, and holds nothing here.
			goruntime.Goexit()
		}
		return m.Pods.Active()
	}, m.Pods.Closed, interval)
	m.collect(ctx)
}

// Get implements the manager's SummaryProvider. Pods that are not in the
// answer are not held against their limits.
func (m *Manager) Get(ctx context.Context, _ bool) (*stats.Summary, error) {
	node, err := m.Usage.Node()
	if err != nil {
		return nil, fmt.Errorf("measure the machine: %w", err)
	}
	var pods []*v1.Pod
	if crossed(m.Thresholds, &node) {
		pods = m.Pods.Active()
	} else if m.limitsDue() {
		pods = slices.DeleteFunc(m.Pods.Active(), func(p *v1.Pod) bool { return !limited(p) })
	}
	return &stats.Summary{Node: node, Pods: m.Usage.Measure(ctx, pods, node.Fs)}, nil
}

// GetCPUAndMemoryStats is the rest of SummaryProvider.
func (m *Manager) GetCPUAndMemoryStats(ctx context.Context) (*stats.Summary, error) {
	return m.Get(ctx, false)
}

func (m *Manager) limitsDue() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if time.Since(m.measured) < limitInterval {
		return false
	}
	m.measured = time.Now()
	return true
}

// limited says whether a pod limits what it writes to the disk.
func limited(p *v1.Pod) bool {
	if _, ok := resourcehelper.PodLimits(p, resourcehelper.PodResourcesOptions{})[v1.ResourceEphemeralStorage]; ok {
		return true
	}
	return slices.ContainsFunc(p.Spec.Volumes, func(v v1.Volume) bool {
		return v.EmptyDir != nil && v.EmptyDir.Medium == v1.StorageMediumDefault && v.EmptyDir.SizeLimit != nil
	})
}

// oneDisk says that images and containers are on the disk that the rest is on.
type oneDisk struct{}

func (oneDisk) HasDedicatedImageFs(context.Context) (bool, error)     { return false, nil }
func (oneDisk) HasDedicatedContainerFs(context.Context) (bool, error) { return false, nil }
