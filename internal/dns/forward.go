package dns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// A client asks again after five seconds: by then it shall have an answer.
	perServer = 1500 * time.Millisecond
	inAll     = 4 * time.Second
	// inFlight bounds the questions that wait for other servers.
	inFlight = 512
)

// forwarder asks the machine's own resolvers.
type forwarder struct {
	path   string           // of resolv.conf
	avoid  []netip.AddrPort // ourselves
	slots  chan struct{}
	mu     sync.Mutex
	read   os.FileInfo // what servers were read from
	server []string    // the one that answered last comes first
}

func newForwarder(path string, avoid []netip.AddrPort) *forwarder {
	return &forwarder{path: path, avoid: avoid, slots: make(chan struct{}, inFlight)}
}

// servers returns the machine's resolvers as its configuration names them
// now, and forgets what it learnt about them when that has changed.
func (f *forwarder) servers() ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now, err := os.Stat(f.path)
	if err != nil {
		return nil, err
	}
	if f.read != nil && os.SameFile(f.read, now) && f.read.ModTime().Equal(now.ModTime()) && f.read.Size() == now.Size() {
		return slices.Clone(f.server), nil
	}
	config, err := dns.ClientConfigFromFile(f.path)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", f.path, err)
	}
	f.read, f.server = now, nil
	for _, s := range config.Servers {
		// A zone (fe80::1%eth0) is kept; one of ourselves would go round in circles.
		ip, err := netip.ParseAddr(s)
		if err == nil && !slices.Contains(f.avoid, netip.AddrPortFrom(ip.WithZone(""), 53)) {
			f.server = append(f.server, net.JoinHostPort(s, config.Port))
		}
	}
	return slices.Clone(f.server), nil
}

// prefer has a server asked first from now on.
func (f *forwarder) prefer(server string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.Index(f.server, server); i > 0 {
		f.server = slices.Insert(slices.Delete(f.server, i, i+1), 0, server)
	}
}

var errNoServers = errors.New("the machine has no other resolver")

// ask sends the question on, by the protocol it came by: so an answer that
// was cut short says so to whoever asked, who asks again by TCP.
func (f *forwarder) ask(ctx context.Context, question *dns.Msg, proto string) (*dns.Msg, error) {
	select {
	case f.slots <- struct{}{}:
		defer func() { <-f.slots }()
	default:
		return nil, errors.New("too many questions wait for other resolvers")
	}
	servers, err := f.servers()
	if err != nil {
		return nil, err
	}
	if len(servers) == 0 {
		return nil, errNoServers
	}
	ctx, cancel := context.WithTimeout(ctx, inAll)
	defer cancel()
	client := &dns.Client{Net: proto, Timeout: perServer, UDPSize: dns.MaxMsgSize}
	copied := question.Copy()
	var failed *dns.Msg
	var errs []error
	for i, server := range servers {
		copied.Id = dns.Id()
		reply, _, err := client.ExchangeContext(ctx, copied, server)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		reply.Id = question.Id
		if reply.Rcode == dns.RcodeServerFailure || reply.Rcode == dns.RcodeRefused {
			failed = reply
			continue
		}
		if i > 0 {
			f.prefer(server)
		}
		return reply, nil
	}
	if failed != nil {
		return failed, nil
	}
	return nil, errors.Join(errs...)
}
