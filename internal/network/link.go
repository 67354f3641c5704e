package network

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/netns"
)

// linkPrefix begins the names of pod links in the machine's namespace.
const linkPrefix = "tutti"

func linkName(id string) string {
	sum := sha256.Sum256([]byte(id))
	return linkPrefix + hex.EncodeToString(sum[:])[:10]
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func single(ip netip.Addr) netip.Prefix { return netip.PrefixFrom(ip, ip.BitLen()) }

// ensureBridge makes the bridge, or corrects the one that is there.
func (n *Network) ensureBridge() error {
	link, err := n.kernel.LinkByName(n.cfg.Bridge)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MTU = n.cfg.Bridge, n.cfg.MTU
		// An address that was set stays; one that was not would follow the ports'.
		attrs.HardwareAddr = hardwareAddr(n.cfg.Local)
		snooping := false
		if err := n.kernel.LinkAdd(&netlink.Bridge{LinkAttrs: attrs, MulticastSnooping: &snooping}); err != nil {
			return fmt.Errorf("add bridge %s: %w", n.cfg.Bridge, err)
		}
		link, err = n.kernel.LinkByName(n.cfg.Bridge)
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.cfg.Bridge, err)
	}
	if link.Type() != "bridge" {
		return fmt.Errorf("link %s exists and is no bridge but a %s; remove or rename it", n.cfg.Bridge, link.Type())
	}
	n.bridge = link.Attrs().Index
	conf := "net/ipv4/conf/" + n.cfg.Bridge
	for name, value := range map[string]string{
		conf + "/route_localnet":                          "1", // host ports on 127.0.0.1; table tutti guards what this opens
		conf + "/rp_filter":                               "1", // a pod sends from its own address only
		conf + "/send_redirects":                          "0",
		"net/ipv6/conf/" + n.cfg.Bridge + "/disable_ipv6": "1",
	} {
		if err := writeSysctl(name, value); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	if err := n.kernel.AddrReplace(link, &netlink.Addr{IPNet: ipNet(single(n.cfg.Local))}); err != nil {
		return fmt.Errorf("give %s to bridge %s: %w", n.cfg.Local, n.cfg.Bridge, err)
	}
	if err := n.kernel.LinkSetUp(link); err != nil {
		return fmt.Errorf("set bridge %s up: %w", n.cfg.Bridge, err)
	}
	return nil
}

// setBridgeRange makes the range's first address the bridge's only one beside
// the local, and sends Services to it, so that they can be reached from a
// machine without a default route.
func (n *Network) setBridgeRange(r netip.Prefix) error {
	link, err := n.kernel.LinkByIndex(n.bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", n.cfg.Bridge, err)
	}
	want := netlink.Addr{IPNet: ipNet(netip.PrefixFrom(gateway(r), r.Bits()))}
	have, err := n.kernel.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return fmt.Errorf("list addresses of bridge %s: %w", n.cfg.Bridge, err)
	}
	for _, a := range have {
		if !a.Equal(want) && a.IP.String() != n.cfg.Local.String() {
			if err := n.kernel.AddrDel(link, &a); err != nil {
				return fmt.Errorf("take %s from bridge %s: %w", a.IPNet, n.cfg.Bridge, err)
			}
		}
	}
	if err := n.kernel.AddrReplace(link, &want); err != nil {
		return fmt.Errorf("give %s to bridge %s: %w", want.IPNet, n.cfg.Bridge, err)
	}
	if err := n.kernel.RouteReplace(&netlink.Route{
		LinkIndex: n.bridge, Dst: ipNet(n.cfg.Service), Src: gateway(r).AsSlice(), Scope: netlink.SCOPE_LINK,
	}); err != nil {
		return fmt.Errorf("route %s to bridge %s: %w", n.cfg.Service, n.cfg.Bridge, err)
	}
	return nil
}

// grace is how long a detached pod's link may take to go with its namespace.
// The kernel removes such links many at a time; removing them one by one
// would hold up every other change to links for some 20 ms each.
const grace = 2 * time.Second

