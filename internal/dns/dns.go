// Package dns answers names for pods: those of the cluster to the Kubernetes
// DNS specification 1.1, from the Services and EndpointSlices that the API
// shows at this moment; all others by asking the machine's own resolvers.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
)

// Config of a Server.
type Config struct {
	// Client lists and watches Services and EndpointSlices.
	Client kubernetes.Interface
	// Domain of the cluster, "cluster.local".
	Domain string
	// Pods and Services are the cluster's ranges of addresses: nobody else is
	// asked for the names of those, and pods have names that spell their
	// address. A zero range is none.
	Pods, Services netip.Prefix
	// Listen has the addresses to answer on, by UDP and TCP. They need not
	// exist on this machine yet.
	Listen []netip.AddrPort
	// Resolvers is the file that names the machine's own resolvers, "" for
	// /etc/resolv.conf. It is read again when it has changed.
	Resolvers string
	Log       *slog.Logger
}

// Server answers DNS questions.
type Server struct {
	cfg    Config
	zone   *zone
	others *forwarder
	synced chan struct{} // closed when the zone is complete
	ready  chan struct{}
}

// New returns a Server that does nothing until Run.
func New(cfg Config) *Server {
	if cfg.Resolvers == "" {
		cfg.Resolvers = "/etc/resolv.conf"
	}
	return &Server{
		cfg:    cfg,
		zone:   newZone(cfg.Domain, cfg.Pods, cfg.Services),
		others: newForwarder(cfg.Resolvers, cfg.Listen),
		synced: make(chan struct{}),
		ready:  make(chan struct{}),
	}
}

// Ready is closed once the server answers on all its addresses and knows all
// names of the cluster.
func (s *Server) Ready() <-chan struct{} { return s.ready }

const (
	// patience is how long a question about the cluster waits for the first
	// complete view of it before it fails.
	patience = 3 * time.Second
	// maxUDP is the size that passes every common link in one piece.
	maxUDP = 1232
	// hops bounds how many names that are other names are followed.
	hops = 8
)

// Run answers until ctx ends. Questions about other names are answered from
// the start, those about the cluster once the API has told of it.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	servers, err := s.listen(ctx)
	if err != nil {
		return fmt.Errorf("serve DNS: %w", err)
	}
	failed := make(chan error, len(servers))
	var serving sync.WaitGroup
	defer serving.Wait()
	for _, server := range servers {
		started := make(chan struct{})
		server.NotifyStartedFunc = func() { close(started) }
		serving.Go(func() {
			if err := server.ActivateAndServe(); err != nil {
				failed <- err
			}
		})
		select {
		case <-started: // one that has not started cannot be stopped
			defer func() { _ = server.Shutdown() }()
		case err := <-failed:
			return fmt.Errorf("serve DNS: %w", err)
		}
	}
	c := newCluster(s.zone, s.cfg.Client)
	defer func() {
		cancel()
		c.informers.Shutdown()
	}()
	if err := c.follow(ctx); err != nil {
		return fmt.Errorf("serve DNS: follow Services: %w", err)
	}
	if ctx.Err() == nil {
		close(s.synced)
		close(s.ready)
		s.cfg.Log.Info("Names are served", "domain", s.cfg.Domain, "addresses", s.cfg.Listen)
	}
	select {
	case err := <-failed:
		return fmt.Errorf("serve DNS: %w", err)
	case <-ctx.Done():
		return nil
	}
}

// listen opens all sockets or none.
func (s *Server) listen(ctx context.Context) (servers []*dns.Server, err error) {
	defer func() {
		if err == nil {
			return
		}
		for _, server := range servers {
			if server.Listener != nil {
				server.Listener.Close()
			} else {
				server.PacketConn.Close()
			}
		}
	}()
	config := net.ListenConfig{Control: freebind}
	for _, addr := range s.cfg.Listen {
		packets, err := config.ListenPacket(ctx, "udp", addr.String())
		if err != nil {
			return servers, err
		}
		servers = append(servers, &dns.Server{PacketConn: packets, Handler: s.handler(ctx, "udp"), UDPSize: dns.MaxMsgSize})
		conns, err := config.Listen(ctx, "tcp", addr.String())
		if err != nil {
			return servers, err
		}
		servers = append(servers, &dns.Server{Listener: conns, Handler: s.handler(ctx, "tcp")})
	}
	return servers, nil
}

