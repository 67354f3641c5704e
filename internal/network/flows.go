package network

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/api"
)

// Flows returns who talks to whom, as far as a pod of the cluster is among them, ordered. It reads the kernel's
// connection tracking once and changes nothing. Since pods reach each other by routing alone, nothing escapes that;
// what a pod says to itself is not in it.
func (n *Network) Flows() ([]api.Flow, error) {
	own, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list the machine's addresses: %w", err)
	}
	local := map[netip.Addr]bool{}
	for _, a := range own {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			local[p.Addr()] = true
		}
	}
	table, err := n.kernel.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) { // then it has grown meanwhile: most of it is there
		return nil, fmt.Errorf("read connection tracking: %w", err)
	}
	return flows(table, n.cfg.Cluster, local), nil
}

// flows sums up connections that differ in nothing but the opener's port.
func flows(table []*netlink.ConntrackFlow, cluster netip.Prefix, local map[netip.Addr]bool) []api.Flow {
	sums := map[api.Flow]*api.Flow{}
	for _, c := range table {
		protocol, known := protocols[c.Forward.Protocol]
		from, to, at := address(c.Forward.SrcIP), address(c.Forward.DstIP), address(c.Reverse.SrcIP)
		if !known || !cluster.Contains(from) && !cluster.Contains(at) {
			continue
		}
		key := api.Flow{
			Protocol: protocol, From: from,
			To: netip.AddrPortFrom(to, c.Forward.DstPort), At: netip.AddrPortFrom(at, c.Reverse.SrcPort),
			FromNode: local[from], AtNode: local[at],
		}
		sum := sums[key]
		if sum == nil {
			one := key
			sum = &one
			sums[key] = sum
		}
		state := uint8(nl.TCP_CONNTRACK_NONE)
		if tcp, ok := c.ProtoInfo.(*netlink.ProtoInfoTCP); ok {
			state = tcp.State
		}
		switch state {
		case nl.TCP_CONNTRACK_ESTABLISHED:
			sum.Open++
		case nl.TCP_CONNTRACK_SYN_SENT:
			sum.Waiting++
		default:
			sum.Recent++
		}
		sum.Bytes += c.Forward.Bytes + c.Reverse.Bytes
	}
	all := make([]api.Flow, 0, len(sums))
	for _, f := range sums {
		all = append(all, *f)
	}
	slices.SortFunc(all, func(a, b api.Flow) int {
		return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To), a.At.Compare(b.At), cmp.Compare(a.Protocol, b.Protocol))
	})
	return all
}

var protocols = map[uint8]string{unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_SCTP: "sctp"}

func address(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}
