package translate

import (
	"fmt"
	"path"

	v1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	v1helper "k8s.io/kubernetes/pkg/apis/core/v1/helper"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"

	"tutti.dev/tutti/internal/runtime"
)

// The rules that turn milli-CPUs into the kernel's shares and quota are the
// kubelet's (pkg/kubelet/cm/helpers_linux.go); its package is not used
// because it brings cAdvisor along.
const (
	sharesPerCPU = 1024
	minShares    = 2
	maxShares    = 262144
	period       = 100_000 // microseconds
	minQuota     = 1000
)

// PodPids is how many processes and threads a pod may have. A kubelet has no
// such limit unless it is told one. It stops a fork bomb long before the
// machine's own ids run out, and while two processors can still bear it.
const PodPids = 1024

func shares(milli int64) int64 {
	return min(max(milli*sharesPerCPU/1000, minShares), maxShares)
}

func quota(milli int64) int64 {
	if milli == 0 {
		return 0
	}
	return max(milli*period/1000, minQuota)
}

// Pods is the control group, below the runtime's root, of all pods. BestEffort
// is that of pods that ask for nothing: together they get what others leave
// (BestEffortShares).
const (
	Pods             = "pods"
	BestEffort       = Pods + "/besteffort"
	BestEffortShares = minShares
)

// AllPods are the limits of Pods: of what the machine gives to pods, what the
// kernel can hold them to.
func AllPods(has v1.ResourceList) runtime.Resources {
	pids := has[pidlimit.PIDs]
	return runtime.Resources{CPUShares: shares(has.Cpu().MilliValue()), Memory: has.Memory().Value(), Pids: pids.Value()}
}

// Cgroup is the pod's control group below the runtime's root.
func Cgroup(p *v1.Pod) string {
	name := "pod" + string(p.UID)
	switch v1qos.GetPodQOS(p) {
	case v1.PodQOSGuaranteed:
		return path.Join(Pods, name)
	case v1.PodQOSBurstable:
		return path.Join(Pods, "burstable", name)
	}
	return path.Join(BestEffort, name)
}

// PodResources are those of a pod as a whole: what it says itself, or what its
// containers say together, if each of them limits itself. What a container
// leaves in memory when it ends is then the pod's to pay for.
func PodResources(p *v1.Pod) runtime.Resources {
	requests := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
	cpu, memory := true, true
	limits := resourcehelper.PodLimits(p, resourcehelper.PodResourcesOptions{
		ContainerFn: func(l v1.ResourceList, _ resourcehelper.ContainerType) {
			cpu, memory = cpu && !l.Cpu().IsZero(), memory && !l.Memory().IsZero()
		},
	})
	if own := p.Spec.Resources; own != nil {
		cpu, memory = cpu || !own.Limits.Cpu().IsZero(), memory || !own.Limits.Memory().IsZero()
	}
	r := runtime.Resources{CPUShares: minShares, Pids: PodPids, HugePages: hugePages(requests)}
	if v1qos.GetPodQOS(p) == v1.PodQOSBestEffort {
		return r
	}
	r.CPUShares = shares(requests.Cpu().MilliValue())
	if q := quota(limits.Cpu().MilliValue()); cpu && q > 0 {
		r.CPUQuota, r.CPUPeriod = q, period
	}
	if memory {
		r.Memory = limits.Memory().Value()
	}
	return r
}

// ContainerResources limits one container. A limit of the pod stands in for
// one that the container does not have.
func ContainerResources(p *v1.Pod, c *v1.Container) runtime.Resources {
	cpuLimit, memoryLimit := c.Resources.Limits.Cpu(), c.Resources.Limits.Memory()
	if pr := p.Spec.Resources; pr != nil {
		if cpuLimit.IsZero() {
			cpuLimit = pr.Limits.Cpu()
		}
		if memoryLimit.IsZero() {
			memoryLimit = pr.Limits.Memory()
		}
	}
	request, ok := c.Resources.Requests[v1.ResourceCPU]
	if !ok {
		request = *cpuLimit
	}
	r := runtime.Resources{CPUShares: shares(request.MilliValue()), Memory: memoryLimit.Value(), HugePages: hugePages(c.Resources.Limits)}
	if q := quota(cpuLimit.MilliValue()); q > 0 {
		r.CPUQuota, r.CPUPeriod = q, period
	}
	return r
}

// hugePages limits huge pages by size, in the kernel's way of writing it.
func hugePages(l v1.ResourceList) map[string]int64 {
	var out map[string]int64
	for name, q := range l {
		if !v1helper.IsHugePageResourceName(name) {
			continue
		}
		size, err := v1helper.HugePageSizeFromResourceName(name)
		if err != nil {
			continue // the API has refused such a name
		}
		if out == nil {
			out = map[string]int64{}
		}
		out[pageSize(size.Value())] += q.Value()
	}
	return out
}

func pageSize(bytes int64) string {
	for _, u := range []struct {
		unit string
		size int64
	}{{"GB", 1 << 30}, {"MB", 1 << 20}} {
		if bytes >= u.size && bytes%u.size == 0 {
			return fmt.Sprintf("%d%s", bytes/u.size, u.unit)
		}
	}
	return fmt.Sprintf("%dKB", bytes/1024)
}
