package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"tutti.dev/tutti/internal/host/netns"
	"tutti.dev/tutti/internal/host/netns/netnstest"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

// here is the test's own namespace: the machine.
const here = "/proc/self/ns/net"

var pods = netip.MustParsePrefix("10.42.0.0/24")

const patience = 5 * time.Second

func open(t testing.TB, dir string) *Network {
	t.Helper()
	n, err := New(t.Context(), Config{
		Dir: dir, Bridge: "tutti0", Local: netip.MustParseAddr("10.41.0.1"),
		Cluster: netip.MustParsePrefix("10.42.0.0/16"), Service: netip.MustParsePrefix("10.43.0.0/16"),
	}, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

// fresh opens a network that is purged when the test ends.
func fresh(t testing.TB) *Network {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := Purge(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	n := open(t, dir)
	if err := n.SetRange(t.Context(), pods); err != nil {
		t.Fatal(err)
	}
	return n
}

func attach(t testing.TB, n *Network, id string, ports ...HostPort) Attachment {
	t.Helper()
	a, err := n.Attach(t.Context(), Pod{ID: id, Ports: ports})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// serve answers each TCP connection and each UDP packet in the namespace with
// the address the peer is seen by.
func serve(t testing.TB, ns string, port int) {
	t.Helper()
	var (
		l net.Listener
		p net.PacketConn
	)
	netnstest.Do(t, ns, func() (err error) {
		addr := ":" + strconv.Itoa(port)
		if l, err = net.Listen("tcp4", addr); err == nil {
			p, err = net.ListenPacket("udp4", addr)
		}
		return err
	})
	t.Cleanup(func() { l.Close(); p.Close() })
	host := func(a net.Addr) []byte { h, _, _ := net.SplitHostPort(a.String()); return []byte(h) }
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write(host(c.RemoteAddr()))
			c.Close()
		}
	}()
	go func() {
		b := make([]byte, 64)
		for {
			_, from, err := p.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = p.WriteTo(host(from), from)
		}
	}()
}

// ask connects from the namespace and returns who the server says is calling.
func ask(ns, proto, addr string) (string, error) {
	var reply string
	call := func() error {
		c, err := net.DialTimeout(proto, addr, patience)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(patience))
		if proto == "udp" {
			_, _ = c.Write([]byte("who?"))
			b := make([]byte, 64)
			k, err := c.Read(b)
			reply = string(b[:k])
			return err
		}
		b, err := io.ReadAll(c)
		reply = string(b)
		return err
	}
	err := netns.Do(ns, call)
	return reply, err
}

func wantCaller(t *testing.T, ns, proto, addr, caller string) {
	t.Helper()
	got, err := ask(ns, proto, addr)
	if err != nil || got != caller {
		t.Errorf("calling %s %s: server sees %q, %v; want %q", proto, addr, got, err, caller)
	}
}

func wantNone(t *testing.T, ns, addr string) {
	t.Helper()
	err := netns.Do(ns, func() error {
		c, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
		if err == nil {
			c.Close()
		}
		return err
	})
	if err == nil {
		t.Errorf("calling %s succeeded", addr)
	}
}

func run(t testing.TB, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// machine is everything that a network changes about a machine.
func machine(t testing.TB) string {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	return run(t, "nft", "list", "ruleset") + run(t, "ip", "-o", "link") + run(t, "ip", "-4", "-o", "addr") +
		run(t, "ip", "-4", "route", "show", "table", "all") + run(t, "ip", "-4", "neigh") +
		run(t, "sh", "-c", "sysctl -a 2>/dev/null | grep -E '^net.ipv4.(ip_forward|conf)'") + string(mounts)
}

func wantSame(t *testing.T, before, after string) {
	t.Helper()
	old, now := strings.Split(before, "\n"), strings.Split(after, "\n")
	for _, line := range old {
		if !slices.Contains(now, line) {
			t.Error("gone: ", line)
		}
	}
	for _, line := range now {
		if !slices.Contains(old, line) {
			t.Error("new: ", line)
		}
	}
}

// outside is a namespace beside the machine: it is 192.0.2.2, the machine
// 192.0.2.1, and it knows no way to pods.
func outside(t testing.TB) string {
	t.Helper()
	ns := netnstest.New(t)
	netnstest.Cable(t, ns, "out0", "192.0.2.1/24", "192.0.2.2/24")
	return ns
}

func TestPods(t *testing.T) {
	for _, filtered := range []string{"0", "1"} {
		t.Run("br_netfilter="+filtered, func(t *testing.T) {
			const sysctl = "/proc/sys/net/bridge/bridge-nf-call-iptables"
			if err := os.WriteFile(sysctl, []byte(filtered), 0); err != nil && filtered == "1" {
				t.Skip("kernel without br_netfilter: ", err)
			}
			away := outside(t)
			serve(t, away, 80)
			n := fresh(t)
			a := attach(t, n, "a", HostPort{HostPort: 8080, PodPort: 80, Protocol: "tcp"}, HostPort{HostPort: 8080, PodPort: 80, Protocol: "udp"})
			b := attach(t, n, "b", HostPort{HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 8081, PodPort: 80, Protocol: "tcp"})
			if a.IPs[0].String() != "10.42.0.2" || b.IPs[0].String() != "10.42.0.3" {
				t.Fatalf("addresses are %v and %v", a.IPs, b.IPs)
			}
			serve(t, a.NetNS, 80)
			serve(t, b.NetNS, 80)
			serve(t, here, 7000)

			for _, proto := range []string{"tcp", "udp"} {
				wantCaller(t, b.NetNS, proto, "10.42.0.2:80", "10.42.0.3")
				wantCaller(t, a.NetNS, proto, "10.42.0.3:80", "10.42.0.2")
				wantCaller(t, here, proto, "10.42.0.2:80", "10.42.0.1")
				// Egress: the outside sees the machine.
				wantCaller(t, a.NetNS, proto, "192.0.2.2:80", "192.0.2.1")
				// Host ports: from outside, the machine, its loopback, another
				// pod and the pod itself.
				wantCaller(t, away, proto, "192.0.2.1:8080", "192.0.2.2")
				wantCaller(t, here, proto, "192.0.2.1:8080", "192.0.2.1")
				wantCaller(t, here, proto, "127.0.0.1:8080", "10.42.0.1")
				wantCaller(t, b.NetNS, proto, "192.0.2.1:8080", "10.42.0.3")
				wantCaller(t, a.NetNS, proto, "192.0.2.1:8080", "10.42.0.1")
			}
			wantCaller(t, a.NetNS, "tcp", "10.41.0.1:7000", "10.42.0.2")
			wantCaller(t, a.NetNS, "tcp", "192.0.2.1:7000", "10.42.0.2")
			wantCaller(t, away, "tcp", "192.0.2.1:8081", "192.0.2.2")
			wantNone(t, here, "127.0.0.1:8081")
			// The machine's own ports are not for host ports on its bridge.
			wantNone(t, b.NetNS, "10.41.0.1:8080")
		})
	}
}

func TestGuard(t *testing.T) {
	away := outside(t)
	n := fresh(t)
	a := attach(t, n, "a")
	serve(t, here, 7000)
	// Neither a pod nor a neighbour gets at loopback or at the pods' address
	// of the machine by routing packets to it.
	netnstest.Do(t, away, func() error {
		dst := netip.MustParsePrefix("10.41.0.1/32")
		return netlink.RouteAdd(&netlink.Route{Dst: ipNet(dst), Gw: net.ParseIP("192.0.2.1")})
	})
	wantNone(t, away, "10.41.0.1:7000")
	wantCaller(t, away, "tcp", "192.0.2.1:7000", "192.0.2.2")
	run(t, "nsenter", "--net="+a.NetNS, "sh", "-c",
		"sysctl -qw net.ipv4.conf.all.route_localnet=1 && ip addr del 127.0.0.1/8 dev lo && ip route add 127.0.0.0/8 via 10.41.0.1 dev eth0 onlink && ip rule add pref 0 lookup main && ip rule del pref 32766")
	wantNone(t, a.NetNS, "127.0.0.1:7000")
	wantCaller(t, a.NetNS, "tcp", "10.41.0.1:7000", "10.42.0.2")
	// A pod does not speak with another's address.
	run(t, "nsenter", "--net="+a.NetNS, "sh", "-c", "ip addr add 198.51.100.9/32 dev eth0 && ip route replace default via 10.41.0.1 dev eth0 onlink src 198.51.100.9")
	wantNone(t, a.NetNS, "10.41.0.1:7000")
}

func TestDetachLeavesNothing(t *testing.T) {
	n := fresh(t)
	port := HostPort{HostPort: 5353, PodPort: 53, Protocol: "udp"}
	keep := attach(t, n, "keep")
	before := machine(t)
	a := attach(t, n, "a", port)
	serve(t, a.NetNS, 53)
	wantCaller(t, here, "udp", "127.0.0.1:5353", "10.42.0.1")
	for range 2 {
		if err := n.Detach(t.Context(), "a"); err != nil {
			t.Fatal(err)
		}
	}
	wantLinks(t, 1)
	wantSame(t, before, machine(t))
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.FAMILY_V4)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range flows {
		if f.Forward.DstPort == 5353 {
			t.Errorf("flow left: %s", f)
		}
	}
	if _, err := os.Stat(a.NetNS); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("namespace left: %v", err)
	}
	if list, _ := n.List(t.Context()); len(list) != 1 || list[0].ID != keep.ID {
		t.Errorf("list: %v", list)
	}
	// The port moves to another pod, for a client that never stopped sending.
	c, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	to := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 5353}
	for _, id := range []string{"b", "c"} {
		_, _ = c.WriteTo([]byte("nobody listens"), to)
		p := attach(t, n, id, port)
		serve(t, p.NetNS, 53)
		_, _ = c.WriteTo([]byte("who?"), to)
		_ = c.SetReadDeadline(time.Now().Add(patience))
		if _, _, err := c.ReadFrom(make([]byte, 64)); err != nil {
			t.Errorf("pod %s: %v", id, err)
		}
		if err := n.Detach(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
}

// wantLinks waits until the bridge has so many ports.
func wantLinks(t *testing.T, count int) {
	t.Helper()
	deadline := time.Now().Add(2 * patience)
	for {
		links := run(t, "ip", "-o", "link", "show", "master", "tutti0")
		if strings.Count(links, "\n") == count {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("links: %s", links)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestSweep(t *testing.T) {
	n := fresh(t)
	a := attach(t, n, "a")
	held, err := os.Open(a.NetNS) // as a process that does not die would
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := n.Detach(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	// Attached again at once, it gets another namespace and no trouble.
	b := attach(t, n, "a")
	serve(t, b.NetNS, 80)
	wantCaller(t, here, "tcp", b.IPs[0].String()+":80", "10.42.0.1")
	if err := n.Detach(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	attach(t, n, "c")
	held, err = os.Open(attach(t, n, "d").NetNS)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if err := n.Detach(t.Context(), "d"); err != nil {
		t.Fatal(err)
	}
	wantLinks(t, 1)
	// What a crash has left goes when the network opens again.
	if err := n.leases.release("c"); err != nil {
		t.Fatal(err)
	}
	n.Close()
	n = open(t, n.cfg.Dir)
	wantLinks(t, 0)
}

func TestRestart(t *testing.T) {
	n := fresh(t)
	ports := []HostPort{{HostPort: 8080, PodPort: 80, Protocol: "tcp"}}
	a, b := attach(t, n, "a", ports...), attach(t, n, "b")
	serve(t, a.NetNS, 80)
	before := machine(t)
	n.Close()
	n = open(t, n.cfg.Dir)
	// Known pods need no range: it may come long after the start.
	if again := attach(t, n, "a", ports...); !slices.Equal(again.IPs, a.IPs) || again.NetNS != a.NetNS {
		t.Errorf("attached again: %v, was %v", again, a)
	}
	if _, err := n.Attach(t.Context(), Pod{ID: "c"}); err == nil {
		t.Error("attached a new pod without a range")
	}
	if err := n.SetRange(t.Context(), netip.MustParsePrefix("10.42.7.0/24")); err == nil {
		t.Error("changed the range under pods")
	}
	if err := n.SetRange(t.Context(), pods); err != nil {
		t.Fatal(err)
	}
	wantSame(t, before, machine(t))
	wantCaller(t, b.NetNS, "tcp", "10.42.0.2:80", "10.42.0.3")
	wantCaller(t, here, "tcp", "127.0.0.1:8080", "10.42.0.1")
	list, err := n.List(t.Context())
	if err != nil || len(list) != 2 || !slices.Equal(list[0].Ports, ports) {
		t.Errorf("list: %v, %v", list, err)
	}

	// A machine that restarted has lost links and mounts.
	if err := removeBridge("tutti0"); err != nil {
		t.Fatal(err)
	}
	if err := netns.Remove(b.NetNS); err != nil {
		t.Fatal(err)
	}
	n.Close()
	n = open(t, n.cfg.Dir)
	if err := n.SetRange(t.Context(), pods); err != nil {
		t.Fatal(err)
	}
	attach(t, n, "a", ports...)
	if again := attach(t, n, "b"); !slices.Equal(again.IPs, b.IPs) {
		t.Errorf("attached again: %v, was %v", again, b)
	}
	wantCaller(t, b.NetNS, "tcp", "10.42.0.2:80", "10.42.0.3")
}

func TestPurge(t *testing.T) {
	// The machine had forwarding on one link only.
	outside(t)
	if err := os.WriteFile("/proc/sys/net/ipv4/conf/out0/forwarding", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	before := machine(t)
	dir := t.TempDir()
	n := open(t, dir)
	if err := n.SetRange(t.Context(), pods); err != nil {
		t.Fatal(err)
	}
	var had [3]Attachment
	for i := range had {
		had[i] = attach(t, n, fmt.Sprint("pod", i), HostPort{HostPort: uint16(8080 + i), PodPort: 80, Protocol: "tcp"})
	}
	run(t, "nft", "add table ip kube-proxy; add table ip6 kube-proxy; add table ip other")
	run(t, "nft", "delete table ip other")
	for range 2 {
		if err := Purge(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		wantSame(t, before, machine(t))
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 || left[0].Name() != "leases" {
		t.Errorf("left: %v", left)
	}

	// Whoever comes back first, each has its address.
	n = open(t, dir)
	if err := n.SetRange(t.Context(), pods); err != nil {
		t.Fatal(err)
	}
	attach(t, n, "another")
	for i := len(had) - 1; i >= 0; i-- {
		if again := attach(t, n, had[i].ID, had[i].Ports...); !slices.Equal(again.IPs, had[i].IPs) {
			t.Errorf("%s comes back with %s, had %s", had[i].ID, again.IPs, had[i].IPs)
		}
	}
	if err := Purge(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
}

func TestBridgeNameTaken(t *testing.T) {
	dir := t.TempDir()
	run(t, "ip", "link", "add", "tutti0", "type", "veth", "peer", "name", "tutti1")
	defer run(t, "ip", "link", "del", "tutti0")
	_, err := New(t.Context(), Config{Dir: dir, Bridge: "tutti0", Local: netip.MustParseAddr("10.41.0.1"), Cluster: pods, Service: pods}, slog.New(slog.DiscardHandler))
	if err == nil || err.Error() != "prepare pod network: link tutti0 exists and is no bridge but a veth; remove or rename it" {
		t.Errorf("error %v", err)
	}
}

func TestRefusals(t *testing.T) {
	n := fresh(t)
	attach(t, n, "a", HostPort{HostPort: 80, PodPort: 80, Protocol: "tcp"})
	for _, pod := range []Pod{
		{ID: ""}, {ID: ".."}, {ID: "a/b"},
		{ID: "b", Ports: []HostPort{{HostPort: 80, PodPort: 81, Protocol: "tcp"}}},
		{ID: "b", Ports: []HostPort{{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 80, PodPort: 81, Protocol: "tcp"}}},
		{ID: "b", Ports: []HostPort{{HostPort: 81, PodPort: 81, Protocol: "icmp"}}},
		{ID: "b", Ports: []HostPort{{HostPort: 81, Protocol: "tcp"}}},
		{ID: "a", Ports: nil},
	} {
		if _, err := n.Attach(t.Context(), pod); err == nil {
			t.Errorf("attached %v", pod)
		} else {
			t.Log(err)
		}
	}
	if list, _ := n.List(t.Context()); len(list) != 1 {
		t.Errorf("list: %v", list)
	}
}

// TestAtOnce sends one packet to a pod that has just been attached: nothing
// repeats it if it is lost.
func TestAtOnce(t *testing.T) {
	n := fresh(t)
	c, err := net.ListenPacket("udp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i := range 30 {
		a := attach(t, n, fmt.Sprint("pod", i))
		_, _ = c.WriteTo([]byte("?"), &net.UDPAddr{IP: a.IPs[0].AsSlice(), Port: 9})
		// Nobody listens: the pod's kernel says so.
		var stats string
		for start := time.Now(); !strings.Contains(stats, " 1 "); {
			stats = run(t, "nsenter", "--net="+a.NetNS, "sh", "-c", "grep ^Udp: /proc/net/snmp | tail -n1 | cut -d' ' -f3 | sed 's/.*/ & /'")
			if time.Since(start) > time.Second {
				t.Fatalf("pod %d: the packet is lost", i)
			}
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	n := fresh(t)
	const count = 60
	var group sync.WaitGroup
	var mu sync.Mutex
	seen := map[netip.Addr]string{}
	for i := range count {
		for range 2 { // each asked for twice
			group.Go(func() {
				a, err := n.Attach(t.Context(), Pod{ID: fmt.Sprint("pod", i)})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				defer mu.Unlock()
				if other, taken := seen[a.IPs[0]]; taken && other != a.ID {
					t.Errorf("%s and %s share %s", a.ID, other, a.IPs[0])
				}
				seen[a.IPs[0]] = a.ID
			})
		}
	}
	group.Wait()
	if len(seen) != count {
		t.Errorf("%d addresses for %d pods", len(seen), count)
	}
	for i := range count {
		group.Go(func() {
			if err := n.Detach(t.Context(), fmt.Sprint("pod", i)); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	wantLinks(t, 0)
}

// A pod gets no port that the machine needs itself, that another pod has, or
// that is none; and no address when there is no more.
func TestGrantRefuses(t *testing.T) {
	l, err := openLeases(t.TempDir(), []HostPort{{HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 6443, Protocol: "tcp"}}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	pool := netip.MustParsePrefix("10.42.0.0/29")
	if _, err := l.grant(Pod{ID: "a", Ports: []HostPort{{HostPort: 80, PodPort: 80, Protocol: "tcp"}}}, pool); err != nil {
		t.Fatal(err)
	}
	elsewhere := HostPort{HostIP: netip.MustParseAddr("192.0.2.1"), HostPort: 6443, PodPort: 1, Protocol: "tcp"}
	if _, err := l.grant(Pod{ID: "b", Ports: []HostPort{elsewhere}}, pool); err != nil {
		t.Errorf("the API's port at an address where the API is not: %v", err)
	}
	for _, c := range []struct {
		port HostPort
		pool netip.Prefix
		want string
	}{
		{HostPort{HostPort: 6443, PodPort: 1, Protocol: "tcp"}, pool, "host port 6443/tcp is this machine's own; choose another"},
		{HostPort{HostPort: 80, PodPort: 1, Protocol: "tcp"}, pool, "host port 80/tcp is taken by pod a; choose another, or remove that pod"},
		{HostPort{HostPort: 81, PodPort: 1, Protocol: "icmp"}, pool, `host port 81 has unknown protocol "icmp"`},
		{HostPort{HostPort: 82, PodPort: 1, Protocol: "tcp"}, netip.MustParsePrefix("10.42.0.0/31"), "all addresses of 10.42.0.0/31 are in use; remove pods, or begin anew with a larger --cluster-cidr"},
		{HostPort{HostPort: 82, PodPort: 1, Protocol: "tcp"}, netip.Prefix{}, "this machine has no range of pod addresses yet"},
	} {
		if _, err := l.grant(Pod{ID: "c", Ports: []HostPort{c.port}}, c.pool); err == nil || err.Error() != c.want {
			t.Errorf("error %v, want %s", err, c.want)
		}
	}
}

func TestNextFree(t *testing.T) {
	for _, c := range []struct {
		pool, last string
		taken      []string
		want       string
	}{
		{"10.42.0.0/24", "", nil, "10.42.0.2"},
		{"10.42.0.0/24", "10.42.0.2", nil, "10.42.0.3"},
		{"10.42.0.0/24", "10.42.0.9", []string{"10.42.0.10"}, "10.42.0.11"},
		{"10.42.0.0/24", "10.42.0.254", nil, "10.42.0.2"},
		{"10.42.0.0/24", "10.42.9.9", nil, "10.42.0.2"},
		{"10.42.0.0/30", "", nil, "10.42.0.2"},
		{"10.42.0.0/30", "10.42.0.2", nil, "10.42.0.2"},
		{"10.42.0.0/30", "", []string{"10.42.0.2"}, ""},
		{"10.42.0.0/29", "10.42.0.5", []string{"10.42.0.6", "10.42.0.2"}, "10.42.0.3"},
		{"10.42.0.0/31", "", nil, ""},
	} {
		var last netip.Addr
		if c.last != "" {
			last = netip.MustParseAddr(c.last)
		}
		got, ok := nextFree(netip.MustParsePrefix(c.pool), last, func(a netip.Addr) bool { return slices.Contains(c.taken, a.String()) })
		if ok != (c.want != "") || ok && got.String() != c.want {
			t.Errorf("%v: got %v, %v", c, got, ok)
		}
	}
}

func BenchmarkAttach(b *testing.B) {
	for _, parallel := range []int{1, 8} {
		b.Run(fmt.Sprint("at once=", parallel), func(b *testing.B) {
			n := fresh(b)
			var mu sync.Mutex
			var attached, detached []time.Duration
			gate := make(chan int)
			var group sync.WaitGroup
			for range parallel {
				group.Go(func() {
					for i := range gate {
						id := fmt.Sprint("pod", i)
						start := time.Now()
						_, err := n.Attach(b.Context(), Pod{ID: id})
						up := time.Since(start)
						if err == nil {
							err = n.Detach(b.Context(), id)
						}
						down := time.Since(start) - up
						if err != nil {
							b.Error(err)
						}
						mu.Lock()
						attached, detached = append(attached, up), append(detached, down)
						mu.Unlock()
					}
				})
			}
			for i := range b.N {
				gate <- i
			}
			close(gate)
			group.Wait()
			for name, d := range map[string][]time.Duration{"attach": attached, "detach": detached} {
				slices.Sort(d)
				b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-p50-ms")
				b.ReportMetric(float64(d[len(d)*99/100].Microseconds())/1000, name+"-p99-ms")
			}
		})
	}
}
