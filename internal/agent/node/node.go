// Package node tells the API of this machine: it registers the Node, keeps
// its status and its lease, and brings the range of pod addresses that the
// control plane gives it to the network.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sort"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/util/version"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-base/featuregate"
	"k8s.io/component-helpers/apimachinery/lease"
	"k8s.io/component-helpers/nodedeclaredfeatures"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/inplacepodresize"
	"k8s.io/component-helpers/nodedeclaredfeatures/features/restartallcontainers"
	_ "k8s.io/kubernetes/pkg/features" // registers the gates
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	"k8s.io/kubernetes/pkg/kubelet/stats/pidlimit"
	volumeutil "k8s.io/kubernetes/pkg/volume/util"
	"k8s.io/utils/clock"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/image"
)

// KubernetesVersion is the version of Kubernetes whose node this is.
const KubernetesVersion = "v1.36.3"

const (
	leaseSeconds  = 40
	leaseInterval = 10 * time.Second
	// reportInterval is how often the status is told though nothing changed,
	// checkInterval how often it is looked at whether something did.
	reportInterval = 5 * time.Minute
	checkInterval  = 10 * time.Second
	// startTime is how long the node of an earlier run is left as it was
	// before it is told that this one is not ready yet.
	startTime  = 30 * time.Second
	retryFirst = 50 * time.Millisecond
	retryMost  = 5 * time.Second
	mostImages = 50
)

// Config says what a Node tells and whom it asks.
type Config struct {
	Name, Hostname string
	IP             netip.Addr
	Client         kubernetes.Interface // identity of the node
	Version        string               // of tutti
	MaxPods, Port  int
	DataDir        string
	Handlers       []string // of RuntimeClasses; "" is the default
	// Reserved is kept from pods for the machine itself, Thresholds are what
	// eviction keeps free besides.
	Reserved   v1.ResourceList
	Thresholds []evictionapi.Threshold
	// Limit holds all pods together to so much, process ids included; nil holds
	// them to nothing. It is tried again after an error.
	Limit func(v1.ResourceList) error
	// UserNamespaces says whether pods of a handler can have one.
	UserNamespaces func(handler string) bool
	Images         func(context.Context) ([]image.Image, error)
	// Pressure says whether the machine has the condition MemoryPressure,
	// DiskPressure or PIDPressure; nil is never.
	Pressure func(v1.NodeConditionType) bool
	// SetRange takes the range that pods here get their addresses from.
	SetRange func(context.Context, netip.Prefix) error
	// InUse are the volumes that must not be detached, if that is known; Told
	// takes those that the API knows of. Both may be nil.
	InUse func() ([]v1.UniqueVolumeName, bool)
	Told  func([]v1.UniqueVolumeName)
	Log   *slog.Logger
}

// Node is this machine in the API.
type Node struct {
	Config
	changed chan struct{} // wakes the reporter
	ready   chan struct{} // closed when Ready is told
	ranged  chan struct{} // closed when pods can get addresses
	onReady sync.Once
	own     metav1.ObjectMeta // what a new Node has, before others label it
	mu      sync.Mutex
	node    *v1.Node // last seen in the API, or what would be registered
	running bool     // pods are being run
	fault   string   // why the network does not work
	told    time.Time

	enforced v1.ResourceList // of the reporter
}

