package controlplane

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// loadBalancers gives Services of type LoadBalancer the addresses of the nodes: whoever asks a node for such a port is
// led to the Service's pods by the proxy, which loses no request when pods come and go. A port has one Service; a second
// one that wants it, or one that wants what a program of the machine listens on, is told so by the condition
// LoadBalancerPortsError and gets no address. Services of a class are another's business.
type loadBalancers struct {
	client   kubernetes.Interface
	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	taken    func(corev1.Protocol, int32) bool
	changed  chan struct{} // holds one token if something changed
}

func (b *loadBalancers) wake() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// againPeriod is how long after a Service was refused its ports, or a status
// was not written, that is tried again.
const againPeriod = 5 * time.Second

// portTaken is the reason of LoadBalancerPortsError.
const portTaken = "PortTaken"

func newLoadBalancers(cc kcm.ControllerContext, taken func(corev1.Protocol, int32) bool) (kcm.Controller, error) {
	// Upstream's name, for which upstream's own role is made.
	client, err := cc.ClientBuilder.Client("service-controller")
	if err != nil {
		return nil, fmt.Errorf("make the load balancers' client: %w", err)
	}
	services, nodes := cc.InformerFactory.Core().V1().Services(), cc.InformerFactory.Core().V1().Nodes()
	b := &loadBalancers{client, services.Lister(), nodes.Lister(), taken, make(chan struct{}, 1)}
	relevant := func(o any) bool {
		s, ok := o.(*corev1.Service)
		return !ok || s.Spec.Type == corev1.ServiceTypeLoadBalancer || len(s.Status.LoadBalancer.Ingress) > 0
	}
	for _, informer := range []cache.SharedIndexInformer{services.Informer(), nodes.Informer()} {
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(o any) {
				if relevant(o) {
					b.wake()
				}
			},
			UpdateFunc: func(before, now any) {
				if node, ok := now.(*corev1.Node); ok && equality.Semantic.DeepEqual(node.Status.Addresses, before.(*corev1.Node).Status.Addresses) {
					return // a heartbeat
				}
				if relevant(before) || relevant(now) {
					b.wake()
				}
			},
			DeleteFunc: func(any) { b.wake() },
		}); err != nil {
			return nil, fmt.Errorf("watch Services and nodes: %w", err)
		}
	}
	return b, nil
}

// Name implements [kcm.Controller].
func (*loadBalancers) Name() string { return "node-load-balancers" }

// Run implements [kcm.Controller].
func (b *loadBalancers) Run(ctx context.Context) {
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-b.changed:
		case <-again:
		}
		refused, err := b.sync(ctx)
		if err != nil && ctx.Err() == nil {
			klog.FromContext(ctx).Error(err, "Services of type LoadBalancer have no addresses yet")
		}
		again = nil
		if refused || err != nil {
			again = time.After(againPeriod) // nobody tells when a program stops to listen
		}
	}
}

// sync writes the statuses that are not as they shall be, and says whether a
// Service was refused its ports.
func (b *loadBalancers) sync(ctx context.Context) (refused bool, err error) {
	services, err := b.services.List(labels.Everything())
	if err != nil {
		return false, err
	}
	nodes, err := b.nodes.List(labels.Everything())
	if err != nil {
		return false, err
	}
	for s, status := range assign(services, addressesOf(nodes), b.taken) {
		refused = refused || meta.IsStatusConditionTrue(status.Conditions, corev1.LoadBalancerPortsError)
		if equality.Semantic.DeepEqual(s.Status, status) {
			continue
		}
		now := s.DeepCopy()
		now.Status = status
		if _, err := b.client.CoreV1().Services(s.Namespace).UpdateStatus(ctx, now, metav1.UpdateOptions{}); err != nil {
			return refused, fmt.Errorf("give Service %s/%s its addresses: %w", s.Namespace, s.Name, err)
		}
	}
	return refused, nil
}