// freebind lets a socket have an address that no link has yet.
func freebind(_, _ string, c syscall.RawConn) error {
	var err error
	control := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1)
	})
	return errors.Join(control, err)
}

func (s *Server) handler(ctx context.Context, proto string) dns.Handler {
	return dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		if err := w.WriteMsg(s.respond(ctx, q, proto)); err != nil {
			s.cfg.Log.Debug("Cannot answer a DNS question", "client", w.RemoteAddr(), "err", err)
		}
	})
}

// respond returns the complete reply to a message.
func (s *Server) respond(ctx context.Context, q *dns.Msg, proto string) *dns.Msg {
	reply := new(dns.Msg).SetReply(q)
	reply.RecursionAvailable = true
	size := dns.MaxMsgSize
	opt := q.IsEdns0()
	if proto == "udp" {
		size = dns.MinMsgSize
		if opt != nil {
			size = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDP)
		}
	}
	switch {
	case opt != nil && opt.Version() != 0:
		reply.Rcode = dns.RcodeBadVers
	case q.Opcode != dns.OpcodeQuery:
		reply.Rcode = dns.RcodeNotImplemented
	case len(q.Question) != 1:
		reply.Rcode = dns.RcodeFormatError
	case q.Question[0].Qclass != dns.ClassINET:
		reply.Rcode = dns.RcodeRefused
	case q.Question[0].Qtype == dns.TypeAXFR || q.Question[0].Qtype == dns.TypeIXFR:
		reply.Rcode = dns.RcodeRefused
	default:
		if forwarded := s.resolve(ctx, q, reply, proto); forwarded != nil {
			// We did not choose the size of others' answers: it is the client's to say.
			if proto == "udp" && opt != nil {
				size = max(size, int(opt.UDPSize()))
			}
			forwarded.Truncate(size)
			return forwarded
		}
	}
	if opt != nil {
		reply.SetEdns0(maxUDP, opt.Do())
	}
	reply.Truncate(size)
	return reply
}

// resolve fills in the reply, or returns another server's.
func (s *Server) resolve(ctx context.Context, q, reply *dns.Msg, proto string) *dns.Msg {
	question := q.Question[0]
	for range hops {
		a, ours := s.lookup(ctx, question)
		if !ours {
			other := q
			if question.Name != q.Question[0].Name {
				other = q.Copy()
				other.Question[0] = question
			}
			forwarded, err := s.others.ask(ctx, other, proto)
			if err != nil {
				s.cfg.Log.Debug("Cannot resolve a name", "name", question.Name, "err", err)
				reply.Rcode = dns.RcodeServerFailure
				return nil
			}
			if other == q {
				return forwarded
			}
			reply.Rcode = forwarded.Rcode
			reply.Answer = append(reply.Answer, forwarded.Answer...)
			reply.Ns = forwarded.Ns
			return nil
		}
		reply.Authoritative = true
		reply.Rcode = a.code
		shuffle(a.answer)
		reply.Answer = append(reply.Answer, a.answer...)
		reply.Ns, reply.Extra = a.authority, a.extra
		if a.follow == "" {
			return nil
		}
		question.Name = a.follow
	}
	reply.Rcode = dns.RcodeServerFailure
	return nil
}

// lookup asks the zone, once it is complete if the question is about it.
func (s *Server) lookup(ctx context.Context, q dns.Question) (answer, bool) {
	a, ours := s.zone.lookup(q)
	if !ours {
		return a, false
	}
	select {
	case <-s.synced:
		return a, true
	default:
	}
	wait := time.NewTimer(patience)
	defer wait.Stop()
	select {
	case <-s.synced:
		return s.zone.lookup(q)
	case <-wait.C:
	case <-ctx.Done():
	}
	return answer{code: dns.RcodeServerFailure}, true
}

// shuffle spreads clients that take the first of several addresses.
func shuffle(rrs []dns.RR) {
	rand.Shuffle(len(rrs), func(i, j int) { rrs[i], rrs[j] = rrs[j], rrs[i] })
}
