package serve

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	v1 "k8s.io/api/core/v1"
	"k8s.io/component-base/metrics"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"

	"tutti.dev/tutti/internal/runtime"
)

var (
	nodeName          = metrics.NewDesc("kubelet_node_name", "The node's name. The value is always 1.", []string{"node"}, nil, metrics.ALPHA, "")
	runningPods       = metrics.NewDesc("kubelet_running_pods", "Number of pods of which a container runs.", nil, nil, metrics.ALPHA, "")
	runningContainers = metrics.NewDesc("kubelet_running_containers", "Number of containers by their state.", []string{"container_state"}, nil, metrics.ALPHA, "")
)

// kubelet tells of the node what dashboards ask a kubelet for, and of this
// process how it does. What the control plane in the same process tells is at
// the API server's /metrics: here it would count twice.
type kubelet struct {
	metrics.BaseStableCollector
	server *Server
}

// process are the collectors of the process itself.
func process() []prometheus.Collector {
	return []prometheus.Collector{collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), collectors.NewGoCollector()}
}

// DescribeWithStability implements metrics.StableCollector.
func (kubelet) DescribeWithStability(ch chan<- *metrics.Desc) {
	ch <- nodeName
	ch <- runningPods
	ch <- runningContainers
}

// CollectWithStability implements metrics.StableCollector.
func (k kubelet) CollectWithStability(ch chan<- metrics.Metric) {
	pods, containers := 0, map[runtime.State]int{}
	for _, p := range k.server.cfg.Pods.Pods() {
		runs := false
		podutil.VisitContainers(&p.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
			if status, err := k.server.cfg.Pods.Find(p.UID, c.Name); err == nil {
				containers[status.State]++
				runs = runs || status.State == runtime.Running
			}
			return true
		})
		if runs {
			pods++
		}
	}
	ch <- metrics.NewLazyConstMetric(nodeName, metrics.GaugeValue, 1, k.server.cfg.NodeName)
	ch <- metrics.NewLazyConstMetric(runningPods, metrics.GaugeValue, float64(pods))
	for state, n := range containers {
		ch <- metrics.NewLazyConstMetric(runningContainers, metrics.GaugeValue, float64(n), string(state))
	}
}
