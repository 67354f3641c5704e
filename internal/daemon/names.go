package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/netip"
	"path/filepath"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/api"
)

var (
	// local is this machine as its pods see it.
	local = netip.MustParseAddr(api.MachineIP)
	loop  = netip.MustParseAddr("127.0.0.1")
)

const (
	bridge    = "tutti0"
	agentPort = 10250
	dnsPort   = 53

	clusterDomain = "cluster.local"
)

// cgroupRoot is the control group of everything that runs for a data
// directory: two on one machine must not share it.
func cgroupRoot(dir api.DataDir) string {
	if dir == api.DefaultDataDir {
		return "tutti"
	}
	sum := sha256.Sum256([]byte(filepath.Clean(string(dir))))
	return "tutti-" + hex.EncodeToString(sum[:4])
}

// unsafeSysctls are those that the settings allow.
func unsafeSysctls(s api.Settings) []string {
	return strings.FieldsFunc(s.UnsafeSysctls, func(r rune) bool { return r == ',' || r == ' ' })
}

// anyone is an address that is reached by the default route.
const anyone = "192.0.2.1"

// nodeAddress is this machine's address for others: the source of what goes
// to one of them. A machine that does not reach it is known to itself alone.
func nodeAddress(other string) netip.Addr {
	// Connecting a UDP socket sends nothing; the kernel chooses the source.
	c, err := net.Dial("udp4", net.JoinHostPort(other, "9"))
	if err != nil {
		return local
	}
	defer c.Close()
	a, ok := netip.AddrFromSlice(c.LocalAddr().(*net.UDPAddr).IP.To4())
	if !ok || a.IsLoopback() {
		return local
	}
	return a
}

// listenAddresses are where the API listens: always for this machine and its
// pods, and at the address that the settings name.
func listenAddresses(s api.Settings) []netip.AddrPort { return addresses(s, s.Port) }

// addresses are where a port is served that is reached as the API is.
func addresses(s api.Settings, port int) []netip.AddrPort {
	at := func(a netip.Addr) netip.AddrPort { return netip.AddrPortFrom(a, uint16(port)) }
	all := []netip.AddrPort{at(loop), at(local)}
	if s.Address == "" {
		return all
	}
	a := netip.MustParseAddr(s.Address) // validated
	switch {
	case a.IsUnspecified():
		return []netip.AddrPort{at(a)}
	case a == loop || a == local:
		return all
	}
	return append(all, at(a))
}

// ports are those that the server needs.
func ports(s api.Settings) []port {
	var all []port
	for _, a := range listenAddresses(s) {
		all = append(all, port{"the API", "tcp", a, "end it, or choose another port with --port"})
	}
	if s.RegistryPort != api.NoRegistry {
		for _, a := range addresses(s, s.RegistryPort) {
			all = append(all, port{"the registry", "tcp", a, "end it, or choose another port with --registry-port (-1 for no registry)"})
		}
	}
	return append(all,
		port{"the agent", "tcp", netip.AddrPortFrom(netip.IPv4Unspecified(), agentPort), "end it: the cluster needs this port"},
		port{"names", "tcp", netip.AddrPortFrom(local, dnsPort), "end it, or have it listen on fewer addresses"},
		port{"names", "udp", netip.AddrPortFrom(local, dnsPort), "end it, or have it listen on fewer addresses"},
	)
}

// serviceDNS is where pods find the name server: the tenth address of the
// Service network, as is the custom.
func serviceDNS(service netip.Prefix) netip.Addr {
	a := service.Masked().Addr()
	for range 10 {
		a = a.Next()
	}
	return a
}

// portTaken says whether a program of this machine listens on a port, on any address: it tries to, for a moment.
func portTaken(protocol corev1.Protocol, port int32) bool {
	address := net.JoinHostPort("", strconv.Itoa(int(port)))
	if protocol == corev1.ProtocolUDP {
		c, err := net.ListenPacket("udp", address)
		if err == nil {
			c.Close()
		}
		return err != nil
	}
	l, err := net.Listen("tcp", address)
	if err == nil {
		l.Close()
	}
	return err != nil
}
