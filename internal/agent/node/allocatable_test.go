package node

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"

	"tutti.dev/tutti/internal/agent/pressure"
)

// quantities reads "cpu=2 memory=4Gi".
func quantities(text string) v1.ResourceList {
	list := v1.ResourceList{}
	for _, item := range strings.Fields(text) {
		name, value, _ := strings.Cut(item, "=")
		list[v1.ResourceName(name)] = resource.MustParse(value)
	}
	return list
}

func written(list v1.ResourceList) string {
	var items []string
	for name, q := range list {
		items = append(items, fmt.Sprintf("%s=%s", name, q.String()))
	}
	slices.Sort(items)
	return strings.Join(items, " ")
}

func TestDivide(t *testing.T) {
	const machine = "cpu=4 memory=8Gi pid=32768 ephemeral-storage=100Gi pods=250"
	for _, c := range []struct{ name, capacity, reserved, keep, limit, allocatable string }{
		{"told nothing", machine, "", "",
			"cpu=4 ephemeral-storage=100Gi memory=7680Mi pid=31768 pods=250",
			"cpu=4 ephemeral-storage=96636764000 memory=7580Mi pods=250"},
		{"a small machine", "cpu=1 memory=1Gi pid=1000", "", "",
			"cpu=1 memory=768Mi pid=750",
			"cpu=1 memory=668Mi"},
		{"all reserved", machine, "memory=2Gi,cpu=500m,pid=700,ephemeral-storage=20Gi", "nodefs.available<10Gi,memory.available<1Gi",
			"cpu=3500m ephemeral-storage=80Gi memory=6Gi pid=32068 pods=250",
			"cpu=3500m ephemeral-storage=70Gi memory=5Gi pods=250"},
		{"nothing reserved, nothing kept free", machine, "memory=0,pid=0", "none",
			"cpu=4 ephemeral-storage=100Gi memory=8Gi pid=32768 pods=250",
			"cpu=4 ephemeral-storage=100Gi memory=8Gi pods=250"},
		{"huge pages", machine + " hugepages-2Mi=1Gi hugepages-1Gi=0", "memory=1Gi,pid=0", "none",
			"cpu=4 ephemeral-storage=100Gi hugepages-1Gi=0 hugepages-2Mi=1Gi memory=6Gi pid=32768 pods=250",
			"cpu=4 ephemeral-storage=100Gi hugepages-1Gi=0 hugepages-2Mi=1Gi memory=6Gi pods=250"},
		{"more than there is", machine, "memory=9Gi,cpu=5", "none",
			"cpu=0 ephemeral-storage=100Gi memory=0 pid=31768 pods=250",
			"cpu=0 ephemeral-storage=100Gi memory=0 pods=250"},
	} {
		t.Run(c.name, func(t *testing.T) {
			reserved, err := ParseReserved(c.reserved)
			if err != nil {
				t.Fatal(err)
			}
			thresholds, err := pressure.Parse(c.keep)
			if err != nil {
				t.Fatal(err)
			}
			capacity := quantities(c.capacity)
			limit, allocatable := divide(capacity, withDefaults(reserved, capacity), thresholds)
			if got := written(limit); got != c.limit {
				t.Errorf("limit\n got %s\nwant %s", got, c.limit)
			}
			if got := written(allocatable); got != c.allocatable {
				t.Errorf("allocatable\n got %s\nwant %s", got, c.allocatable)
			}
		})
	}
}

func TestParseReserved(t *testing.T) {
	for text, want := range map[string]string{
		"":                           "",
		"memory=1Gi,cpu=500m,pid=20": "cpu=500m memory=1Gi pid=20",
		"ephemeral-storage=1Gi,":     "ephemeral-storage=1Gi",
		"gpu=1":                      `--system-reserved: "gpu=1" keeps nothing; give a list such as memory=1Gi,cpu=500m,pid=1000,ephemeral-storage=10Gi`,
		"memory=much":                `--system-reserved: "memory=much" keeps nothing; give a list such as memory=1Gi,cpu=500m,pid=1000,ephemeral-storage=10Gi`,
		"cpu=-1":                     `--system-reserved: "cpu=-1" keeps nothing; give a list such as memory=1Gi,cpu=500m,pid=1000,ephemeral-storage=10Gi`,
		"memory":                     `--system-reserved: "memory" keeps nothing; give a list such as memory=1Gi,cpu=500m,pid=1000,ephemeral-storage=10Gi`,
	} {
		list, err := ParseReserved(text)
		got := written(list)
		if err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q:\n got %s\nwant %s", text, got, want)
		}
	}
}

// Who reserves all there is has no node: it would take no pod and not say why.
func TestNothingIsLeft(t *testing.T) {
	c := Config{Name: "here", IP: netip.MustParseAddr("192.0.2.1"), Client: fake.NewClientset(), MaxPods: 7, DataDir: t.TempDir(), Reserved: quantities("cpu=100000")}
	_, err := New(c)
	if want := fmt.Sprintf("--system-reserved leaves no cpu to pods; the machine has %d, reserve less", runtime.NumCPU()); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	c.Reserved = quantities("pid=1Gi")
	if _, err := New(c); err == nil || !strings.HasPrefix(err.Error(), "--system-reserved leaves no pid to pods; the machine has ") {
		t.Error(err)
	}
}

// What pods are held to is what the node says, and what cannot be enforced at
// once is tried again.
func TestLimitIsEnforced(t *testing.T) {
	var asked []v1.ResourceList
	fail := errors.New("device or resource busy")
	thresholds, err := pressure.Parse("memory.available<64Mi")
	if err != nil {
		t.Fatal(err)
	}
	n, err := New(Config{Name: "here", IP: netip.MustParseAddr("192.0.2.1"), MaxPods: 7, DataDir: t.TempDir(), Thresholds: thresholds, Log: slog.New(slog.DiscardHandler),
		Limit: func(l v1.ResourceList) error { asked = append(asked, l); return fail }})
	if err != nil {
		t.Fatal(err)
	}
	n.enforce()
	fail = nil
	n.enforce()
	n.enforce()
	if len(asked) != 2 {
		t.Fatalf("it was asked for %d times, want twice", len(asked))
	}
	memory, told := asked[1][v1.ResourceMemory], n.Node().Status.Allocatable[v1.ResourceMemory]
	if memory.Value() != told.Value()+64<<20 {
		t.Errorf("pods are held to %d, allocatable is %d, to be kept free are 64Mi", memory.Value(), told.Value())
	}
	if pids := asked[1][pidlimit.PIDs]; pids.IsZero() {
		t.Error("pods may have all process ids")
	}
	if _, told := n.Node().Status.Capacity[pidlimit.PIDs]; told {
		t.Error("the node tells of process ids")
	}
}
