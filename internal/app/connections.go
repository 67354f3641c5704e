package app

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// Kinds of peers that are no workload.
const (
	// PeerService is a Service without pods, as the API's own.
	PeerService = "Service"
	// PeerNode is a machine of the cluster, or a pod in its network.
	PeerNode = "Node"
	// PeerOutside is whoever is not of the cluster.
	PeerOutside = "Outside"
)

// Peer is one end of connections: a Service of the status, or one of the
// other kinds.
type Peer struct {
	Kind      string `json:"kind"`
	App       string `json:"app,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	// Name is an address when the kind is Outside, "" if there are several.
	Name string `json:"name,omitempty"`
}

// Connection sums up the connections between two peers by one port.
type Connection struct {
	From Peer `json:"from"`
	To   Peer `json:"to"`
	// Service is the one that they were opened to; "" when it was the peer's
	// own address.
	Service  string `json:"service,omitempty"`
	Protocol string `json:"protocol"` // "tcp", "udp", "sctp"
	Port     uint16 `json:"port"`     // as the opener addressed it
	// Open, Waiting (without an answer yet) and Recent (ended, or without an
	// end as UDP) are counts; Bytes is 0 where the kernel does not count.
	Open    int    `json:"open"`
	Waiting int    `json:"waiting"`
	Recent  int    `json:"recent"`
	Bytes   uint64 `json:"bytes,omitempty"`
	// Addresses is how many different ones an end outside has.
	Addresses int `json:"addresses,omitempty"`
}

// atlas knows whose an address is.
type atlas struct {
	pods     map[netip.Addr]Peer
	podNode  map[netip.Addr]string
	nodes    map[netip.Addr]string
	ranges   []netip.Prefix // of pods
	services map[netip.Addr]*corev1.Service
	ports    map[nodePort]*corev1.Service
}

type nodePort struct {
	protocol string
	port     uint16
}

func newAtlas(s Snapshot, all []workload) atlas {
	a := atlas{map[netip.Addr]Peer{}, map[netip.Addr]string{}, map[netip.Addr]string{}, nil, map[netip.Addr]*corev1.Service{}, map[nodePort]*corev1.Service{}}
	for _, w := range all {
		peer := Peer{w.kind, appOf(w.meta.Labels), w.meta.Namespace, w.meta.Name}
		for _, p := range w.pods {
			for _, ip := range p.Status.PodIPs {
				addr, err := netip.ParseAddr(ip.IP)
				if err != nil || p.Spec.HostNetwork {
					continue
				}
				// One that has ended may share its address with a later one.
				if _, taken := a.pods[addr]; !taken || p.Status.Phase == corev1.PodRunning {
					a.pods[addr], a.podNode[addr] = peer, p.Spec.NodeName
				}
			}
		}
	}
	for _, n := range s.Nodes {
		for _, na := range n.Status.Addresses {
			if addr, err := netip.ParseAddr(na.Address); err == nil {
				a.nodes[addr] = n.Name
			}
		}
		for _, c := range n.Spec.PodCIDRs {
			if r, err := netip.ParsePrefix(c); err == nil {
				a.ranges = append(a.ranges, r)
			}
		}
	}
	for _, svc := range s.Services {
		addresses := slices.Concat(svc.Spec.ClusterIPs, svc.Spec.ExternalIPs)
		for _, i := range svc.Status.LoadBalancer.Ingress {
			addresses = append(addresses, i.IP)
		}
		for _, ip := range addresses {
			if addr, err := netip.ParseAddr(ip); err == nil { // "None" is none
				a.services[addr] = svc
			}
		}
		for _, p := range svc.Spec.Ports {
			if p.NodePort != 0 {
				a.ports[nodePort{strings.ToLower(string(p.Protocol)), uint16(p.NodePort)}] = svc
			}
		}
	}
	return a
}

// gone says that an address was a pod's that is not there any more.
func (a atlas) gone(addr netip.Addr) bool {
	return slices.ContainsFunc(a.ranges, func(r netip.Prefix) bool { return r.Contains(addr) })
}

// opener is who opens the connections of a flow that node tells of; ok is
// false when it is not for this node to tell, or nobody's business any more.
func (a atlas) opener(node string, f api.Flow) (peer Peer, ok bool) {
	if f.FromNode {
		// Without a translation it is the node's own doing: its probes.
		return Peer{Kind: PeerNode, Name: node}, f.To != f.At
	}
	if p, is := a.pods[f.From]; is {
		return p, a.podNode[f.From] == node // the node of the answer sees it too
	}
	if _, is := a.nodes[f.From]; is || a.gone(f.From) {
		return Peer{}, false
	}
	return Peer{Kind: PeerOutside, Name: f.From.String()}, true
}

// answerer is who answers, and the Service by which it was found.
func (a atlas) answerer(node string, f api.Flow) (peer Peer, service *corev1.Service, ok bool) {
	if f.To != f.At {
		if service = a.services[f.To.Addr()]; service == nil {
			service = a.ports[nodePort{f.Protocol, f.To.Port()}]
		}
	}
	if p, is := a.pods[f.At.Addr()]; is {
		return p, service, true
	}
	other, is := a.nodes[f.At.Addr()]
	switch {
	case service != nil:
		return Peer{Kind: PeerService, App: appOf(service.Labels), Namespace: service.Namespace, Name: service.Name}, service, true
	case f.AtNode:
		return Peer{Kind: PeerNode, Name: node}, nil, true
	case is:
		return Peer{Kind: PeerNode, Name: other}, nil, true
	case a.gone(f.At.Addr()):
		return Peer{}, nil, false
	}
	return Peer{Kind: PeerOutside, Name: f.At.Addr().String()}, nil, true
}

// connections says who talks to whom: what the nodes' flows mean. Those with
// Kubernetes' own parts, as every pod's with the cluster's DNS, are left out
// unless system is set.
func connections(s Snapshot, all []workload, system bool) []Connection {
	where := newAtlas(s, all)
	sums := map[Connection]*Connection{}
	outside := map[Connection]map[string]bool{}
	for _, node := range slices.Sorted(maps.Keys(s.Flows)) {
		for _, f := range s.Flows[node] {
			from, ok := where.opener(node, f)
			to, service, ok2 := where.answerer(node, f)
			if !ok || !ok2 || !system && (from.Namespace == metav1.NamespaceSystem || to.Namespace == metav1.NamespaceSystem) {
				continue
			}
			key := Connection{From: from, To: to, Protocol: f.Protocol, Port: f.To.Port()}
			address := ""
			for _, p := range []*Peer{&key.From, &key.To} {
				if p.Kind == PeerOutside {
					address, p.Name = p.Name, ""
				}
			}
			if service != nil {
				key.Service = service.Name
			}
			sum := sums[key]
			if sum == nil {
				sum = ptr.To(key)
				sums[key], outside[key] = sum, map[string]bool{}
			}
			sum.Open, sum.Waiting, sum.Recent, sum.Bytes = sum.Open+f.Open, sum.Waiting+f.Waiting, sum.Recent+f.Recent, sum.Bytes+f.Bytes
			if address != "" {
				outside[key][address] = true
			}
		}
	}
	list := []Connection{}
	for key, sum := range sums {
		sum.Addresses = len(outside[key])
		for address := range outside[key] {
			for _, p := range []*Peer{&sum.From, &sum.To} {
				if p.Kind == PeerOutside && sum.Addresses == 1 {
					p.Name = address
				}
			}
		}
		list = append(list, *sum)
	}
	slices.SortFunc(list, func(a, b Connection) int {
		return cmp.Or(comparePeers(a.From, b.From), comparePeers(a.To, b.To), cmp.Compare(a.Port, b.Port),
			cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Service, b.Service))
	})
	return list
}

func comparePeers(a, b Peer) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Kind, b.Kind))
}
