// Package proxy makes Services reachable on this machine: upstream's nftables
// proxier, fed by informers of its own. It writes the nftables table
// "kube-proxy" of the network namespace of the process, and relays TCP node
// ports on 127.0.0.1; package network sets what the kernel needs to route.
package proxy

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/go-logr/logr"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/proxy/apis"
	kubeproxyconfig "k8s.io/kubernetes/pkg/proxy/apis/config"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"
	"k8s.io/kubernetes/pkg/proxy/healthcheck"
	"k8s.io/kubernetes/pkg/proxy/metrics"
	"k8s.io/kubernetes/pkg/proxy/nftables"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"
	"sigs.k8s.io/knftables"
)

const (
	// gather is how long changes are gathered after a sync before the next.
	// A sync takes about that long, so more would only be waiting.
	gather = 10 * time.Millisecond
	// resync is how often the rules are compared with what they should be, in
	// case someone else has changed them.
	resync = 30 * time.Second
	// masqueradeBit is upstream's default.
	masqueradeBit = 14
)

// Config says for which node Services are proxied.
type Config struct {
	// Client reads Services, EndpointSlices, ServiceCIDRs and the own Node,
	// and writes events: what system:kube-proxy may.
	Client kubernetes.Interface
	// NodeName names the Node whose topology and local endpoints count.
	NodeName string
	// NodeIP is the node's own IPv4 address.
	NodeIP netip.Addr
	// ClusterCIDR is the range of all pods: what comes from elsewhere to a
	// ClusterIP is masqueraded.
	ClusterCIDR netip.Prefix
	Log         *slog.Logger
}

// Proxy keeps the rules for Services.
type Proxy struct {
	cfg   Config
	ready chan struct{}
}

// New returns a Proxy that does nothing until Run.
func New(cfg Config) *Proxy { return &Proxy{cfg: cfg, ready: make(chan struct{})} }

// Ready is closed once the rules for all Services known at the start have
// been written. Should the kernel have refused them, the log says so, and they
// are written again every 30 s.
func (p *Proxy) Ready() <-chan struct{} { return p.ready }

// Supported tells whether this machine can proxy Services, and what to do if
// it cannot.
func Supported() error {
	if _, err := knftables.New(knftables.IPv4Family, "kube-proxy"); err != nil {
		return fmt.Errorf("nftables cannot be used (%w); install version 1.0.1 or later (`apt-get install nftables`)", err)
	}
	return nil
}

// ensureTable makes the table, empty, if it is not there: upstream lists it
// before it makes it, and takes its absence for an error.
func ensureTable(ctx context.Context) error {
	nft, err := knftables.New(knftables.IPv4Family, "kube-proxy")
	if err != nil {
		return err
	}
	tx := nft.NewTransaction()
	tx.Add(&knftables.Table{})
	return nft.Run(ctx, tx)
}

