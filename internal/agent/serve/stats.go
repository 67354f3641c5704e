package serve

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/volume"
)

func (s *Server) summary(w http.ResponseWriter, r *http.Request) {
	var summary *stats.Summary
	var err error
	if only, _ := strconv.ParseBool(r.URL.Query().Get("only_cpu_and_memory")); only {
		summary, err = s.GetCPUAndMemoryStats(r.Context())
	} else {
		summary, err = s.Get(r.Context(), false)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.writeJSON(w, summary)
}

// Usage measures what the node and its pods use. It keeps nothing.
type Usage struct {
	NodeName string
	Pods     Pods
	Runtime  Workloads
	Dir      string // data directory
}

// Get returns what the node and each pod use, disks included.
func (u *Usage) Get(ctx context.Context, _ bool) (*stats.Summary, error) {
	node, err := u.Node()
	if err != nil {
		return nil, err
	}
	return &stats.Summary{Node: node, Pods: u.Measure(ctx, u.Pods.Pods(), node.Fs)}, nil
}

// Node returns what the whole machine uses.
func (u *Usage) Node() (stats.NodeStats, error) {
	node, err := u.node()
	if err != nil {
		return node, err
	}
	if node.Fs, err = fileSystem(u.Dir); err != nil {
		return node, err
	}
	node.Runtime = &stats.RuntimeStats{ImageFs: node.Fs, ContainerFs: node.Fs}
	if node.Rlimit, err = pidlimit.Stats(); err != nil {
		return node, fmt.Errorf("count the machine's processes: %w", err)
	}
	return node, nil
}

// Measure returns what pods use of everything. It walks through all the files
// that they have written on disk.
func (u *Usage) Measure(ctx context.Context, pods []*v1.Pod, disk *stats.FsStats) []stats.PodStats {
	list := []stats.PodStats{}
	for _, p := range pods {
		ps := u.podStats(ctx, p)
		u.written(p, disk, &ps)
		list = append(list, ps)
	}
	return list
}

// written adds what a pod has written: its containers' layers and logs, and
// its volumes that are on this machine's disk.
func (u *Usage) written(p *v1.Pod, disk *stats.FsStats, ps *stats.PodStats) {
	var total volume.Used
	for i := range ps.Containers {
		c := &ps.Containers[i]
		logs := measure(filepath.Dir(LogFile(u.Dir, p, c.Name, 0)))
		layer := volume.Used{Bytes: int64(*c.Rootfs.UsedBytes), Inodes: int64(*c.Rootfs.InodesUsed)}
		c.Logs, c.Rootfs = part(disk, logs), part(disk, layer)
		total.Add(logs)
		total.Add(layer)
	}
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if v.EmptyDir == nil || v.EmptyDir.Medium != v1.StorageMediumDefault {
			continue
		}
		used := measure(volume.Layout(u.Dir).Volume(string(p.UID), "emptyDir", v.Name))
		ps.VolumeStats = append(ps.VolumeStats, stats.VolumeStats{Name: v.Name, FsStats: *part(disk, used)})
		total.Add(used)
	}
	ps.EphemeralStorage = part(disk, total)
}

// GetCPUAndMemoryStats returns what the node and each pod use of processors
// and memory. A container that ends meanwhile is left out.
func (u *Usage) GetCPUAndMemoryStats(ctx context.Context) (*stats.Summary, error) {
	node, err := u.node()
	if err != nil {
		return nil, err
	}
	summary := &stats.Summary{Node: node, Pods: []stats.PodStats{}}
	for _, p := range u.Pods.Pods() {
		summary.Pods = append(summary.Pods, u.podStats(ctx, p))
	}
	return summary, nil
}

// podStats returns what the runtime knows of a pod's containers.
func (u *Usage) podStats(ctx context.Context, p *v1.Pod) stats.PodStats {
	ps := stats.PodStats{
		PodRef:     stats.PodReference{Name: p.Name, Namespace: p.Namespace, UID: string(p.UID)},
		StartTime:  ptr.Deref(p.Status.StartTime, p.CreationTimestamp),
		Containers: []stats.ContainerStats{},
	}
	var cpu, memory, workSet, processes uint64
	u.running(ctx, p, func(c *v1.Container, status runtime.Status, used runtime.Stats) {
		at := metav1.NewTime(used.Time)
		ps.Containers = append(ps.Containers, stats.ContainerStats{
			Name:      c.Name,
			StartTime: metav1.NewTime(status.StartedAt),
			CPU:       &stats.CPUStats{Time: at, UsageCoreNanoSeconds: ptr.To(uint64(used.CPU))},
			Memory:    &stats.MemoryStats{Time: at, UsageBytes: ptr.To(uint64(used.Memory)), WorkingSetBytes: ptr.To(uint64(used.WorkSet))},
			Rootfs:    &stats.FsStats{Time: at, UsedBytes: ptr.To(uint64(used.WritableLayer)), InodesUsed: ptr.To(uint64(used.WritableInodes))},
		})
		cpu, memory, workSet, processes = cpu+uint64(used.CPU), memory+uint64(used.Memory), workSet+uint64(used.WorkSet), processes+uint64(used.Processes)
	})
	if len(ps.Containers) > 0 {
		now := metav1.Now()
		ps.CPU = &stats.CPUStats{Time: now, UsageCoreNanoSeconds: &cpu}
		ps.Memory = &stats.MemoryStats{Time: now, UsageBytes: &memory, WorkingSetBytes: &workSet}
		ps.ProcessStats = &stats.ProcessStats{ProcessCount: &processes}
	}
	return ps
}

