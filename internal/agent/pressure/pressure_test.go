package pressure

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	"k8s.io/utils/ptr"
)

func TestParse(t *testing.T) {
	all := "map[memory.available:100Mi nodefs.available:10% nodefs.inodesFree:5% pid.available:10%]"
	for _, c := range []struct{ text, want string }{
		{"", all},
		{Default, all},
		{"none", "map[]"},
		{"nodefs.available<2Gi", strings.Replace(all, "10%", "2Gi", 1)},
		{"memory.available<1%,imagefs.available<15%", strings.Replace(strings.Replace(all, "100Mi", "1%", 1), "map[", "map[imagefs.available:15% ", 1)},
		{"pid.available<0%", strings.Replace(all, " pid.available:10%", "", 1)},
		{"disk<10%", `--eviction-hard: "disk<10%" is no threshold; give a list such as ` + Default + `, or none`},
		{"memory.available", `--eviction-hard: "memory.available" is no threshold; give a list such as ` + Default + `, or none`},
		{"allocatableMemory.available<1Gi", `--eviction-hard: "allocatableMemory.available<1Gi" is no threshold; give a list such as ` + Default + `, or none`},
	} {
		parsed, err := Parse(c.text)
		got := fmt.Sprint(Map(parsed))
		if err != nil {
			got = err.Error()
		}
		if got != c.want {
			t.Errorf("%q:\n got %s\nwant %s", c.text, got, c.want)
		}
	}
	if _, err := Parse("memory.available<much"); err == nil || !strings.Contains(err.Error(), "; give a list such as") {
		t.Error(err)
	}
}

// machine has a size of 1000 of everything and pods that use it up.
type machine struct {
	sync.Mutex
	memory, disk, inodes, pids int64 // free
	group                      int64 // free of what all pods may have of memory
	pods                       []*v1.Pod
	written                    map[types.UID]uint64 // in its first emptyDir, or layer
	workSet                    map[types.UID]uint64
	measured                   []string
	evicted                    []string
	images                     int64 // bytes that unused images have on disk
	dead                       int64 // bytes that finished pods have
}

func (m *machine) Node() (stats.NodeStats, error) {
	m.Lock()
	defer m.Unlock()
	now := metav1.Now()
	free := func(n int64) *uint64 { return ptr.To(uint64(n)) }
	fs := &stats.FsStats{Time: now, AvailableBytes: free(m.disk), CapacityBytes: free(1000), InodesFree: free(m.inodes), Inodes: free(1000)}
	return stats.NodeStats{
		Memory: &stats.MemoryStats{Time: now, AvailableBytes: free(m.memory), WorkingSetBytes: free(1000 - m.memory)},
		SystemContainers: []stats.ContainerStats{{Name: stats.SystemContainerPods,
			Memory: &stats.MemoryStats{Time: now, AvailableBytes: free(m.group), WorkingSetBytes: free(800 - m.group)}}},
		Fs:      fs,
		Runtime: &stats.RuntimeStats{ImageFs: fs, ContainerFs: fs},
		Rlimit:  &stats.RlimitStats{Time: now, MaxPID: ptr.To[int64](1000), NumOfRunningProcesses: ptr.To(1000 - m.pids)},
	}, nil
}

func (m *machine) Measure(_ context.Context, pods []*v1.Pod, _ *stats.FsStats) (list []stats.PodStats) {
	m.Lock()
	defer m.Unlock()
	for _, p := range pods {
		m.measured = append(m.measured, p.Name)
		used := stats.FsStats{UsedBytes: ptr.To(m.written[p.UID])}
		ps := stats.PodStats{PodRef: stats.PodReference{Name: p.Name, UID: string(p.UID)}, EphemeralStorage: &used,
			Memory: &stats.MemoryStats{Time: metav1.Now(), WorkingSetBytes: ptr.To(m.workSet[p.UID])}}
		for _, v := range p.Spec.Volumes {
			ps.VolumeStats = append(ps.VolumeStats, stats.VolumeStats{Name: v.Name, FsStats: used})
		}
		if len(p.Spec.Volumes) == 0 {
			ps.Containers = []stats.ContainerStats{{Name: "main", Memory: ps.Memory, Rootfs: &used, Logs: &stats.FsStats{UsedBytes: ptr.To[uint64](0)}}}
		}
		list = append(list, ps)
	}
	return list
}

func (m *machine) Active() []*v1.Pod {
	m.Lock()
	defer m.Unlock()
	return slices.Clone(m.pods)
}

func (m *machine) Evict(p *v1.Pod, _ bool, grace *int64, fn func(*v1.PodStatus)) error {
	m.Lock()
	defer m.Unlock()
	var s v1.PodStatus
	fn(&s)
	condition := ""
	for _, c := range s.Conditions {
		condition = " " + string(c.Type)
	}
	m.evicted = append(m.evicted, fmt.Sprintf("%s in %ds: %s: %s%s", p.Name, *grace, s.Reason, strings.TrimSpace(s.Message), condition))
	m.pods = slices.DeleteFunc(m.pods, func(q *v1.Pod) bool { return p.UID == q.UID })
	m.disk += int64(m.written[p.UID])
	m.memory += int64(m.workSet[p.UID])
	m.group += int64(m.workSet[p.UID])
	return nil
}

