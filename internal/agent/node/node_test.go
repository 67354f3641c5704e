package node

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"tutti.dev/tutti/internal/image"
)

const wait = 20 * time.Second

type bench struct {
	*testing.T
	client *fake.Clientset
	// watching is closed when the node watches itself: the fake API tells a
	// watch nothing of what came between it and the list.
	watching chan struct{}

	mu     sync.Mutex
	ranges []string
	fail   error
}

func (b *bench) start() (*Node, func()) {
	b.Helper()
	n, err := New(Config{
		Name: "here", Hostname: "here.example", IP: netip.MustParseAddr("192.0.2.1"), Client: b.client, Version: "1.0",
		MaxPods: 7, Port: 10250, DataDir: b.TempDir(), Handlers: []string{"container", ""},
		Images: func(context.Context) ([]image.Image, error) {
			return []image.Image{{Name: "a:1", ID: "x", Size: 5}, {Name: "a:2", ID: "x", Size: 5}, {Name: "b:1", ID: "y", Size: 9}}, nil
		},
		SetRange: func(_ context.Context, p netip.Prefix) error {
			b.mu.Lock()
			defer b.mu.Unlock()
			if b.fail == nil {
				b.ranges = append(b.ranges, p.String())
			}
			return b.fail
		},
		Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		b.Fatal(err)
	}
	watching := make(chan struct{})
	begin := sync.OnceFunc(func() { close(watching) })
	b.watching = watching
	b.client.PrependWatchReactor("nodes", func(a clienttesting.Action) (bool, watch.Interface, error) {
		w, err := b.client.Tracker().Watch(a.GetResource(), a.GetNamespace())
		begin()
		return true, w, err
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				b.Error(err)
			}
		case <-time.After(wait):
			b.Error("node does not end")
		}
	})
	b.Cleanup(stop)
	return n, stop
}

func (b *bench) node() *v1.Node {
	n, err := b.client.CoreV1().Nodes().Get(context.Background(), "here", metav1.GetOptions{})
	if err != nil {
		return nil
	}
	return n
}

func (b *bench) until(what string, f func() bool) {
	b.Helper()
	for end := time.Now().Add(wait); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			b.Fatalf("timed out waiting until %s; node: %+v", what, b.node())
		}
	}
}

func (b *bench) give(cidr string) {
	b.Helper()
	select {
	case <-b.watching:
	case <-time.After(wait):
		b.Fatal("node does not watch itself")
	}
	b.until("node is registered", func() bool { return b.node() != nil })
	n := b.node()
	n.Spec.PodCIDR, n.Spec.PodCIDRs = cidr, []string{cidr}
	if _, err := b.client.CoreV1().Nodes().Update(context.Background(), n, metav1.UpdateOptions{}); err != nil {
		b.Fatal(err)
	}
}

func ready(n *v1.Node) (v1.ConditionStatus, string) {
	for _, c := range n.Status.Conditions {
		if c.Type == v1.NodeReady {
			return c.Status, c.Message
		}
	}
	return "", ""
}

func TestNodeBecomesReady(t *testing.T) {
	b := &bench{T: t, client: fake.NewClientset()}
	n, _ := b.start()
	b.until("node is registered", func() bool { return b.node() != nil })
	if s, _ := ready(b.node()); s != v1.ConditionFalse {
		t.Errorf("ready is %q before anything runs", s)
	}
	b.give("10.42.3.0/24")
	n.SetRunning()
	select {
	case <-n.Ready():
	case <-time.After(wait):
		t.Fatal("does not become ready")
	}
	got := b.node()
	if s, _ := ready(got); s != v1.ConditionTrue {
		t.Errorf("ready is %q", s)
	}
	if got.Labels[v1.LabelHostname] != "here.example" || got.Labels[v1.LabelOSStable] != "linux" {
		t.Errorf("labels: %v", got.Labels)
	}
	s := got.Status
	pods, memory, allocatable := s.Capacity[v1.ResourcePods], s.Capacity[v1.ResourceMemory], s.Allocatable[v1.ResourceMemory]
	if pods.Value() != 7 || memory.Value() == 0 || allocatable.Cmp(memory) >= 0 {
		t.Errorf("capacity %v, allocatable %v", s.Capacity, s.Allocatable)
	}
	if len(s.Images) != 2 || s.Images[0].SizeBytes != 9 || len(s.Images[1].Names) != 2 {
		t.Errorf("images: %v", s.Images)
	}
	if len(s.RuntimeHandlers) != 2 || s.DaemonEndpoints.KubeletEndpoint.Port != 10250 || len(s.Addresses) != 2 || s.Addresses[0].Address != "192.0.2.1" {
		t.Errorf("status: %+v", s)
	}
	if s.Features == nil || !slices.Equal(s.DeclaredFeatures, []string{"InPlacePodLevelResourcesVerticalScaling", "InPlacePodVerticalScalingInitContainers", "RestartAllContainersOnContainerExits"}) {
		t.Errorf("features %v, declared %v", s.Features, s.DeclaredFeatures)
	}
	if i := s.NodeInfo; i.KubeletVersion != KubernetesVersion+"+tutti.1.0" || i.ContainerRuntimeVersion != "tutti://1.0" || i.BootID == "" || i.KernelVersion == "" {
		t.Errorf("info: %+v", i)
	}
	b.mu.Lock()
	if len(b.ranges) == 0 || b.ranges[0] != "10.42.3.0/24" {
		t.Errorf("ranges: %v", b.ranges)
	}
	b.mu.Unlock()
	b.until("the lease is held", func() bool {
		l, err := b.client.CoordinationV1().Leases(v1.NamespaceNodeLease).Get(context.Background(), "here", metav1.GetOptions{})
		return err == nil && *l.Spec.HolderIdentity == "here" && *l.Spec.LeaseDurationSeconds == 40 && len(l.OwnerReferences) == 1
	})
}