// New reads what the machine is; it talks to nobody before Run.
func New(c Config) (*Node, error) {
	n := &Node{Config: c, changed: make(chan struct{}, 1), ready: make(chan struct{}), ranged: make(chan struct{})}
	total, err := readCapacity(c.DataDir, c.MaxPods)
	if err != nil {
		return nil, err
	}
	n.Reserved = withDefaults(c.Reserved, total)
	limit, allocatable := divide(total, n.Reserved, c.Thresholds)
	for _, left := range []v1.ResourceList{limit, allocatable} {
		for name := range c.Reserved {
			if q, ok := left[name]; ok && q.IsZero() {
				return nil, fmt.Errorf("--system-reserved leaves no %s to pods; the machine has %s, reserve less", name, ptr.To(total[name]).String())
			}
		}
	}
	delete(total, pidlimit.PIDs)
	info := systemInfo(c.Version)
	n.own = metav1.ObjectMeta{
		Name: c.Name,
		Labels: map[string]string{
			v1.LabelHostname:   c.Hostname,
			v1.LabelOSStable:   info.OperatingSystem,
			v1.LabelArchStable: info.Architecture,
		},
		// Volumes are attached by the controller, not from here.
		Annotations: map[string]string{volumeutil.ControllerManagedAttachAnnotation: "true"},
	}
	n.node = &v1.Node{ObjectMeta: n.own, Status: v1.NodeStatus{Capacity: total, Allocatable: allocatable, NodeInfo: info}}
	return n, nil
}

// Node is the Node as the API has it, or as it would be registered. It must
// not be changed.
func (n *Node) Node() *v1.Node {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.node
}

// Ready is closed once the API has been told that the node is ready.
func (n *Node) Ready() <-chan struct{} { return n.ready }

// SetRunning says that pods are being run from now on.
func (n *Node) SetRunning() {
	n.mu.Lock()
	n.running = true
	n.mu.Unlock()
	n.Report()
}

// Report has the status looked at again.
func (n *Node) Report() {
	select {
	case n.changed <- struct{}{}:
	default:
	}
}

// WaitRange returns when pods can get addresses.
func (n *Node) WaitRange(ctx context.Context) error {
	select {
	case <-n.ranged:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run registers the node and keeps it told of until ctx ends.
func (n *Node) Run(ctx context.Context) error {
	n.register(ctx)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.watch(ctx) })
	g.Go(func() error { n.report(ctx); return nil })
	g.Go(func() error {
		lease.NewController(clock.RealClock{}, n.Client, n.Name, leaseSeconds, nil, leaseInterval, n.Name, v1.NamespaceNodeLease,
			func(l *coordinationv1.Lease) error {
				l.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.Node().UID}}
				return nil
			}).Run(ctx)
		return nil
	})
	return g.Wait()
}

// register makes the Node in the API, or finds the one that is there and
// brings its labels up to date. It tries until ctx ends.
func (n *Node) register(ctx context.Context) {
	nodes := n.Client.CoreV1().Nodes()
	want := n.Node().DeepCopy()
	want.ObjectMeta = *n.own.DeepCopy()
	for delay := retryFirst; ; delay = min(2*delay, retryMost) {
		n.fill(ctx, &want.Status)
		got, err := nodes.Create(ctx, want, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			got, err = n.relabel(ctx, want)
		}
		if err == nil {
			n.see(ctx, got)
			return
		}
		if ctx.Err() != nil {
			return
		}
		n.Log.Warn("cannot register the node; trying again", "node", n.Name, "err", err)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
	}
}

func (n *Node) relabel(ctx context.Context, want *v1.Node) (*v1.Node, error) {
	got, err := n.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
	if err != nil {
		return nil, fmt.Errorf("get node %s: %w", n.Name, err)
	}
	missing := func(want, got map[string]string) map[string]string {
		m := map[string]string{}
		for k, v := range want {
			if got[k] != v {
				m[k] = v
			}
		}
		return m
	}
	labels, annotations := missing(want.Labels, got.Labels), missing(want.Annotations, got.Annotations)
	if len(labels)+len(annotations) == 0 {
		return got, nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"labels": labels, "annotations": annotations}})
	if err != nil {
		return nil, fmt.Errorf("write labels of node %s: %w", n.Name, err)
	}
	got, err = n.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		return nil, fmt.Errorf("label node %s: %w", n.Name, err)
	}
	return got, nil
}