// sweep removes links and namespaces that belong to no lease: those that a
// process still held on to, or that a crash has left.
func (n *Network) sweep() {
	n.sweeping.Lock()
	defer n.sweeping.Unlock()
	if n.closed {
		return
	}
	// Leases are read after links, and granted before them: no link is swept
	// that is just being made.
	links, err := podLinks(n.kernel.LinkList, n.bridge)
	if err != nil {
		n.log.Warn("Cannot look for forgotten links", "err", err)
		return
	}
	pins, err := os.ReadDir(filepath.Join(n.cfg.Dir, "netns"))
	if err != nil {
		n.log.Warn("Cannot look for forgotten network namespaces", "err", err)
		return
	}
	wanted := map[string]bool{}
	for _, l := range n.leases.all() {
		wanted[linkName(l.ID)], wanted[l.ID] = true, true
	}
	for _, l := range links {
		if name := l.Attrs().Name; !wanted[name] {
			n.log.Info("Removing the link of a detached pod", "link", name)
			if err := removeLink(n.kernel.LinkDel, l); err != nil {
				n.log.Warn("Cannot remove a link", "link", name, "err", err)
			}
		}
	}
	for _, p := range pins {
		if !wanted[p.Name()] {
			if err := netns.Remove(n.netnsPath(p.Name())); err != nil {
				n.log.Warn("Cannot remove a network namespace", "pod", p.Name(), "err", err)
			}
		}
	}
}

// podLinks returns the ports of the bridge that we have made.
func podLinks(list func() ([]netlink.Link, error), bridge int) ([]netlink.Link, error) {
	links, err := list()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("list links: %w", err)
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool {
		return l.Attrs().MasterIndex != bridge || !strings.HasPrefix(l.Attrs().Name, linkPrefix)
	}), nil
}

// removeBridge removes the bridge and all pod links on it.
func removeBridge(name string) error {
	bridge, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", name, err)
	}
	links, err := podLinks(netlink.LinkList, bridge.Attrs().Index)
	if err != nil {
		return err
	}
	for _, l := range links {
		if err := removeLink(netlink.LinkDel, l); err != nil {
			return err
		}
	}
	return removeLink(netlink.LinkDel, bridge)
}

func removeLink(del func(netlink.Link) error, l netlink.Link) error {
	if err := del(l); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link %s: %w", l.Attrs().Name, err)
	}
	return nil
}

// link gives the pod its namespace, which is the one at made unless that is
// "", and its link, if it has not got them. The machine's end is set up last: a
// link that is up is complete.
func (n *Network) link(l lease, made string) error {
	name, path := linkName(l.ID), n.netnsPath(l.ID)
	pinned, err := netns.Pinned(path)
	if err != nil {
		return err
	}
	if made != "" && pinned {
		pinned, err = netns.Same(made, path)
		if err == nil && !pinned {
			err = netns.Remove(path)
		}
		if err != nil {
			return err
		}
	}
	if made != "" && !pinned {
		if err := netns.Pin(made, path); err != nil {
			return err
		}
	}
	old, err := n.kernel.LinkByName(name)
	switch {
	case errors.As(err, &netlink.LinkNotFoundError{}):
	case err != nil:
		return fmt.Errorf("find link %s: %w", name, err)
	case pinned && old.Attrs().Flags&net.FlagUp != 0:
		return nil
	default:
		if err := removeLink(n.kernel.LinkDel, old); err != nil {
			return err
		}
	}

	var inside *netlink.Handle
	if err := netns.Create(path, func() (err error) {
		// As container runtimes do: no pod needs a privilege to listen on a
		// low port or to ping within its own namespace.
		if err := writeSysctl("net/ipv4/ip_unprivileged_port_start", "0"); err != nil {
			return err
		}
		if err := writeSysctl("net/ipv4/ping_group_range", "0 2147483647"); err != nil {
			return err
		}
		inside, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	}); err != nil {
		return err
	}
	defer inside.Close()
	ns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer ns.Close()

	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.MasterIndex = name, n.cfg.MTU, n.bridge
	attrs.NumTxQueues, attrs.NumRxQueues = 1, 1
	veth := &netlink.Veth{
		LinkAttrs: attrs, PeerName: "eth0", PeerHardwareAddr: hardwareAddr(l.IP),
		PeerNamespace: netlink.NsFd(ns.Fd()),
	}
	if err := n.kernel.LinkAdd(veth); err != nil {
		return fmt.Errorf("add link %s: %w", name, err)
	}
	eth0, err := n.configurePodEnd(inside, l.IP)
	if err != nil {
		return err
	}
	port, err := n.configureMachineEnd(name, l.IP)
	if err != nil {
		return err
	}
	pod, machine := vnetns.NsHandle(ns.Fd()), vnetns.None()
	return errors.Join(waitUp(inside, pod, eth0), waitUp(n.kernel, machine, port), waitUp(n.kernel, machine, n.bridge))
}