func (m *machine) Closed(*v1.Pod) bool { return true }

func (m *machine) RemoveDead(context.Context) error {
	m.Lock()
	defer m.Unlock()
	m.disk, m.dead = m.disk+m.dead, 0
	return nil
}

func (m *machine) Reclaim(_ context.Context, enough func(int64) bool) (freed int64, err error) {
	for m.images > 0 && !enough(freed) {
		m.Lock()
		m.images, m.disk = m.images-10, m.disk+10
		m.Unlock()
		freed += 5 // compressed
	}
	return freed, nil
}

func aPod(name string, change ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: types.UID(name)},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "main"}}},
	}
	for _, f := range change {
		f(p)
	}
	return p
}

func limit(name v1.ResourceName, q string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Limits = v1.ResourceList{name: resource.MustParse(q)}
		p.Spec.Containers[0].Resources.Requests = v1.ResourceList{name: resource.MustParse(q)}
	}
}

func dir(size string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Volumes = []v1.Volume{{Name: "dir", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{SizeLimit: ptr.To(resource.MustParse(size))}}}}
	}
}

// What a machine short of something does: the decision is upstream's, that it
// gets what it needs to decide is ours.
func TestManager(t *testing.T) {
	plain := func() *machine { return &machine{memory: 900, group: 700, disk: 500, inodes: 900, pids: 900} }
	for _, c := range []struct {
		name       string
		change     func(*machine)
		evicted    []string
		measured   string // each pod at least once
		conditions string
		refuses    string // besteffort, burstable
	}{
		{name: "enough of all", change: func(m *machine) { m.pods = []*v1.Pod{aPod("a"), aPod("b", dir("1Gi"))} }, measured: "b"},
		{
			name: "emptyDir over its limit",
			change: func(m *machine) {
				m.pods, m.written = []*v1.Pod{aPod("a"), aPod("b", dir("10"))}, map[types.UID]uint64{"a": 99, "b": 11}
			},
			evicted: []string{`b in 1s: Evicted: Usage of EmptyDir volume "dir" exceeds the limit "10".`}, measured: "b",
		},
		{
			name: "writable layer over its limit",
			change: func(m *machine) {
				m.pods, m.written = []*v1.Pod{aPod("a"), aPod("b", limit(v1.ResourceEphemeralStorage, "10"))}, map[types.UID]uint64{"a": 99, "b": 11}
			},
			evicted: []string{"b in 1s: Evicted: Pod ephemeral local storage usage exceeds the total limit of containers 10."}, measured: "b",
		},
		{
			name: "disk full: who wrote most beyond what it asked for",
			change: func(m *machine) {
				m.disk = 60
				m.pods = []*v1.Pod{aPod("modest"), aPod("asked", limit(v1.ResourceEphemeralStorage, "300")), aPod("greedy")}
				m.written = map[types.UID]uint64{"modest": 10, "asked": 290, "greedy": 200}
			},
			evicted:  []string{"greedy in 1s: Evicted: The node was low on resource: ephemeral-storage. Threshold quantity: 100, available: 60. Container main was using 200, request is 0, has larger consumption of ephemeral-storage. DisruptionTarget"},
			measured: "asked greedy modest", conditions: "DiskPressure", refuses: "besteffort burstable",
		},
		{
			name: "disk full of unused images",
			change: func(m *machine) {
				m.disk, m.images, m.pods, m.written = 60, 100, []*v1.Pod{aPod("a")}, map[types.UID]uint64{"a": 500}
			},
			measured: "a", conditions: "DiskPressure", refuses: "besteffort burstable",
		},
		{
			name: "disk full of logs of finished pods",
			change: func(m *machine) {
				m.disk, m.dead, m.pods, m.written = 60, 100, []*v1.Pod{aPod("a")}, map[types.UID]uint64{"a": 500}
			},
			measured: "a", conditions: "DiskPressure", refuses: "besteffort burstable",
		},
		{
			name: "memory: not who asked for what it has",
			change: func(m *machine) {
				m.memory = 60
				m.pods = []*v1.Pod{aPod("a", limit(v1.ResourceMemory, "900")), aPod("b")}
				m.workSet = map[types.UID]uint64{"a": 700, "b": 100}
			},
			evicted:  []string{"b in 1s: Evicted: The node was low on resource: memory. Threshold quantity: 100, available: 60. Container main was using 100, request is 0, has larger consumption of memory. DisruptionTarget"},
			measured: "a b", conditions: "MemoryPressure", refuses: "besteffort",
		},
		{
			name: "what all pods may have of memory, though the machine has more",
			change: func(m *machine) {
				m.group = 60
				m.pods = []*v1.Pod{aPod("a", limit(v1.ResourceMemory, "900")), aPod("b")}
				m.workSet = map[types.UID]uint64{"a": 640, "b": 100}
			},
			evicted:  []string{"b in 1s: Evicted: The node was low on resource: memory. Threshold quantity: 80, available: 60. Container main was using 100, request is 0, has larger consumption of memory. DisruptionTarget"},
			measured: "a b", conditions: "MemoryPressure", refuses: "besteffort",
		},
		{
			name:     "inodes",
			change:   func(m *machine) { m.inodes, m.pods = 20, []*v1.Pod{aPod("a")} },
			evicted:  []string{"a in 1s: Evicted: The node was low on resource: inodes. Threshold quantity: 50, available: 20. DisruptionTarget"},
			measured: "a", conditions: "DiskPressure", refuses: "besteffort burstable",
		},
		{
			name:     "process ids",
			change:   func(m *machine) { m.pids, m.pods = 20, []*v1.Pod{aPod("a")} },
			evicted:  []string{"a in 1s: Evicted: The node was low on resource: pids. Threshold quantity: 100, available: 20. DisruptionTarget"},
			measured: "a", conditions: "PIDPressure", refuses: "besteffort burstable",
		},
		{
			name: "critical pods stay",
			change: func(m *machine) {
				m.pids = 20
				m.pods = []*v1.Pod{aPod("a", func(p *v1.Pod) { p.Spec.Priority = ptr.To[int32](2000000000) })}
			},
			measured: "a", conditions: "PIDPressure", refuses: "besteffort burstable",
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			m := plain()
			c.change(m)
			thresholds, err := Parse("memory.available<10%")
			if err != nil {
				t.Fatal(err)
			}
			watch := New(Config{NodeName: "here", Thresholds: thresholds, Usage: m, Pods: m, Images: m, Recorder: &record.FakeRecorder{}, Log: slog.New(slog.DiscardHandler)})
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan struct{})
			go func() { watch.Run(ctx); close(ended) }()
			defer func() { cancel(); <-ended }()

			has := func() string {
				var list []string
				for _, kind := range []v1.NodeConditionType{v1.NodeMemoryPressure, v1.NodeDiskPressure, v1.NodePIDPressure} {
					if watch.Has(kind) {
						list = append(list, string(kind))
					}
				}
				return strings.Join(list, " ")
			}
			refuses := func() string {
				var list []string
				for name, p := range map[string]*v1.Pod{"besteffort": aPod("new"), "burstable": aPod("new", limit(v1.ResourceMemory, "1"))} {
					if r := watch.Admit(&lifecycle.PodAdmitAttributes{Pod: p}); !r.Admit && r.Reason == "Evicted" {
						list = append(list, name)
					}
				}
				slices.Sort(list)
				return strings.Join(list, " ")
			}
			state := func() string {
				now, no := has(), refuses()
				m.Lock()
				defer m.Unlock()
				seen := slices.Compact(slices.Sorted(slices.Values(m.measured)))
				return fmt.Sprintf("evicted %q\nmeasured %s\nhas %s\nrefuses %s", m.evicted, strings.Join(seen, " "), now, no)
			}
			want := fmt.Sprintf("evicted %q\nmeasured %s\nhas %s\nrefuses %s", c.evicted, c.measured, c.conditions, c.refuses)
			for deadline := time.Now().Add(10 * time.Second); state() != want; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("got\n%s\nwant\n%s", state(), want)
				}
			}
		})
	}
}

