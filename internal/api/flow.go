package api

import "net/netip"

// PathFlows is where an agent answers GET on its kubelet port with the Flows of its node, as a JSON array. It takes who
// may get nodes/proxy; the API's node proxy reaches it from everywhere.
const PathFlows = "/flows"

// Flow is what a node's connection tracking knows of the connections from one address to one port of another.
type Flow struct {
	Protocol string         `json:"protocol"` // "tcp", "udp", "sctp"
	From     netip.Addr     `json:"from"`     // who opens them
	To       netip.AddrPort `json:"to"`       // whom they were opened to: a Service's address, for one
	At       netip.AddrPort `json:"at"`       // who answers
	// FromNode and AtNode say that the address is one of the node's own.
	FromNode bool `json:"fromNode,omitempty"`
	AtNode   bool `json:"atNode,omitempty"`
	// Open are established now, Waiting have had no answer yet, and Recent have ended or have no end (UDP) and are
	// still remembered by the kernel: two minutes after the last packet, as it comes.
	Open    int `json:"open,omitempty"`
	Waiting int `json:"waiting,omitempty"`
	Recent  int `json:"recent,omitempty"`
	// Bytes went either way, if the kernel counts them (net.netfilter.nf_conntrack_acct).
	Bytes uint64 `json:"bytes,omitempty"`
}