// Run proxies Services until ctx ends. The rules stay when it returns, and so
// do connections: the next Run takes them over. Upstream's loop that writes
// rules cannot be stopped; it idles after Run has returned, so Run is for
// once in a process's life.
func (p *Proxy) Run(ctx context.Context) error {
	// What upstream tells of its daily work is for debugging; errors stay errors.
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(p.cfg.Log.Handler()).V(4))
	if !p.cfg.NodeIP.Is4() || !p.cfg.ClusterCIDR.Addr().Is4() {
		return fmt.Errorf("proxy Services: node address %s and pod range %s must be IPv4", p.cfg.NodeIP, p.cfg.ClusterCIDR)
	}

	broadcaster := events.NewBroadcaster(&events.EventSinkImpl{Interface: p.cfg.Client.EventsV1()})
	defer broadcaster.Shutdown()
	if err := broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		return fmt.Errorf("proxy Services: record events: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := v1.AddToScheme(scheme); err != nil {
		return err
	}
	if err := ensureTable(ctx); err != nil {
		return fmt.Errorf("proxy Services: %w", err)
	}
	metrics.RegisterMetrics(kubeproxyconfig.ProxyModeNFTables)
	node := &ownNode{}
	// The health server is never run: the proxier asks it, nobody else.
	health := healthcheck.NewProxyHealthServer("", 2*resync, node)
	proxier, err := nftables.NewProxier(ctx, v1.IPv4Protocol, resync, gather, false, masqueradeBit,
		proxyutil.NewDetectLocalByCIDR(p.cfg.ClusterCIDR.String()), p.cfg.NodeName, p.cfg.NodeIP.AsSlice(),
		broadcaster.NewRecorder(scheme, "kube-proxy"), health, nil, false)
	if err != nil {
		return fmt.Errorf("proxy Services: %w", err)
	}

	// Handlers must be registered before informers start: what happens in
	// between would be lost. Those of the node and of the ranges come first,
	// because the first rules are written when Services and EndpointSlices
	// are known.
	nodes := p.informers(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, p.cfg.NodeName).String()
	})
	nodeInformer := nodes.Core().V1().Nodes()
	nodeConfig := proxyconfig.NewNodeConfig(ctx, nodeInformer, 0)
	nodeConfig.RegisterEventHandler(node)
	// It hears of a change before the proxier writes it.
	settling := newSettling(func() time.Time { return health.Health().LastUpdated }, proxier.Sync)
	topology := proxyconfig.NewNodeTopologyConfig(ctx, nodeInformer, 0)
	topology.RegisterEventHandler(settling)
	topology.RegisterEventHandler(proxier)

	ranges := p.informers(nil)
	rangeConfig := proxyconfig.NewServiceCIDRConfig(ctx, ranges.Networking().V1().ServiceCIDRs(), 0)
	rangeConfig.RegisterEventHandler(proxier)

	// Headless Services have nothing to proxy, nor have those that carry the
	// name of another proxy.
	services := p.informers(func(o *metav1.ListOptions) {
		o.LabelSelector = "!" + apis.LabelServiceProxyName
		o.FieldSelector = fields.OneTermNotEqualSelector("spec.clusterIP", v1.ClusterIPNone).String()
	})
	serviceConfig := proxyconfig.NewServiceConfig(ctx, services.Core().V1().Services(), 0)
	slices := p.informers(func(o *metav1.ListOptions) { o.LabelSelector = "!" + v1.IsHeadlessService })
	sliceConfig := proxyconfig.NewEndpointSliceConfig(ctx, slices.Discovery().V1().EndpointSlices(), 0)
	local := newLoopback(ctx, p.cfg.NodeIP, p.cfg.Log)
	defer local.close()
	serviceConfig.RegisterEventHandler(settling)
	serviceConfig.RegisterEventHandler(proxier)
	serviceConfig.RegisterEventHandler(local)
	sliceConfig.RegisterEventHandler(settling)
	sliceConfig.RegisterEventHandler(proxier)

	var group sync.WaitGroup
	defer group.Wait()
	first := []informers.SharedInformerFactory{nodes, ranges}
	all := append(first, services, slices)
	for _, f := range all {
		defer f.Shutdown()
	}
	go proxier.SyncLoop()
	for _, f := range all {
		f.StartWithContext(ctx)
	}
	group.Go(func() { settling.run(ctx) })
	group.Go(func() { nodeConfig.Run(ctx.Done()) })
	group.Go(func() { rangeConfig.Run(ctx.Done()) })
	for _, f := range first {
		f.WaitForCacheSync(ctx.Done())
	}
	// These return after they have told the proxier, which writes rules on
	// being told: when both have, everything is in place.
	var synced sync.WaitGroup
	synced.Go(func() { serviceConfig.Run(ctx.Done()) })
	synced.Go(func() { sliceConfig.Run(ctx.Done()) })
	synced.Wait()
	if ctx.Err() == nil {
		close(p.ready)
		p.cfg.Log.Info("Services are proxied", "node", p.cfg.NodeName)
	}
	<-ctx.Done()
	return nil
}

// informers returns a factory without resyncs, whose objects are stripped of
// what only other clients need.
func (p *Proxy) informers(tweak func(*metav1.ListOptions)) informers.SharedInformerFactory {
	options := []informers.SharedInformerOption{informers.WithTransform(strip)}
	if tweak != nil {
		options = append(options, informers.WithTweakListOptions(tweak))
	}
	return informers.NewSharedInformerFactoryWithOptions(p.cfg.Client, 0, options...)
}

var strip cache.TransformFunc = func(obj any) (any, error) {
	if o, err := meta.Accessor(obj); err == nil {
		o.SetManagedFields(nil)
	}
	return obj, nil
}

// ownNode remembers the node's object for health checks of load balancers.
type ownNode struct {
	mu   sync.Mutex
	node *v1.Node
}

var _ proxyconfig.NodeHandler = (*ownNode)(nil)

func (o *ownNode) Node() *v1.Node {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.node
}

func (o *ownNode) OnNodeChange(n *v1.Node) { o.set(n) }
func (o *ownNode) OnNodeDelete(*v1.Node)   { o.set(nil) }
func (o *ownNode) OnNodeSynced()           {}

func (o *ownNode) set(n *v1.Node) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.node = n
}