// A restart must not make a ready node look unready: its pods would be
// taken for lost.
func TestNodeStaysReadyOverARestart(t *testing.T) {
	b := &bench{T: t, client: fake.NewClientset()}
	n, stop := b.start()
	b.give("10.42.3.0/24")
	n.SetRunning()
	<-n.Ready()
	stop()
	n, _ = b.start()
	if err := n.WaitRange(context.Background()); err != nil {
		t.Fatal(err)
	}
	if s, _ := ready(b.node()); s != v1.ConditionTrue {
		t.Errorf("ready is %q while the agent starts", s)
	}
	n.SetRunning()
	select {
	case <-n.Ready():
	case <-time.After(wait):
		t.Fatal("does not become ready again")
	}
}

func TestNodeSaysWhyItIsNotReady(t *testing.T) {
	b := &bench{T: t, client: fake.NewClientset()}
	n, _ := b.start()
	b.give("10.42.3.0/24")
	n.SetRunning()
	<-n.Ready()
	b.mu.Lock()
	b.fail = errors.New("no bridge")
	b.mu.Unlock()
	b.give("10.42.4.0/24")
	b.until("the fault shows", func() bool {
		s, message := ready(b.node())
		return s == v1.ConditionFalse && message == "cannot use the range of pod addresses 10.42.4.0/24: no bridge"
	})
	b.mu.Lock()
	b.fail = nil
	b.mu.Unlock()
	b.give("10.42.3.0/24")
	b.until("node is ready again", func() bool { s, _ := ready(b.node()); return s == v1.ConditionTrue })
}

// A node that is deleted comes back as it first came: with its own labels
// only, since it may not give itself what others gave it.
func TestNodeComesBackWhenDeleted(t *testing.T) {
	b := &bench{T: t, client: fake.NewClientset()}
	n, _ := b.start()
	b.give("10.42.3.0/24")
	n.SetRunning()
	<-n.Ready()
	labelled := b.node()
	labelled.Labels["node-restriction.kubernetes.io/zone"] = "a"
	if _, err := b.client.CoreV1().Nodes().Update(t.Context(), labelled, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("label is seen", func() bool { return n.Node().Labels["node-restriction.kubernetes.io/zone"] == "a" })
	if err := b.client.CoreV1().Nodes().Delete(t.Context(), "here", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("node is registered again", func() bool { return b.node() != nil })
	if labels := b.node().Labels; labels[v1.LabelHostname] != "here.example" || labels["node-restriction.kubernetes.io/zone"] != "" {
		t.Errorf("labels: %v", labels)
	}
}

// Nobody tells of a deletion that came before the first list.
func TestNodeComesBackWhenDeletedAtOnce(t *testing.T) {
	b := &bench{T: t, client: fake.NewClientset()}
	remove := sync.OnceValue(func() error {
		return b.client.Tracker().Delete(v1.SchemeGroupVersion.WithResource("nodes"), "", "here")
	})
	b.client.PrependReactor("list", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
		return false, nil, remove()
	})
	n, _ := b.start()
	b.give("10.42.3.0/24")
	n.SetRunning()
	select {
	case <-n.Ready():
	case <-time.After(wait):
		t.Fatal("does not become ready")
	}
}

func TestPressure(t *testing.T) {
	for kind, want := range map[v1.NodeConditionType]string{
		v1.NodeMemoryPressure: "KubeletHasInsufficientMemory: the machine is short of memory; stop what needs most, or lower --eviction-hard",
		v1.NodeDiskPressure:   "KubeletHasDiskPressure: the disk of the data directory is nearly full; make room, or lower --eviction-hard",
		v1.NodePIDPressure:    "KubeletHasInsufficientPID: the machine is short of process ids; stop what has most processes, or lower --eviction-hard",
	} {
		n := &Node{Config: Config{Pressure: func(k v1.NodeConditionType) bool { return k == kind }}}
		var s v1.NodeStatus
		n.conditions(&s)
		for _, c := range s.Conditions {
			switch {
			case c.Type == v1.NodeReady:
			case c.Type != kind && c.Status != v1.ConditionFalse:
				t.Errorf("%s: %s is %s", kind, c.Type, c.Status)
			case c.Type == kind && (c.Status != v1.ConditionTrue || c.Reason+": "+c.Message != want):
				t.Errorf("%s is %s: %s: %s", kind, c.Status, c.Reason, c.Message)
			}
		}
	}
}