// waitUp waits until a link that has been set up takes packets. The kernel
// gets round to that a little later, except that newer ones (6.13) do it at
// once for whoever asks. ns is the namespace that kernel looks at.
func waitUp(kernel *netlink.Handle, ns vnetns.NsHandle, index int) error {
	up := func() (bool, error) {
		link, err := kernel.LinkByIndex(index)
		if err != nil {
			return false, fmt.Errorf("look whether link %d is up: %w", index, err)
		}
		return link.Attrs().OperState == netlink.OperUp, nil
	}
	if is, err := up(); is || err != nil {
		return err
	}
	changed, done := make(chan netlink.LinkUpdate), make(chan struct{})
	defer func() {
		close(done)
		go func() { // the library must not be left writing
			for range changed {
			}
		}()
	}()
	if err := netlink.LinkSubscribeWithOptions(changed, done, netlink.LinkSubscribeOptions{Namespace: &ns}); err != nil {
		close(changed)
		return fmt.Errorf("watch link %d: %w", index, err)
	}
	late := time.After(grace)
	for {
		// After the subscription, so that no change falls in between.
		if is, err := up(); is || err != nil {
			return err
		}
		select {
		case _, ok := <-changed:
			if !ok {
				return fmt.Errorf("watch link %d: the kernel ended it", index)
			}
		case <-late:
			return fmt.Errorf("link %d does not come up within %v", index, grace)
		}
	}
}

// configurePodEnd returns the index of the pod's end of the link.
func (n *Network) configurePodEnd(inside *netlink.Handle, ip netip.Addr) (int, error) {
	lo, err := inside.LinkByName("lo")
	if err == nil {
		err = inside.LinkSetUp(lo)
	}
	if err != nil {
		return 0, fmt.Errorf("set lo of the pod up: %w", err)
	}
	eth0, err := inside.LinkByName("eth0")
	if err != nil {
		return 0, fmt.Errorf("find eth0 of the pod: %w", err)
	}
	index := eth0.Attrs().Index
	if err := inside.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(single(ip))}); err != nil {
		return 0, fmt.Errorf("give %s to the pod: %w", ip, err)
	}
	if err := inside.LinkSetUp(eth0); err != nil {
		return 0, fmt.Errorf("set eth0 of the pod up: %w", err)
	}
	if err := inside.NeighSet(&netlink.Neigh{
		LinkIndex: index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
		IP: n.cfg.Local.AsSlice(), HardwareAddr: hardwareAddr(n.cfg.Local),
	}); err != nil {
		return 0, fmt.Errorf("tell the pod of its neighbour %s: %w", n.cfg.Local, err)
	}
	if err := inside.RouteAdd(&netlink.Route{
		LinkIndex: index, Gw: n.cfg.Local.AsSlice(), Flags: int(netlink.FLAG_ONLINK),
	}); err != nil {
		return 0, fmt.Errorf("give the pod its default route: %w", err)
	}
	return index, nil
}

