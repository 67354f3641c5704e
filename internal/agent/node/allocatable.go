package node

import (
	"fmt"
	"maps"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"
)

// What is kept from pods on a machine that was told nothing: the server and
// its storage take some 400 MiB, and who logs in to stop a fork bomb needs a
// process. Of a small machine no more than a quarter is kept.
const (
	reservedMemory = 512 << 20
	reservedPIDs   = 1000
)

// ParseReserved reads what is to be kept from pods for the machine itself, as
// a kubelet's --system-reserved has it: RESOURCE=QUANTITY, separated by commas.
// What is not named has its default.
func ParseReserved(text string) (v1.ResourceList, error) {
	list := v1.ResourceList{}
	for item := range strings.SplitSeq(text, ",") {
		if item == "" {
			continue
		}
		name, value, _ := strings.Cut(item, "=")
		q, err := resource.ParseQuantity(value)
		switch v1.ResourceName(name) {
		case v1.ResourceCPU, v1.ResourceMemory, v1.ResourceEphemeralStorage, pidlimit.PIDs:
		default:
			err = fmt.Errorf("unknown resource %s", name)
		}
		if err != nil || q.Sign() < 0 {
			return nil, fmt.Errorf("--system-reserved: %q keeps nothing; give a list such as memory=1Gi,cpu=500m,pid=1000,ephemeral-storage=10Gi", item)
		}
		list[v1.ResourceName(name)] = q
	}
	return list, nil
}

// withDefaults is what is kept from pods of a machine with that capacity.
func withDefaults(reserved, capacity v1.ResourceList) v1.ResourceList {
	memory, pids := capacity[v1.ResourceMemory], capacity[pidlimit.PIDs]
	list := v1.ResourceList{
		v1.ResourceMemory: *resource.NewQuantity(min(reservedMemory, memory.Value()/4), resource.BinarySI),
		pidlimit.PIDs:     *resource.NewQuantity(min(reservedPIDs, pids.Value()/4), resource.DecimalSI),
	}
	maps.Copy(list, reserved)
	return list
}

// keptFree are the signals whose thresholds are no pod's to ask for.
var keptFree = map[evictionapi.Signal]v1.ResourceName{
	evictionapi.SignalMemoryAvailable: v1.ResourceMemory, evictionapi.SignalNodeFsAvailable: v1.ResourceEphemeralStorage,
}

// divide says what of a machine its pods get, by the kubelet's rules (Node
// Allocatable): limit is what all of them together are held to, allocatable
// what the scheduler may promise. Between the two is what eviction keeps free.
// Huge pages are set aside already: they are nobody's memory.
func divide(capacity, reserved v1.ResourceList, thresholds []evictionapi.Threshold) (limit, allocatable v1.ResourceList) {
	less := func(list v1.ResourceList, name v1.ResourceName, q resource.Quantity) {
		rest, ok := list[name]
		if !ok {
			return
		}
		if rest.Sub(q); rest.Sign() < 0 {
			rest = *resource.NewQuantity(0, rest.Format)
		}
		list[name] = rest
	}
	limit = capacity.DeepCopy()
	for name, q := range reserved {
		less(limit, name, q)
	}
	for name, q := range capacity {
		if strings.HasPrefix(string(name), v1.ResourceHugePagesPrefix) {
			less(limit, v1.ResourceMemory, q)
		}
	}
	allocatable = limit.DeepCopy()
	delete(allocatable, pidlimit.PIDs)
	for _, t := range thresholds {
		if name, ok := keptFree[t.Signal]; ok {
			total := capacity[name]
			less(allocatable, name, *evictionapi.GetThresholdQuantity(t.Value, &total))
		}
	}
	return limit, allocatable
}

// resources reads what the machine has and divides it.
func (n *Node) resources() (capacity, limit, allocatable v1.ResourceList, err error) {
	capacity, err = readCapacity(n.DataDir, n.MaxPods)
	if err != nil {
		return nil, nil, nil, err
	}
	limit, allocatable = divide(capacity, n.Reserved, n.Thresholds)
	delete(capacity, pidlimit.PIDs) // a kubelet tells nobody
	return capacity, limit, allocatable, nil
}

// enforce holds all pods together to what the machine gives them, whenever
// that is not yet so. What cannot be now is tried again.
func (n *Node) enforce() {
	_, limit, _, err := n.resources()
	if err != nil || n.Limit == nil || maps.EqualFunc(limit, n.enforced, resource.Quantity.Equal) {
		return
	}
	if err := n.Limit(limit); err != nil {
		n.Log.Warn("cannot limit what all pods together use; trying again", "err", err)
		return
	}
	n.enforced = limit
}