// watch follows the Node: others give it its range of addresses, labels and
// taints; one that is deleted is made again.
func (n *Node) watch(ctx context.Context) error {
	factory := informers.NewSharedInformerFactoryWithOptions(n.Client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", n.Name).String()
	}))
	informer := factory.Core().V1().Nodes().Informer()
	see := func(o any) {
		if node, ok := o.(*v1.Node); ok && node.Name == n.Name {
			n.see(ctx, node)
		}
	}
	again := func() {
		n.register(ctx)
		n.Report()
	}
	_, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    see,
		UpdateFunc: func(_, o any) { see(o) },
		DeleteFunc: func(any) { again() },
	})
	if err != nil {
		return fmt.Errorf("watch node %s: %w", n.Name, err)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { informer.RunWithContext(ctx); return nil })
	g.Go(func() error {
		// What was deleted before the first list is not told of as deleted.
		if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) && len(informer.GetStore().ListKeys()) == 0 {
			again()
		}
		return nil
	})
	return g.Wait()
}

// see takes the Node as the API has it.
func (n *Node) see(ctx context.Context, node *v1.Node) {
	n.mu.Lock()
	n.node = node
	n.mu.Unlock()
	cidrs := node.Spec.PodCIDRs
	if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
		cidrs = []string{node.Spec.PodCIDR}
	}
	if len(cidrs) == 0 {
		return
	}
	fault := ""
	prefix, err := netip.ParsePrefix(cidrs[0])
	if err == nil {
		err = n.SetRange(ctx, prefix)
	}
	if err != nil {
		fault = fmt.Sprintf("cannot use the range of pod addresses %s: %v", cidrs[0], err)
		n.Log.Error("cannot set the range of pod addresses", "range", cidrs[0], "err", err)
	}
	n.mu.Lock()
	changed := n.fault != fault
	n.fault = fault
	select {
	case <-n.ranged:
	default:
		if fault == "" {
			close(n.ranged)
			changed = true
		}
	}
	n.mu.Unlock()
	if changed {
		n.Report()
	}
}

// settled says that nothing is missing any more for the node to be ready.
func (n *Node) settled() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	select {
	case <-n.ranged:
		return n.running
	default:
		return false
	}
}

// report tells the status whenever it changes, and now and then.
func (n *Node) report(ctx context.Context) {
	delay := checkInterval
	for start := time.After(startTime); !n.settled(); {
		select {
		case <-n.changed:
			continue
		case <-start:
		case <-ctx.Done():
			return
		}
		break
	}
	for {
		n.enforce()
		if err := n.tell(ctx); err != nil && ctx.Err() == nil {
			n.Log.Warn("cannot write node status", "node", n.Name, "err", err)
			delay = retryFirst
		}
		select {
		case <-n.changed:
		case <-time.After(delay):
		case <-ctx.Done():
			return
		}
		delay = min(2*delay, checkInterval)
	}
}

// tell patches the status if it changed or has not been told for long.
func (n *Node) tell(ctx context.Context) error {
	was := n.Node()
	now := was.DeepCopy()
	n.fill(ctx, &now.Status)
	n.mu.Lock()
	due := time.Since(n.told) >= reportInterval
	n.mu.Unlock()
	if !due && same(&was.Status, &now.Status) {
		n.tellInUse(was)
		return nil
	}
	patch, err := statusPatch(was, now)
	if err != nil {
		return err
	}
	got, err := n.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("patch status of node %s: %w", n.Name, err)
	}
	n.mu.Lock()
	n.node, n.told = got, time.Now()
	n.mu.Unlock()
	n.tellInUse(got)
	for _, c := range got.Status.Conditions {
		if c.Type == v1.NodeReady && c.Status == v1.ConditionTrue {
			n.onReady.Do(func() { close(n.ready) })
		}
	}
	return nil
}

// tellInUse says which volumes the API knows to be in use.
func (n *Node) tellInUse(node *v1.Node) {
	if n.Told != nil {
		n.Told(node.Status.VolumesInUse)
	}
}

