package network

import (
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/host/netns/netnstest"
)

// tell is a flow as one line.
func tell(f api.Flow) string {
	who := func(addr any, node bool) string {
		if node {
			return fmt.Sprint("node ", addr)
		}
		return fmt.Sprint(addr)
	}
	text := fmt.Sprintf("%s %s to %s at %s", f.Protocol, who(f.From, f.FromNode), f.To, who(f.At, f.AtNode))
	for _, c := range []struct {
		count int
		what  string
	}{{f.Open, "open"}, {f.Waiting, "waiting"}, {f.Recent, "recent"}} {
		if c.count > 0 {
			text += fmt.Sprintf(", %d %s", c.count, c.what)
		}
	}
	return text
}

// The kernel's own connections are seen: pod to pod on one bridge, by a host
// port, from and to the outside, open and ended,
// and one without an answer.
func TestFlows(t *testing.T) {
	away := outside(t)
	serve(t, away, 80)
	n := fresh(t)
	a := attach(t, n, "a", HostPort{HostPort: 8080, PodPort: 80, Protocol: "tcp"})
	b := attach(t, n, "b")
	serve(t, a.NetNS, 80)
	want := []string{}
	expect := func(line string) { want = append(want, line) }

	var held net.Conn
	listen := func(ns string) { // accepts and keeps
		var l net.Listener
		netnstest.Do(t, ns, func() (err error) { l, err = net.Listen("tcp4", ":9000"); return err })
		t.Cleanup(func() { l.Close() })
	}
	listen(a.NetNS)
	netnstest.Do(t, b.NetNS, func() (err error) {
		held, err = net.DialTimeout("tcp", "10.42.0.2:9000", patience)
		return err
	})
	defer held.Close()
	expect("tcp 10.42.0.3 to 10.42.0.2:9000 at 10.42.0.2:9000, 1 open")

	for range 2 {
		wantCaller(t, b.NetNS, "tcp", "10.42.0.2:80", "10.42.0.3")
	}
	expect("tcp 10.42.0.3 to 10.42.0.2:80 at 10.42.0.2:80, 2 recent")
	wantCaller(t, b.NetNS, "udp", "10.42.0.2:80", "10.42.0.3")
	expect("udp 10.42.0.3 to 10.42.0.2:80 at 10.42.0.2:80, 1 recent")
	wantCaller(t, away, "tcp", "192.0.2.1:8080", "192.0.2.2")
	expect("tcp 192.0.2.2 to 192.0.2.1:8080 at 10.42.0.2:80, 1 recent")
	wantCaller(t, b.NetNS, "tcp", "192.0.2.2:80", "192.0.2.1")
	expect("tcp 10.42.0.3 to 192.0.2.2:80 at 192.0.2.2:80, 1 recent")
	wantCaller(t, here, "tcp", "10.42.0.2:80", "10.42.0.1")
	expect("tcp node 10.42.0.1 to 10.42.0.2:80 at 10.42.0.2:80, 1 recent")
	wantCaller(t, away, "tcp", "127.0.0.1:80", "127.0.0.1") // no pod's

	// The pod swallows what comes to port 81.
	netnstest.Do(t, a.NetNS, func() error {
		return exec.Command("nft", "add table ip mute; add chain ip mute in { type filter hook input priority 0; }; add rule ip mute in tcp dport 81 drop").Run()
	})
	wantNone(t, b.NetNS, "10.42.0.2:81")
	expect("tcp 10.42.0.3 to 10.42.0.2:81 at 10.42.0.2:81, 1 waiting")

	for deadline := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		all, err := n.Flows()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, f := range all {
			got = append(got, tell(f))
		}
		slices.Sort(got)
		slices.Sort(want)
		if slices.Equal(got, want) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
}

func TestSumOfFlows(t *testing.T) {
	ip := func(s string) net.IP { return net.ParseIP(s) }
	tcp := func(state uint8, from string, port uint16, to string, at string, bytes uint64) *netlink.ConntrackFlow {
		return &netlink.ConntrackFlow{
			Forward:   netlink.IPTuple{Protocol: unix.IPPROTO_TCP, SrcIP: ip(from), SrcPort: port, DstIP: ip(to), DstPort: 80, Bytes: bytes},
			Reverse:   netlink.IPTuple{Protocol: unix.IPPROTO_TCP, SrcIP: ip(at), SrcPort: 8080, DstIP: ip(from), DstPort: port, Bytes: bytes},
			ProtoInfo: &netlink.ProtoInfoTCP{State: state},
		}
	}
	table := []*netlink.ConntrackFlow{
		tcp(nl.TCP_CONNTRACK_ESTABLISHED, "10.42.0.2", 1, "10.43.0.9", "10.42.0.3", 5),
		tcp(nl.TCP_CONNTRACK_ESTABLISHED, "10.42.0.2", 2, "10.43.0.9", "10.42.0.3", 5),
		tcp(nl.TCP_CONNTRACK_TIME_WAIT, "10.42.0.2", 3, "10.43.0.9", "10.42.0.3", 1),
		tcp(nl.TCP_CONNTRACK_SYN_SENT, "10.42.0.2", 4, "10.43.0.9", "10.42.0.4", 1),
		tcp(nl.TCP_CONNTRACK_ESTABLISHED, "192.0.2.1", 5, "192.0.2.2", "192.0.2.2", 1),
		{Forward: netlink.IPTuple{Protocol: unix.IPPROTO_ICMP, SrcIP: ip("10.42.0.2"), DstIP: ip("10.42.0.3")}},
	}
	all := flows(table, netip.MustParsePrefix("10.42.0.0/16"), nil)
	var got []string
	for _, f := range all {
		got = append(got, fmt.Sprint(tell(f), " ", f.Bytes))
	}
	want := []string{
		"tcp 10.42.0.2 to 10.43.0.9:80 at 10.42.0.3:8080, 2 open, 1 recent 22",
		"tcp 10.42.0.2 to 10.43.0.9:80 at 10.42.0.4:8080, 1 waiting 2",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s", strings.Join(got, "\n"))
	}
}
