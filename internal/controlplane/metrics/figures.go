package metrics

import (
	"errors"
	"io"
	"maps"
	"math"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	metricsapi "k8s.io/metrics/pkg/apis/metrics"
)

// usage is what a node or a container had used at a moment, by the clock of its node.
type usage struct {
	at      time.Time
	started time.Time     // zero for a node
	cpu     time.Duration // of one processor, since it started
	memory  int64         // working set, bytes
}

// sample is what a node and each container on it had used.
type sample struct {
	taken time.Time // by our clock
	node  usage
	pods  map[types.NamespacedName]map[string]usage // by container
}

// parse reads what a node answers at /metrics/resource. A container of which the start or the processor time is not
// told is left out.
func parse(r io.Reader, taken time.Time) (*sample, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(r)
	if err != nil {
		return nil, err
	}
	type container struct {
		pod  types.NamespacedName
		name string
	}
	s := &sample{taken: taken, pods: map[types.NamespacedName]map[string]usage{}}
	containers := map[container]usage{}
	each := func(family string, set func(u *usage, value float64, at time.Time)) {
		for _, m := range families[family].GetMetric() {
			label := labelsOf(m)
			c := container{types.NamespacedName{Namespace: label["namespace"], Name: label["pod"]}, label["container"]}
			u := containers[c]
			set(&u, m.GetCounter().GetValue()+m.GetGauge().GetValue(), time.UnixMilli(m.GetTimestampMs()))
			containers[c] = u
		}
	}
	cpu := func(u *usage, value float64, at time.Time) { u.cpu, u.at = seconds(value), at }
	memory := func(u *usage, value float64, _ time.Time) { u.memory = int64(value) }
	// A node is the container without a name.
	each("node_cpu_usage_seconds_total", cpu)
	each("node_memory_working_set_bytes", memory)
	s.node = containers[container{}]
	delete(containers, container{})
	if s.node.at.IsZero() {
		return nil, errors.New("no figures of the node among the answer")
	}
	each("container_cpu_usage_seconds_total", cpu)
	each("container_memory_working_set_bytes", memory)
	each("container_start_time_seconds", func(u *usage, value float64, _ time.Time) { u.started = time.Unix(0, int64(seconds(value))) })
	for c, u := range containers {
		if u.at.IsZero() || u.started.IsZero() {
			continue
		}
		if s.pods[c.pod] == nil {
			s.pods[c.pod] = map[string]usage{}
		}
		s.pods[c.pod][c.name] = u
	}
	return s, nil
}

func labelsOf(m *dto.Metric) map[string]string {
	values := map[string]string{}
	for _, l := range m.GetLabel() {
		values[l.GetName()] = l.GetValue()
	}
	return values
}

func seconds(n float64) time.Duration { return time.Duration(math.Round(n * float64(time.Second))) }

// figure is what was used on average in the window that ends at a moment.
type figure struct {
	at     time.Time
	window time.Duration
	cpu    int64 // billionths of a processor
	memory int64 // working set at the end, bytes
}

func (f figure) list() v1.ResourceList {
	return v1.ResourceList{
		v1.ResourceCPU:    *resource.NewScaledQuantity(f.cpu, resource.Nano),
		v1.ResourceMemory: *resource.NewQuantity(f.memory, resource.BinarySI),
	}
}

// compare returns what was used from older to newer. What was not there at older, which is zero then, or has started
// again since is counted from its start. There is no figure for a window that is too short to mean something, or so
// long that it says nothing of now.
func compare(older, newer usage) (figure, bool) {
	if !older.started.Equal(newer.started) || older.cpu > newer.cpu {
		older = usage{at: newer.started}
	}
	window := newer.at.Sub(older.at)
	if older.at.IsZero() || window < shortestWindow || window > longestWindow {
		return figure{}, false
	}
	cores := float64(newer.cpu-older.cpu) / float64(window)
	return figure{at: newer.at, window: window, cpu: int64(math.Round(cores * 1e9)), memory: newer.memory}, true
}

// ofNode returns the figures of a node, or nil while there are none.
func ofNode(n *v1.Node, older, newer *sample) *metricsapi.NodeMetrics {
	f, ok := compare(older.node, newer.node)
	if !ok {
		return nil
	}
	return &metricsapi.NodeMetrics{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels, CreationTimestamp: metav1.NewTime(f.at)},
		Timestamp:  metav1.NewTime(f.at),
		Window:     metav1.Duration{Duration: f.window},
		Usage:      f.list(),
	}
}

// ofPod returns the figures of a pod, or nil while one of its running containers has none: part of a pod would look like
// the whole. The window is that of the container that was watched longest.
func ofPod(p *v1.Pod, older, newer *sample) *metricsapi.PodMetrics {
	key := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}
	m := &metricsapi.PodMetrics{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels}}
	for _, name := range slices.Sorted(maps.Keys(newer.pods[key])) {
		u := newer.pods[key][name]
		f, ok := compare(older.pods[key][name], u)
		// One that started before the pod did belongs to a pod of the same name that is gone.
		if !ok || p.Status.StartTime != nil && u.started.Before(p.Status.StartTime.Time) {
			return nil
		}
		m.Containers = append(m.Containers, metricsapi.ContainerMetrics{Name: name, Usage: f.list()})
		if m.Timestamp.Time.Before(f.at) {
			m.Timestamp = metav1.NewTime(f.at)
			m.CreationTimestamp = m.Timestamp
		}
		m.Window.Duration = max(m.Window.Duration, f.window)
	}
	if len(m.Containers) == 0 {
		return nil
	}
	return m
}