// addressesOf are those that all nodes are reached by, and their own loopback.
func addressesOf(nodes []*corev1.Node) []string {
	list := []string{"127.0.0.1"}
	for _, n := range nodes {
		for _, a := range n.Status.Addresses {
			if ip, err := netip.ParseAddr(a.Address); err == nil && ip.Is4() && (a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP) {
				list = append(list, a.Address)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// listener is one port of one address of the nodes.
type listener struct {
	address  string
	protocol corev1.Protocol
	port     int32
}

// assign says what the status of each Service shall be that has or had to do with addresses. Who has a port keeps it; else
// the older Service gets it.
func assign(services []*corev1.Service, addresses []string, taken func(corev1.Protocol, int32) bool) map[*corev1.Service]corev1.ServiceStatus {
	sorted := slices.Clone(services)
	slices.SortFunc(sorted, func(a, b *corev1.Service) int {
		if had, has := len(a.Status.LoadBalancer.Ingress) > 0, len(b.Status.LoadBalancer.Ingress) > 0; had != has {
			if had {
				return -1
			}
			return 1
		}
		if c := a.CreationTimestamp.Compare(b.CreationTimestamp.Time); c != 0 {
			return c
		}
		return strings.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name)
	})
	owners := map[listener]types.NamespacedName{}
	statuses := map[*corev1.Service]corev1.ServiceStatus{}
	for _, s := range sorted {
		if s.Spec.LoadBalancerClass != nil || s.Spec.Type != corev1.ServiceTypeLoadBalancer {
			continue // upstream's API server clears what it had
		}
		status := *s.Status.DeepCopy()
		want := addresses
		if ip := s.Annotations[api.AnnotationHostIP]; ip != "" {
			want = []string{ip}
		}
		problem := conflict(s, want, addresses, owners, taken)
		if s.DeletionTimestamp != nil {
			want = nil
		}
		status.LoadBalancer = corev1.LoadBalancerStatus{}
		condition := metav1.Condition{Type: corev1.LoadBalancerPortsError, Status: metav1.ConditionTrue, Reason: portTaken, Message: problem, ObservedGeneration: s.Generation}
		if problem != "" {
			meta.SetStatusCondition(&status.Conditions, condition)
			statuses[s] = status
			continue
		}
		meta.RemoveStatusCondition(&status.Conditions, corev1.LoadBalancerPortsError)
		for _, ip := range want {
			status.LoadBalancer.Ingress = append(status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: ip, IPMode: ptr.To(corev1.LoadBalancerIPModeVIP)})
			for _, p := range s.Spec.Ports {
				owners[listener{ip, p.Protocol, p.Port}] = types.NamespacedName{Namespace: s.Namespace, Name: s.Name}
			}
		}
		statuses[s] = status
	}
	return statuses
}

// conflict says in a person's words why a Service cannot have its ports, "" when it can.
func conflict(s *corev1.Service, want, addresses []string, owners map[listener]types.NamespacedName, taken func(corev1.Protocol, int32) bool) string {
	for _, ip := range want {
		if !slices.Contains(addresses, ip) {
			// Others' addresses are not for a Service to take.
			return fmt.Sprintf("%s is no address of a node; use one of %s in %s", ip, strings.Join(addresses, ", "), api.AnnotationHostIP)
		}
		for _, p := range s.Spec.Ports {
			if owner, ok := owners[listener{ip, p.Protocol, p.Port}]; ok {
				return fmt.Sprintf("port %d (%s) of %s is Service %s's; choose another", p.Port, p.Protocol, ip, owner)
			}
		}
	}
	if len(s.Status.LoadBalancer.Ingress) > 0 {
		return "" // who listens now came later
	}
	for _, p := range s.Spec.Ports {
		if taken != nil && taken(p.Protocol, p.Port) {
			return fmt.Sprintf("a program of this machine listens on port %d (%s); choose another, or stop it", p.Port, p.Protocol)
		}
	}
	return ""
}