// configureMachineEnd returns the index of the machine's end of the link.
func (n *Network) configureMachineEnd(name string, ip netip.Addr) (int, error) {
	link, err := n.kernel.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("find link %s: %w", name, err)
	}
	index, mac := link.Attrs().Index, net.HardwareAddr(hardwareAddr(ip))
	if err := n.kernel.NeighSet(&netlink.Neigh{
		LinkIndex: n.bridge, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: mac,
	}); err != nil {
		return 0, fmt.Errorf("note neighbour %s: %w", ip, err)
	}
	if err := n.kernel.NeighSet(&netlink.Neigh{
		LinkIndex: index, Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER, State: netlink.NUD_NOARP, HardwareAddr: mac,
	}); err != nil {
		return 0, fmt.Errorf("note %s behind link %s: %w", mac, name, err)
	}
	if err := setPortUp(index); err != nil {
		return 0, fmt.Errorf("set link %s up: %w", name, err)
	}
	return index, nil
}

// setPortUp configures a port of the bridge and sets it up, in one message.
// The port gets no IPv6 address. It neither learns nor floods, for every
// address behind the bridge is known. Frames may go back where they came
// from: with br_netfilter, a pod that calls itself by a Service's address
// sends such.
func setPortUp(index int) error {
	req := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_UNSPEC)
	msg.Index, msg.Flags, msg.Change = int32(index), unix.IFF_UP, unix.IFF_UP
	req.AddData(msg)

	families := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
	families.AddRtAttr(unix.AF_INET6, nil).AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, nl.Uint8Attr(nl.IN6_ADDR_GEN_MODE_NONE))
	req.AddData(families)

	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_SLAVE_KIND, nl.ZeroTerminated("bridge"))
	port := info.AddRtAttr(nl.IFLA_INFO_SLAVE_DATA, nil)
	for attr, on := range map[int]uint8{
		nl.IFLA_BRPORT_LEARNING:      0,
		nl.IFLA_BRPORT_UNICAST_FLOOD: 0,
		nl.IFLA_BRPORT_MCAST_FLOOD:   0,
		nl.IFLA_BRPORT_BCAST_FLOOD:   0,
		nl.IFLA_BRPORT_MODE:          1,
	} {
		port.AddRtAttr(attr, nl.Uint8Attr(on))
	}
	req.AddData(info)
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

func (n *Network) forgetNeighbour(l lease) error {
	err := n.kernel.NeighDel(&netlink.Neigh{LinkIndex: n.bridge, Family: netlink.FAMILY_V4, IP: l.IP.AsSlice()})
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("forget neighbour %s: %w", l.IP, err)
	}
	return nil
}

// forgetFlows drops what connection tracking knows of the lease's UDP host
// ports. UDP has no connections that end: a client that keeps sending would
// stay with the pod that was there before, or with none.
func (n *Network) forgetFlows(l lease) error {
	var filters []netlink.CustomConntrackFilter
	for _, p := range l.Ports {
		if p.Protocol != "udp" {
			continue
		}
		f := &netlink.ConntrackFilter{}
		if err := errors.Join(f.AddProtocol(unix.IPPROTO_UDP), f.AddPort(netlink.ConntrackOrigDstPort, p.HostPort)); err != nil {
			return err
		}
		if !p.everywhere() {
			if err := f.AddIP(netlink.ConntrackOrigDstIP, p.HostIP.AsSlice()); err != nil {
				return err
			}
		}
		filters = append(filters, f)
	}
	if len(filters) == 0 {
		return nil
	}
	_, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, unix.AF_INET, filters...)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("forget flows to host ports: %w", err)
	}
	return nil
}

// defaultMTU is that of the link of the default route.
func defaultMTU(kernel *netlink.Handle) int {
	routes, err := kernel.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Dst: nil}, netlink.RT_FILTER_DST)
	if err == nil {
		for _, r := range routes {
			if link, err := kernel.LinkByIndex(r.LinkIndex); err == nil {
				return link.Attrs().MTU
			}
		}
	}
	return 1500
}
