package proxy

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"

	"tutti.dev/tutti/internal/host/relay"
)

// loopback makes TCP node ports answer on 127.0.0.1, where people look first:
// upstream's rules leave loopback out. It relays to the same port of the
// node's address, so all that decides where a connection goes stays with them.
type loopback struct {
	ctx  context.Context
	node netip.Addr
	log  *slog.Logger

	mu        sync.Mutex
	wanted    map[types.NamespacedName][]int32
	listeners map[int32]net.Listener
	group     sync.WaitGroup
}

var _ proxyconfig.ServiceHandler = (*loopback)(nil)

func newLoopback(ctx context.Context, node netip.Addr, log *slog.Logger) *loopback {
	return &loopback{
		ctx: ctx, node: node, log: log,
		wanted: map[types.NamespacedName][]int32{}, listeners: map[int32]net.Listener{},
	}
}

func (l *loopback) OnServiceAdd(s *v1.Service)       { l.set(s, nodePorts(s)) }
func (l *loopback) OnServiceUpdate(_, s *v1.Service) { l.set(s, nodePorts(s)) }
func (l *loopback) OnServiceDelete(s *v1.Service)    { l.set(s, nil) }
func (l *loopback) OnServiceSynced()                 {}

func nodePorts(s *v1.Service) []int32 {
	var ports []int32
	for _, p := range s.Spec.Ports {
		if p.NodePort != 0 && p.Protocol == v1.ProtocolTCP {
			ports = append(ports, p.NodePort)
		}
	}
	return ports
}

func (l *loopback) set(s *v1.Service, ports []int32) {
	l.mu.Lock()
	defer l.mu.Unlock()
	name := types.NamespacedName{Namespace: s.Namespace, Name: s.Name}
	if len(ports) == 0 && len(l.wanted[name]) == 0 || l.ctx.Err() != nil {
		return
	}
	l.wanted[name] = ports
	if len(ports) == 0 {
		delete(l.wanted, name)
	}
	keep := map[int32]bool{}
	for _, ports := range l.wanted {
		for _, p := range ports {
			keep[p] = true
			if l.listeners[p] == nil {
				l.open(p)
			}
		}
	}
	for p, listener := range l.listeners {
		if !keep[p] {
			listener.Close()
			delete(l.listeners, p)
		}
	}
}

func (l *loopback) open(port int32) {
	text := strconv.Itoa(int(port))
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", text))
	if err != nil {
		l.log.Warn("A node port does not answer on 127.0.0.1", "port", port, "err", err)
		return
	}
	l.listeners[port] = listener
	l.group.Go(func() { relay.Serve(l.ctx, listener, net.JoinHostPort(l.node.String(), text)) })
}

// close stops listening and waits for what runs; the context has ended.
func (l *loopback) close() {
	l.mu.Lock()
	for _, listener := range l.listeners {
		listener.Close()
	}
	clear(l.listeners)
	l.mu.Unlock()
	l.group.Wait()
}