// statusPatch is what changes the one status into the other. Addresses are
// replaced as a whole: merging them by type would keep old ones.
func statusPatch(was, now *v1.Node) ([]byte, error) {
	a, errA := json.Marshal(v1.Node{Status: was.Status})
	b, errB := json.Marshal(v1.Node{Status: now.Status})
	if err := errors.Join(errA, errB); err != nil {
		return nil, fmt.Errorf("write node status: %w", err)
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(a, b, v1.Node{})
	if err != nil {
		return nil, fmt.Errorf("compare node status: %w", err)
	}
	if equality.Semantic.DeepEqual(was.Status.Addresses, now.Status.Addresses) {
		return patch, nil
	}
	var m map[string]any
	if err := json.Unmarshal(patch, &m); err != nil {
		return nil, fmt.Errorf("read node status patch: %w", err)
	}
	status, _ := m["status"].(map[string]any)
	list := []any{map[string]any{"$patch": "replace"}}
	for _, a := range now.Status.Addresses {
		list = append(list, map[string]any{"type": a.Type, "address": a.Address})
	}
	status["addresses"] = list
	return json.Marshal(m)
}

// same says whether two statuses differ in nothing but their heart-beat.
func same(a, b *v1.NodeStatus) bool {
	a, b = a.DeepCopy(), b.DeepCopy()
	for _, s := range []*v1.NodeStatus{a, b} {
		for i := range s.Conditions {
			s.Conditions[i].LastHeartbeatTime = metav1.Time{}
		}
	}
	return equality.Semantic.DeepEqual(a, b)
}

// fill sets what the node says of itself and leaves what others do.
func (n *Node) fill(ctx context.Context, s *v1.NodeStatus) {
	if total, _, allocatable, err := n.resources(); err == nil {
		if s.Capacity == nil {
			s.Capacity, s.Allocatable = v1.ResourceList{}, v1.ResourceList{}
		}
		for name, q := range total {
			s.Capacity[name] = q
		}
		for name, q := range allocatable {
			s.Allocatable[name] = q
		}
	}
	s.NodeInfo = systemInfo(n.Version)
	s.Addresses = []v1.NodeAddress{
		{Type: v1.NodeInternalIP, Address: n.IP.String()},
		{Type: v1.NodeHostName, Address: n.Hostname},
	}
	s.DaemonEndpoints = v1.NodeDaemonEndpoints{KubeletEndpoint: v1.DaemonEndpoint{Port: int32(n.Port)}}
	s.DeclaredFeatures = declaredFeatures()
	s.Features = &v1.NodeFeatures{SupplementalGroupsPolicy: new(true)}
	s.RuntimeHandlers = n.handlers()
	s.Images = n.images(ctx)
	if n.InUse != nil {
		if used, ok := n.InUse(); ok {
			s.VolumesInUse = used
		}
	}
	n.conditions(s)
}

// gates are this program's, in the words of the borrowed code.
type gates struct{ featuregate.FeatureGate }

func (g gates) Enabled(name string) bool { return g.FeatureGate.Enabled(featuregate.Feature(name)) }

// declaredFeatures are what pods may ask only of nodes that say they know it.
func declaredFeatures() []string {
	return nodedeclaredfeatures.New([]nodedeclaredfeatures.Feature{
		restartallcontainers.Feature, inplacepodresize.PodLevelResourcesResizeFeature, inplacepodresize.NonSidecarInitContainerResizeFeature,
	}).DiscoverNodeFeatures(&nodedeclaredfeatures.NodeConfiguration{
		FeatureGates: gates{utilfeature.DefaultFeatureGate}, Version: version.MustParseSemantic(KubernetesVersion),
	})
}

func (n *Node) handlers() []v1.NodeRuntimeHandler {
	yes := true
	var list []v1.NodeRuntimeHandler
	for _, name := range n.Handlers {
		users := n.UserNamespaces != nil && n.UserNamespaces(name)
		list = append(list, v1.NodeRuntimeHandler{Name: name, Features: &v1.NodeRuntimeHandlerFeatures{RecursiveReadOnlyMounts: &yes, UserNamespaces: &users}})
	}
	sort.Slice(list, func(i, j int) bool { return list[i].Name < list[j].Name })
	return list
}

// images are the largest images, which the scheduler prefers nodes for.
func (n *Node) images(ctx context.Context) []v1.ContainerImage {
	list, err := n.Images(ctx)
	if err != nil {
		n.Log.Warn("cannot list images", "err", err)
		return n.Node().Status.Images
	}
	sort.Slice(list, func(i, j int) bool {
		if list[i].Size != list[j].Size {
			return list[i].Size > list[j].Size
		}
		return list[i].Name < list[j].Name
	})
	var out []v1.ContainerImage
	at := map[string]int{}
	for _, img := range list {
		if i, ok := at[img.ID]; ok {
			out[i].Names = append(out[i].Names, img.Name)
			continue
		}
		if len(out) == mostImages {
			break
		}
		at[img.ID] = len(out)
		out = append(out, v1.ContainerImage{Names: []string{img.Name}, SizeBytes: img.Size})
	}
	return out
}

func (n *Node) conditions(s *v1.NodeStatus) {
	now := metav1.Now()
	set := func(kind v1.NodeConditionType, is bool, reason, message string) {
		c := v1.NodeCondition{Type: kind, Status: v1.ConditionFalse, Reason: reason, Message: message, LastHeartbeatTime: now, LastTransitionTime: now}
		if is {
			c.Status = v1.ConditionTrue
		}
		i := slices.IndexFunc(s.Conditions, func(c v1.NodeCondition) bool { return c.Type == kind })
		if i < 0 {
			s.Conditions = append(s.Conditions, c)
			return
		}
		if s.Conditions[i].Status == c.Status {
			c.LastTransitionTime = s.Conditions[i].LastTransitionTime
		}
		s.Conditions[i] = c
	}
	for _, p := range []struct {
		short   v1.NodeCondition
		healthy v1.NodeCondition
	}{
		{
			v1.NodeCondition{Type: v1.NodeMemoryPressure, Reason: "KubeletHasInsufficientMemory", Message: "the machine is short of memory; stop what needs most, or lower --eviction-hard"},
			v1.NodeCondition{Reason: "KubeletHasSufficientMemory", Message: "the machine has enough memory"},
		},
		{
			v1.NodeCondition{Type: v1.NodeDiskPressure, Reason: "KubeletHasDiskPressure", Message: "the disk of the data directory is nearly full; make room, or lower --eviction-hard"},
			v1.NodeCondition{Reason: "KubeletHasNoDiskPressure", Message: "the disk has enough room"},
		},
		{
			v1.NodeCondition{Type: v1.NodePIDPressure, Reason: "KubeletHasInsufficientPID", Message: "the machine is short of process ids; stop what has most processes, or lower --eviction-hard"},
			v1.NodeCondition{Reason: "KubeletHasSufficientPID", Message: "the machine has enough process ids"},
		},
	} {
		if n.Pressure != nil && n.Pressure(p.short.Type) {
			set(p.short.Type, true, p.short.Reason, p.short.Message)
			continue
		}
		set(p.short.Type, false, p.healthy.Reason, p.healthy.Message)
	}
	n.mu.Lock()
	running, fault := n.running, n.fault
	n.mu.Unlock()
	select {
	case <-n.ranged:
	default:
		if fault == "" {
			fault = "waiting for the control plane to give this node a range of pod addresses"
		}
	}
	switch {
	case fault != "":
		set(v1.NodeReady, false, "KubeletNotReady", fault)
	case !running:
		set(v1.NodeReady, false, "KubeletNotReady", "finding out what runs on this machine")
	default:
		set(v1.NodeReady, true, "KubeletReady", "tutti runs pods")
	}
}