// Images go only above the high mark, and only down to the low one.
func TestCollect(t *testing.T) {
	for _, c := range []struct{ free, images, left int64 }{
		{160, 500, 500},
		{150, 500, 500},
		{140, 500, 440}, // 860 → 800
		{140, 30, 0},
		{10, 500, 310},
	} {
		m := &machine{disk: c.free, images: c.images}
		recorder := record.NewFakeRecorder(1)
		watch := New(Config{Usage: m, Pods: m, Images: m, Recorder: recorder, Log: slog.New(slog.DiscardHandler)})
		if err := watch.collectOnce(t.Context()); err != nil || m.images != c.left {
			t.Errorf("%d free: %d of %d left, want %d, %v", c.free, m.images, c.images, c.left, err)
		}
	}
	m, recorder := &machine{disk: 140}, record.NewFakeRecorder(1)
	watch := New(Config{Usage: m, Pods: m, Images: m, Recorder: recorder, Log: slog.New(slog.DiscardHandler)})
	if err := watch.collectOnce(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case e := <-recorder.Events:
		if !strings.HasPrefix(e, "Warning FreeDiskSpaceFailed Failed to garbage collect required amount of images. Attempted to free 60 bytes") {
			t.Error(e)
		}
	default:
		t.Error("no event though nothing could be removed")
	}
}
