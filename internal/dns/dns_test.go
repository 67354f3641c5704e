package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"tutti.dev/tutti/internal/host/netns/netnstest"
)

// Tests listen on port 53 of many addresses of a loopback link of their own.
func TestMain(m *testing.M) { netnstest.Main(m) }

const deadline = 10 * time.Second

// resolver is another DNS server, with one name in it. It returns how often
// it was asked.
func resolver(t *testing.T, addr string, reply func(*dns.Msg)) *atomic.Int64 {
	t.Helper()
	var asked atomic.Int64
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		asked.Add(1)
		m := new(dns.Msg).SetReply(q)
		m.RecursionAvailable = true
		reply(m)
		_ = w.WriteMsg(m)
	})
	p, err := net.ListenPacket("udp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", addr+":53")
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: p, Handler: handler}, {Listener: l, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		go func() { _ = s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() { _ = s.Shutdown() })
	}
	return &asked
}

func address(ip string) func(*dns.Msg) {
	return func(m *dns.Msg) {
		m.Answer = []dns.RR{&dns.A{
			Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(ip),
		}}
	}
}

// serve runs a server on addr until the test ends.
func serve(t *testing.T, client *fake.Clientset, addr, resolvers string) *Server {
	t.Helper()
	s := New(Config{
		Client: client, Domain: "cluster.local",
		Pods: netip.MustParsePrefix("10.42.0.0/16"), Services: netip.MustParsePrefix("10.43.0.0/16"),
		Listen: []netip.AddrPort{netip.MustParseAddrPort(addr + ":53")}, Resolvers: resolvers,
		Log: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug})),
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(deadline):
			t.Error("Run does not return")
		}
	})
	return s
}

func ready(t *testing.T, s *Server) {
	t.Helper()
	select {
	case <-s.Ready():
	case <-time.After(deadline):
		t.Fatal("not ready")
	}
}

func ask(t *testing.T, proto, addr, name string, kind uint16, change ...func(*dns.Msg)) *dns.Msg {
	t.Helper()
	q := new(dns.Msg).SetQuestion(name, kind)
	for _, c := range change {
		c(q)
	}
	client := &dns.Client{Net: proto, Timeout: deadline, UDPSize: dns.MaxMsgSize}
	m, _, err := client.Exchange(q, addr+":53")
	if err != nil {
		t.Fatalf("ask %s for %s: %v", addr, name, err)
	}
	m.Compress = true // as it was sent: Len depends on it
	return m
}

func addrs(m *dns.Msg) []string {
	var all []string
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			all = append(all, rr.A.String())
		case *dns.CNAME:
			all = append(all, rr.Target)
		}
	}
	return all
}