// running calls f with each running container of a pod and what it uses. One
// that ends meanwhile is left out.
func (u *Usage) running(ctx context.Context, p *v1.Pod, f func(*v1.Container, runtime.Status, runtime.Stats)) {
	podutil.VisitContainers(&p.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
		status, err := u.Pods.Find(p.UID, c.Name)
		if err != nil || status.State != runtime.Running {
			return true
		}
		if used, err := u.Runtime.Stats(ctx, status.ID); err == nil {
			f(c, status, used)
		}
		return true
	})
}

func (u *Usage) node() (stats.NodeStats, error) {
	cpu, boot, err := processors()
	if err != nil {
		return stats.NodeStats{}, err
	}
	memory, err := fields("/proc/meminfo")
	if err != nil {
		return stats.NodeStats{}, err
	}
	now := metav1.Now()
	kib := func(name string) uint64 { return memory[name] << 10 }
	return stats.NodeStats{
		NodeName:  u.NodeName,
		StartTime: metav1.NewTime(boot),
		CPU:       &stats.CPUStats{Time: now, UsageCoreNanoSeconds: ptr.To(uint64(cpu))},
		Memory: &stats.MemoryStats{
			Time:            now,
			AvailableBytes:  ptr.To(kib("MemAvailable:")),
			UsageBytes:      ptr.To(kib("MemTotal:") - kib("MemFree:")),
			WorkingSetBytes: ptr.To(kib("MemTotal:") - kib("MemAvailable:")),
		},
	}, nil
}

// ticks is the unit of times in /proc/stat: USER_HZ, which is fixed.
const ticks = time.Second / 100

// processors returns the time that all processors have worked since boot.
func processors() (worked time.Duration, boot time.Time, err error) {
	file, err := os.Open("/proc/stat")
	if err != nil {
		return 0, boot, fmt.Errorf("read what the processors did: %w", err)
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		field := strings.Fields(lines.Text())
		switch {
		case len(field) > 8 && field[0] == "cpu":
			// user nice system (idle iowait) irq softirq steal; guests are
			// in user already.
			for _, i := range []int{1, 2, 3, 6, 7, 8} {
				n, err := strconv.ParseInt(field[i], 10, 64)
				if err != nil {
					return 0, boot, fmt.Errorf("read what the processors did: %w", err)
				}
				worked += time.Duration(n) * ticks
			}
		case len(field) == 2 && field[0] == "btime":
			n, err := strconv.ParseInt(field[1], 10, 64)
			if err != nil {
				return 0, boot, fmt.Errorf("read the time of boot: %w", err)
			}
			boot = time.Unix(n, 0)
		}
	}
	return worked, boot, nil
}

// fields reads a file of lines with a name and a number.
func fields(name string) (map[string]uint64, error) {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read the machine's memory: %w", err)
	}
	values := map[string]uint64{}
	for line := range strings.Lines(string(content)) {
		if f := strings.Fields(line); len(f) > 1 {
			if n, err := strconv.ParseUint(f[1], 10, 64); err == nil {
				values[f[0]] = n
			}
		}
	}
	return values, nil
}

func fileSystem(dir string) (*stats.FsStats, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return nil, fmt.Errorf("look at the file system of %s: %w", dir, err)
	}
	block := uint64(fs.Bsize)
	return &stats.FsStats{
		Time:           metav1.Now(),
		AvailableBytes: ptr.To(fs.Bavail * block), CapacityBytes: ptr.To(fs.Blocks * block),
		UsedBytes:  ptr.To((fs.Blocks - fs.Bfree) * block),
		InodesFree: ptr.To(fs.Ffree), Inodes: ptr.To(fs.Files), InodesUsed: ptr.To(fs.Files - fs.Ffree),
	}, nil
}

// part is a part of a file system.
func part(whole *stats.FsStats, used volume.Used) *stats.FsStats {
	return &stats.FsStats{
		Time: whole.Time, AvailableBytes: whole.AvailableBytes, CapacityBytes: whole.CapacityBytes, UsedBytes: ptr.To(uint64(used.Bytes)),
		InodesFree: whole.InodesFree, Inodes: whole.Inodes, InodesUsed: ptr.To(uint64(used.Inodes)),
	}
}

// measure is 0 for what is not there.
func measure(dir string) volume.Used {
	used, err := volume.Measure(dir)
	if err != nil {
		return volume.Used{}
	}
	return used
}
