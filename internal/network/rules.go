package network

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os/exec"
	"strconv"

	"sigs.k8s.io/knftables"
)

const (
	table = "tutti"

	// Host ports by protocol and port, open on every address; by address,
	// protocol and port; and the pods behind them, that may call themselves.
	anyAddress = "host-ports"
	oneAddress = "host-ports-at"
	hairpin    = "host-port-hairpin"
)

// rules returns the whole table for the leases there are. It replaces the
// table in one transaction, so no packet ever meets half of it.
func rules(tx *knftables.Transaction, cfg Config, all []lease) {
	tx.Add(&knftables.Table{})
	tx.Delete(&knftables.Table{})
	tx.Add(&knftables.Table{})

	base := func(name string, kind knftables.BaseChainType, hook knftables.BaseChainHook, prio knftables.BaseChainPriority, rules ...string) {
		chain := &knftables.Chain{Name: name, Type: &kind, Hook: &hook, Priority: &prio}
		if kind == "" {
			chain.Type, chain.Hook, chain.Priority = nil, nil, nil
		}
		tx.Add(chain)
		for _, r := range rules {
			tx.Add(&knftables.Rule{Chain: name, Rule: r})
		}
	}
	bridge := strconv.Quote(cfg.Bridge)

	// The bridge may route loopback addresses, for host ports on 127.0.0.1.
	// That must let no pod reach what listens on the machine's loopback, nor
	// pretend to be it; and only pods and the machine reach the address that
	// pods know the machine by.
	base("guard", knftables.FilterType, knftables.PreroutingHook, knftables.RawPriority,
		"iifname "+bridge+" ip saddr 127.0.0.0/8 drop",
		"iifname "+bridge+" ip daddr 127.0.0.0/8 drop",
		"iifname != { \"lo\", "+bridge+" } ip daddr "+cfg.Local.String()+" drop")
	tx.Add(&knftables.Map{Name: anyAddress, Type: "inet_proto . inet_service : ipv4_addr . inet_service"})
	tx.Add(&knftables.Map{Name: oneAddress, Type: "ipv4_addr . inet_proto . inet_service : ipv4_addr . inet_service"})
	tx.Add(&knftables.Set{Name: hairpin, Type: "ipv4_addr . ipv4_addr"})
	// The machine's address on the bridge keeps its own ports.
	base("forward-ports", "", "", "",
		"dnat ip to ip daddr . meta l4proto . th dport map @"+oneAddress,
		"ip daddr != "+cfg.Local.String()+" dnat ip to meta l4proto . th dport map @"+anyAddress)
	for name, hook := range map[string]knftables.BaseChainHook{"prerouting": knftables.PreroutingHook, "output": knftables.OutputHook} {
		base(name, knftables.NATType, hook, knftables.DNATPriority+"-5",
			"fib daddr type local jump forward-ports")
	}
	base("postrouting", knftables.NATType, knftables.PostroutingHook, knftables.SNATPriority,
		"oifname "+bridge+" ip saddr 127.0.0.0/8 masquerade",
		"ct status dnat ip saddr . ip daddr @"+hairpin+" masquerade",
		"oifname != "+bridge+" ip saddr "+cfg.Cluster.String()+
			" ip daddr != { "+cfg.Cluster.String()+", "+cfg.Service.String()+" } masquerade fully-random")

	for _, one := range all {
		for _, e := range one.elements() {
			tx.Add(e)
		}
	}
}

// elements are what the table holds for one lease.
func (l lease) elements() []*knftables.Element {
	if len(l.Ports) == 0 {
		return nil
	}
	ip := l.IP.String()
	elements := []*knftables.Element{{Set: hairpin, Key: []string{ip, ip}}}
	for _, p := range l.Ports {
		e := &knftables.Element{
			Map:   anyAddress,
			Key:   []string{p.Protocol, strconv.Itoa(int(p.HostPort))},
			Value: []string{ip, strconv.Itoa(int(p.PodPort))},
		}
		if !p.everywhere() {
			e.Map, e.Key = oneAddress, append([]string{p.HostIP.String()}, e.Key...)
		}
		elements = append(elements, e)
	}
	return elements
}

// openPorts forwards the lease's host ports; what is forwarded already stays.
func (n *Network) openPorts(ctx context.Context, l lease) error {
	tx := n.nft.NewTransaction()
	for _, e := range l.elements() {
		tx.Add(e)
	}
	return n.nft.Run(ctx, tx)
}

func (n *Network) closePorts(ctx context.Context, l lease) error {
	tx := n.nft.NewTransaction()
	for _, e := range l.elements() {
		// Adding first makes deleting what is not there no error.
		tx.Add(e)
		tx.Delete(e)
	}
	return n.nft.Run(ctx, tx)
}

// warnOfForeignRules looks for firewalls that drop what is forwarded: a
// packet must pass every table, so ours cannot let it through.
func (n *Network) warnOfForeignRules(ctx context.Context) {
	out, err := exec.CommandContext(ctx, "nft", "-j", "list", "chains").Output()
	if err != nil {
		return
	}
	var listed struct {
		Nftables []struct {
			Chain *struct{ Family, Table, Name, Hook, Policy string }
		}
	}
	if json.Unmarshal(out, &listed) != nil {
		return
	}
	for _, o := range listed.Nftables {
		if c := o.Chain; c != nil && c.Hook == "forward" && c.Policy == "drop" && c.Family != "ip6" {
			n.log.Warn("A firewall on this machine drops forwarded packets: pods reach neither each other nor the outside",
				"chain", fmt.Sprintf("%s %s %s", c.Family, c.Table, c.Name),
				"cure", fmt.Sprintf("nft insert rule %[1]s %[2]s %[3]s iifname %[4]s accept; nft insert rule %[1]s %[2]s %[3]s oifname %[4]s accept",
					c.Family, c.Table, c.Name, n.cfg.Bridge))
		}
	}
}

// removeTables deletes our table and those of the Service proxy, if they are
// there.
func removeTables(ctx context.Context) error {
	if _, err := exec.LookPath("nft"); err != nil {
		return nil // then nothing can have been made
	}
	nft, err := knftables.New("", "")
	if err != nil {
		return err
	}
	tx := nft.NewTransaction()
	for _, t := range []knftables.Table{
		{Family: knftables.IPv4Family, Name: table},
		{Family: knftables.IPv4Family, Name: "kube-proxy"},
		{Family: knftables.IPv6Family, Name: "kube-proxy"},
	} {
		tx.Add(&t)
		tx.Delete(&t)
	}
	return nft.Run(ctx, tx)
}

// hardwareAddr is derived from the address, as the neighbour entries that
// spare pods from asking are too.
func hardwareAddr(ip netip.Addr) []byte {
	b := ip.As4()
	return append([]byte{0x0a, 0x58}, b[:]...)
}