func resolvConf(t *testing.T, path string, servers ...string) {
	t.Helper()
	text := ""
	for _, s := range servers {
		text += "nameserver " + s + "\n"
	}
	// As configuration tools do: another file in its place.
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestServer(t *testing.T) {
	const me = "127.0.1.1"
	objects := shop()
	var many []string
	for i := range 200 {
		many = append(many, fmt.Sprintf("10.42.1.%d", i+1))
	}
	objects = append(objects, svc("many", "None"), slice("many", "a", many...))
	client := fake.NewClientset(objects...)
	resolvers := filepath.Join(t.TempDir(), "resolv.conf")
	resolver(t, "127.0.1.2", address("192.0.2.80"))
	resolvConf(t, resolvers, me, "127.0.1.2")
	s := serve(t, client, me, resolvers)
	ready(t, s)

	for _, proto := range []string{"udp", "tcp"} {
		for name, want := range map[string][]string{
			"web.default.svc.cluster.local.":   {"10.43.0.20"},
			"WEB.default.svc.Cluster.Local.":   {"10.43.0.20"},
			"db.default.svc.cluster.local.":    {"10.42.0.10", "10.42.0.11", "10.42.0.13"},
			"www.example.com.":                 {"192.0.2.80"},
			"away.default.svc.cluster.local.":  {"192.0.2.80", "www.example.com."},
			"alias.default.svc.cluster.local.": {"10.43.0.20", "web.default.svc.cluster.local."},
		} {
			m := ask(t, proto, me, name, dns.TypeA)
			got := addrs(m)
			slices.Sort(got)
			if !slices.Equal(got, want) || m.Rcode != dns.RcodeSuccess || !m.RecursionAvailable {
				t.Errorf("%s %s: %v", proto, name, m)
			}
		}
		// Names that search paths make.
		for _, name := range []string{
			"www.example.com.default.svc.cluster.local.", "www.example.com.svc.cluster.local.",
			"www.example.com.cluster.local.", "web.default.svc.cluster.local.default.svc.cluster.local.",
		} {
			if m := ask(t, proto, me, name, dns.TypeA); m.Rcode != dns.RcodeNameError || !m.Authoritative || len(m.Ns) != 1 {
				t.Errorf("%s: %v", name, m)
			}
		}
		if m := ask(t, proto, me, "loop.default.svc.cluster.local.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("loop: %v", m)
		}
		for name, change := range map[string]func(*dns.Msg){
			"BADVERS":  func(q *dns.Msg) { q.SetEdns0(4096, false); q.IsEdns0().SetVersion(1) },
			"NOTIMP":   func(q *dns.Msg) { q.Opcode = dns.OpcodeNotify },
			"FORMERR":  func(q *dns.Msg) { q.Question = append(q.Question, q.Question[0]) },
			"REFUSED":  func(q *dns.Msg) { q.Question[0].Qclass = dns.ClassCHAOS },
			"NOERROR":  func(q *dns.Msg) {},
			"NXDOMAIN": func(q *dns.Msg) { q.Question[0].Name = "x.default.svc.cluster.local." },
		} {
			if m := ask(t, proto, me, "web.default.svc.cluster.local.", dns.TypeA, change); dns.RcodeToString[m.Rcode] != name && !(name == "BADVERS" && m.Rcode == dns.RcodeBadVers) {
				t.Errorf("%s %s: %v", proto, name, m)
			}
		}
	}

	// Answers that are too long for a packet.
	long := "many.default.svc.cluster.local."
	if m := ask(t, "udp", me, long, dns.TypeA); !m.Truncated || m.Len() > dns.MinMsgSize || len(m.Answer) == 0 {
		t.Errorf("plain UDP: truncated %v, %d bytes, %d answers", m.Truncated, m.Len(), len(m.Answer))
	}
	if m := ask(t, "udp", me, long, dns.TypeA, func(q *dns.Msg) { q.SetEdns0(4096, false) }); !m.Truncated || m.Len() > maxUDP || m.Len() <= dns.MinMsgSize || m.IsEdns0() == nil {
		t.Errorf("UDP with EDNS: truncated %v, %d bytes", m.Truncated, m.Len())
	}
	if m := ask(t, "tcp", me, long, dns.TypeA); m.Truncated || len(m.Answer) != len(many) {
		t.Errorf("TCP: truncated %v, %d answers", m.Truncated, len(m.Answer))
	}
	// Clients that take the first address take different ones.
	first := map[string]bool{}
	for range 50 {
		first[addrs(ask(t, "tcp", me, long, dns.TypeA))[0]] = true
	}
	if len(first) < 2 {
		t.Error("always the same first address")
	}

	// A change is visible when its event has arrived.
	slicesAPI := client.DiscoveryV1().EndpointSlices("default")
	if _, err := slicesAPI.Update(t.Context(), slice("db", "b", "db-9 10.42.0.19"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	for !slices.Equal(addrs(ask(t, "udp", me, "db-9.db.default.svc.cluster.local.", dns.TypeA)), []string{"10.42.0.19"}) {
		if time.Since(start) > deadline {
			t.Fatal("the new endpoint does not appear")
		}
	}
	t.Log("a new endpoint was visible after", time.Since(start))
	if m := ask(t, "udp", me, "10-42-0-13.db.default.svc.cluster.local.", dns.TypeA); m.Rcode != dns.RcodeNameError {
		t.Errorf("an endpoint that went: %v", m)
	}
	if err := client.CoreV1().Services("default").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); ask(t, "udp", me, "web.default.svc.cluster.local.", dns.TypeA).Rcode != dns.RcodeNameError; {
		if time.Since(start) > deadline {
			t.Fatal("the removed Service does not go")
		}
	}
}

func TestForwarding(t *testing.T) {
	const me = "127.0.2.1"
	resolvers := filepath.Join(t.TempDir(), "resolv.conf")
	resolvConf(t, resolvers, me)
	s := serve(t, fake.NewClientset(), me, resolvers)
	ready(t, s)
	name := "www.example.com."

	// Without others there is no one to ask, and no use in waiting.
	start := time.Now()
	if m := ask(t, "udp", me, name, dns.TypeA); m.Rcode != dns.RcodeServerFailure || time.Since(start) > time.Second {
		t.Errorf("no resolvers: %v after %s", m, time.Since(start))
	}
	// The file changes under us.
	good := resolver(t, "127.0.2.2", address("192.0.2.2"))
	resolvConf(t, resolvers, "127.0.2.2")
	if got := addrs(ask(t, "udp", me, name, dns.TypeA)); !slices.Equal(got, []string{"192.0.2.2"}) {
		t.Errorf("after the file changed: %v", got)
	}
	// One that is silent is asked once, one that fails is passed over.
	silent, err := net.ListenPacket("udp", "127.0.2.3:53")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	broken := resolver(t, "127.0.2.4", func(m *dns.Msg) { m.Rcode = dns.RcodeServerFailure })
	resolvConf(t, resolvers, "127.0.2.3", "127.0.2.4", "127.0.2.2")
	before := good.Load()
	for range 5 {
		if got := addrs(ask(t, "udp", me, name, dns.TypeA)); !slices.Equal(got, []string{"192.0.2.2"}) {
			t.Errorf("with a silent resolver: %v", got)
		}
	}
	if good.Load() != before+5 || broken.Load() != 1 {
		t.Errorf("the good one was asked %d times of 5, the broken one %d of 1", good.Load()-before, broken.Load())
	}
	// When all fail, so do we: with their answer if there is one.
	resolvConf(t, resolvers, "127.0.2.4")
	if m := ask(t, "udp", me, name, dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("only a broken resolver: %v", m)
	}
	resolvConf(t, resolvers, "127.0.2.9") // refuses packets
	if m := ask(t, "udp", me, name, dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("no resolver listens: %v", m)
	}
	// What was cut short says so; by TCP it comes whole.
	resolver(t, "127.0.2.5", func(m *dns.Msg) {
		for i := range 300 {
			m.Answer = append(m.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.IPv4(192, 0, 2, byte(i)),
			})
		}
	})
	resolvConf(t, resolvers, "127.0.2.5")
	if m := ask(t, "udp", me, name, dns.TypeA); !m.Truncated || m.Len() > dns.MinMsgSize {
		t.Errorf("long answer by UDP: truncated %v, %d bytes", m.Truncated, m.Len())
	}
	if m := ask(t, "tcp", me, name, dns.TypeA); m.Truncated || len(m.Answer) != 300 {
		t.Errorf("long answer by TCP: truncated %v, %d answers", m.Truncated, len(m.Answer))
	}
}

// TestBeforeTheCluster asks before the API has answered, at an address that no
// link has yet.
func TestBeforeTheCluster(t *testing.T) {
	const me = "10.41.0.1"
	resolvers := filepath.Join(t.TempDir(), "resolv.conf")
	resolver(t, "127.0.3.2", address("192.0.2.80"))
	resolvConf(t, resolvers, "127.0.3.2")
	client := fake.NewClientset(shop()...)
	gate := make(chan struct{})
	client.PrependReactor("list", "endpointslices", func(clienttesting.Action) (bool, runtime.Object, error) {
		<-gate
		return false, nil, nil
	})
	serve(t, client, me, resolvers)
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	addr, _ := netlink.ParseAddr(me + "/32")
	// The server listens when its zone fills.
	if err := netlink.AddrAdd(lo, addr); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = netlink.AddrDel(lo, addr) })
	until := time.Now().Add(deadline)
	for {
		c, err := net.Dial("tcp", me+":53")
		if err == nil {
			c.Close()
			break
		}
		if time.Now().After(until) {
			t.Fatal(err)
		}
	}
	if got := addrs(ask(t, "udp", me, "www.example.com.", dns.TypeA)); !slices.Equal(got, []string{"192.0.2.80"}) {
		t.Errorf("another name: %v", got)
	}
	answers := make(chan *dns.Msg)
	go func() { answers <- ask(t, "udp", me, "db.default.svc.cluster.local.", dns.TypeA) }()
	select {
	case m := <-answers:
		t.Errorf("answered without knowing: %v", m)
	case <-time.After(200 * time.Millisecond):
		close(gate)
		if m := <-answers; len(m.Answer) != 3 {
			t.Errorf("after the API answered: %v", m)
		}
	}
}

func BenchmarkLookup(b *testing.B) {
	z := newZone("cluster.local", netip.Prefix{}, netip.Prefix{})
	for i := range 1000 {
		z.set(&service{namespace: "default", name: fmt.Sprint("svc", i), clusterIPs: []netip.Addr{netip.MustParseAddr("10.43.0.9")}})
	}
	q := dns.Question{Name: "svc500.default.svc.cluster.local.", Qtype: dns.TypeA, Qclass: dns.ClassINET}
	for b.Loop() {
		if a, _ := z.lookup(q); len(a.answer) != 1 {
			b.Fatal(a)
		}
	}
}
