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

// Get returns what the node and each pod use, disks included.
func (s *Server) Get(ctx context.Context, _ bool) (*stats.Summary, error) {
	summary, err := s.GetCPUAndMemoryStats(ctx)
	if err != nil {
		return nil, err
	}
	disk, err := fileSystem(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	summary.Node.Fs = disk
	summary.Node.Runtime = &stats.RuntimeStats{ImageFs: disk, ContainerFs: disk}
	pods := map[string]*v1.Pod{}
	for _, p := range s.cfg.Pods.Pods() {
		pods[string(p.UID)] = p
	}
	for i := range summary.Pods {
		ps := &summary.Pods[i]
		pod := pods[ps.PodRef.UID]
		if pod == nil {
			continue
		}
		var total uint64
		for j := range ps.Containers {
			c := &ps.Containers[j]
			logs := used(disk, sizeOf(filepath.Dir(LogFile(s.cfg.Dir, pod, c.Name, 0))))
			c.Logs = logs
			c.Rootfs = used(disk, *c.Rootfs.UsedBytes)
			total += *logs.UsedBytes + *c.Rootfs.UsedBytes
		}
		total += sizeOf(filepath.Join(volume.Layout(s.cfg.Dir).Pod(ps.PodRef.UID), "volumes"))
		ps.EphemeralStorage = used(disk, total)
	}
	return summary, nil
}

// GetCPUAndMemoryStats returns what the node and each pod use of processors
// and memory. A container that ends meanwhile is left out.
func (s *Server) GetCPUAndMemoryStats(ctx context.Context) (*stats.Summary, error) {
	node, err := s.node()
	if err != nil {
		return nil, err
	}
	summary := &stats.Summary{Node: node, Pods: []stats.PodStats{}}
	for _, p := range s.cfg.Pods.Pods() {
		ps := stats.PodStats{
			PodRef:     stats.PodReference{Name: p.Name, Namespace: p.Namespace, UID: string(p.UID)},
			StartTime:  ptr.Deref(p.Status.StartTime, p.CreationTimestamp),
			Containers: []stats.ContainerStats{},
		}
		var cpu, memory, workSet, processes uint64
		s.running(ctx, p, func(c *v1.Container, status runtime.Status, u runtime.Stats) {
			at := metav1.NewTime(u.Time)
			ps.Containers = append(ps.Containers, stats.ContainerStats{
				Name:      c.Name,
				StartTime: metav1.NewTime(status.StartedAt),
				CPU:       &stats.CPUStats{Time: at, UsageCoreNanoSeconds: ptr.To(uint64(u.CPU))},
				Memory:    &stats.MemoryStats{Time: at, UsageBytes: ptr.To(uint64(u.Memory)), WorkingSetBytes: ptr.To(uint64(u.WorkSet))},
				Rootfs:    &stats.FsStats{Time: at, UsedBytes: ptr.To(uint64(u.WritableLayer))},
			})
			cpu, memory, workSet, processes = cpu+uint64(u.CPU), memory+uint64(u.Memory), workSet+uint64(u.WorkSet), processes+uint64(u.Processes)
		})
		if len(ps.Containers) > 0 {
			now := metav1.Now()
			ps.CPU = &stats.CPUStats{Time: now, UsageCoreNanoSeconds: &cpu}
			ps.Memory = &stats.MemoryStats{Time: now, UsageBytes: &memory, WorkingSetBytes: &workSet}
			ps.ProcessStats = &stats.ProcessStats{ProcessCount: &processes}
		}
		summary.Pods = append(summary.Pods, ps)
	}
	return summary, nil
}

// running calls f with each running container of a pod and what it uses. One
// that ends meanwhile is left out.
func (s *Server) running(ctx context.Context, p *v1.Pod, f func(*v1.Container, runtime.Status, runtime.Stats)) {
	podutil.VisitContainers(&p.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
		status, err := s.cfg.Pods.Find(p.UID, c.Name)
		if err != nil || status.State != runtime.Running {
			return true
		}
		if u, err := s.cfg.Runtime.Stats(ctx, status.ID); err == nil {
			f(c, status, u)
		}
		return true
	})
}

func (s *Server) node() (stats.NodeStats, error) {
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
		NodeName:  s.cfg.NodeName,
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

// used is a part of a file system.
func used(whole *stats.FsStats, bytes uint64) *stats.FsStats {
	return &stats.FsStats{Time: whole.Time, AvailableBytes: whole.AvailableBytes, CapacityBytes: whole.CapacityBytes, UsedBytes: &bytes}
}

// sizeOf is 0 for what is not there.
func sizeOf(dir string) uint64 {
	n, err := volume.Size(dir)
	if err != nil {
		return 0
	}
	return uint64(n)
}
