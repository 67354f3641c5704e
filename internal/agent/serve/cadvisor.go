package serve

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/component-base/metrics"

	"tutti.dev/tutti/internal/runtime"
)

// whose are the labels by which cAdvisor names a container. The machine is
// the one with the id "/"; a pod's network belongs to none of its containers.
var whose = []string{"container", "id", "image", "name", "namespace", "pod"}

func ofContainer(name, help string, more ...string) *metrics.Desc {
	return metrics.NewDesc(name, help, append(append([]string{}, whose...), more...), nil, metrics.ALPHA, "")
}

var (
	cpuUsage    = ofContainer("container_cpu_usage_seconds_total", "Cumulative cpu time consumed in seconds.", "cpu")
	memoryUsage = ofContainer("container_memory_usage_bytes", "Current memory usage in bytes, including all memory regardless of when it was accessed")
	workingSet  = ofContainer("container_memory_working_set_bytes", "Current working set in bytes.")
	fsUsage     = ofContainer("container_fs_usage_bytes", "Number of bytes that are consumed by the container on this filesystem.", "device")
	processes   = ofContainer("container_processes", "Number of processes running inside the container.")
	startTime   = ofContainer("container_start_time_seconds", "Start time of the container since unix epoch in seconds.")
	lastSeen    = ofContainer("container_last_seen", "Last time a container was seen by the exporter")
	cpuPeriod   = ofContainer("container_spec_cpu_period", "CPU period of the container.")
	cpuQuota    = ofContainer("container_spec_cpu_quota", "CPU quota of the container.")
	memoryLimit = ofContainer("container_spec_memory_limit_bytes", "Memory limit for the container.")
	// In the order of the columns of /proc/net/dev; nil for one that is not
	// told.
	interfaces = []*metrics.Desc{
		ofContainer("container_network_receive_bytes_total", "Cumulative count of bytes received", "interface"),
		ofContainer("container_network_receive_packets_total", "Cumulative count of packets received", "interface"),
		ofContainer("container_network_receive_errors_total", "Cumulative count of errors encountered while receiving", "interface"),
		ofContainer("container_network_receive_packets_dropped_total", "Cumulative count of packets dropped while receiving", "interface"),
		nil, nil, nil, nil,
		ofContainer("container_network_transmit_bytes_total", "Cumulative count of bytes transmitted", "interface"),
		ofContainer("container_network_transmit_packets_total", "Cumulative count of packets transmitted", "interface"),
		ofContainer("container_network_transmit_errors_total", "Cumulative count of errors encountered while transmitting", "interface"),
		ofContainer("container_network_transmit_packets_dropped_total", "Cumulative count of packets dropped while transmitting", "interface"),
	}
	machineMemory = metrics.NewDesc("machine_memory_bytes", "Amount of memory installed on the machine.", nil, nil, metrics.ALPHA, "")
)

// period of a CPU limit, in microseconds, is the kernel's default.
const period = 100_000

// containers tells what runs here under the names that cAdvisor gave it,
// which dashboards ask for. Figures that need the kernel's fine print, such
// as caches and block devices, are not among them.
type containers struct {
	metrics.BaseStableCollector
	server *Server
}

// DescribeWithStability implements metrics.StableCollector.
func (containers) DescribeWithStability(ch chan<- *metrics.Desc) {
	for _, d := range append([]*metrics.Desc{
		cpuUsage, memoryUsage, workingSet, fsUsage, processes, startTime, lastSeen, cpuPeriod, cpuQuota, memoryLimit, machineMemory,
	}, interfaces...) {
		if d != nil {
			ch <- d
		}
	}
}

// CollectWithStability implements metrics.StableCollector.
func (c containers) CollectWithStability(ch chan<- metrics.Metric) {
	s := c.server
	if node, err := s.node(); err != nil {
		s.cfg.Log.Error("cannot tell what the machine uses", "error", err)
	} else {
		all := series{ch, node.CPU.Time.Time, []string{"", "/", "", "", "", ""}}
		all.counter(cpuUsage, float64(*node.CPU.UsageCoreNanoSeconds)/float64(time.Second), "total")
		all.gauge(memoryUsage, float64(*node.Memory.UsageBytes))
		all.gauge(workingSet, float64(*node.Memory.WorkingSetBytes))
	}
	if memory, err := fields("/proc/meminfo"); err == nil {
		ch <- metrics.NewLazyConstMetric(machineMemory, metrics.GaugeValue, float64(memory["MemTotal:"]<<10))
	}
	for _, p := range s.cfg.Pods.Pods() {
		seen := false
		s.running(context.Background(), p, func(c *v1.Container, status runtime.Status, u runtime.Stats) {
			own := series{ch, u.Time, []string{c.Name, cgroup(status.PID), c.Image, status.ID.String(), p.Namespace, p.Name}}
			own.counter(cpuUsage, u.CPU.Seconds(), "total")
			own.gauge(memoryUsage, float64(u.Memory))
			own.gauge(workingSet, float64(u.WorkSet))
			own.gauge(fsUsage, float64(u.WritableLayer), "")
			own.gauge(processes, float64(u.Processes))
			own.gauge(startTime, float64(status.StartedAt.Unix()))
			own.gauge(lastSeen, float64(u.Time.Unix()))
			own.gauge(memoryLimit, float64(c.Resources.Limits.Memory().Value()))
			if milli := c.Resources.Limits.Cpu().MilliValue(); milli > 0 {
				own.gauge(cpuPeriod, period)
				own.gauge(cpuQuota, float64(milli*period/1000))
			}
			// All containers have the network of the pod.
			if netns, err := s.cfg.Pods.NetNS(p.UID); !seen && err == nil && netns != "" {
				seen = true
				series{ch, u.Time, []string{"", "", "", "", p.Namespace, p.Name}}.network(status.PID)
			}
		})
	}
}

// series is what is told of one thing at one moment.
type series struct {
	ch    chan<- metrics.Metric
	at    time.Time
	whose []string
}

func (s series) send(d *metrics.Desc, kind metrics.ValueType, value float64, more []string) {
	s.ch <- metrics.NewLazyMetricWithTimestamp(s.at, metrics.NewLazyConstMetric(d, kind, value, append(append([]string{}, s.whose...), more...)...))
}

func (s series) counter(d *metrics.Desc, value float64, more ...string) {
	s.send(d, metrics.CounterValue, value, more)
}

func (s series) gauge(d *metrics.Desc, value float64, more ...string) {
	s.send(d, metrics.GaugeValue, value, more)
}

// network tells what went over the links that a process sees. One that has
// just ended has no such file.
func (s series) network(pid int) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		name, counts, ok := strings.Cut(lines.Text(), ":")
		if name = strings.TrimSpace(name); !ok || name == "lo" {
			continue
		}
		for i, count := range strings.Fields(counts) {
			if n, err := strconv.ParseUint(count, 10, 64); err == nil && i < len(interfaces) && interfaces[i] != nil {
				s.counter(interfaces[i], float64(n), name)
			}
		}
	}
}

// cgroup is the control group of a process, as the kernel writes it, or ""
// once it has ended.
func cgroup(pid int) string {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	unified := ""
	for line := range strings.Lines(string(content)) {
		// hierarchy:controllers:path
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(f) != 3:
		case f[1] == "memory":
			return f[2]
		case f[1] == "":
			unified = f[2]
		}
	}
	return unified
}
