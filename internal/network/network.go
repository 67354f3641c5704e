// Package network gives pods their links and addresses on this machine by
// netlink and nftables: one bridge, a veth pair per pod, addresses from the
// node's range, masqueraded egress, host ports. It knows nothing of
// Kubernetes.
package network

import (
	"net/netip"
)

// Config describes this machine's part of the pod network. Everything it
// names lives in the network namespace of the calling process.
type Config struct {
	// Dir keeps what must survive a restart: leases of addresses, host ports,
	// pinned namespaces, and the settings found on the machine before the
	// first change.
	Dir    string
	Bridge string // name of the bridge, "tutti0"
	// Local is "this machine" as its pods see it: an address on the bridge,
	// the same on every machine (default 10.41.0.1).
	Local   netip.Addr
	Cluster netip.Prefix // every pod of the cluster
	Service netip.Prefix // every ClusterIP
	MTU     int          // 0: that of the default route's link
}

// Pod asks for a pod's network.
type Pod struct {
	ID    string
	Ports []HostPort
}

// HostPort forwards a port of the machine to a port of the pod.
type HostPort struct {
	HostIP   netip.Addr // zero: every address
	HostPort uint16
	PodPort  uint16
	Protocol string // "tcp", "udp", "sctp"
}

// Attachment is a pod's network as it is.
type Attachment struct {
	ID    string
	NetNS string // path of the pinned namespace
	IPs   []netip.Addr
	Ports []HostPort
}
