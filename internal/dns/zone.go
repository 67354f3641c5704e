package dns

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/miekg/dns"
)

const (
	// ttl of every record, in seconds: so long may a client be wrong.
	ttl = 5
	// version of the specification that the zone follows.
	version = "1.1.0"
)

// service is what the zone knows of one Service, in the terms of names.
type service struct {
	namespace, name string
	externalName    string // when set, nothing below is
	clusterIPs      []netip.Addr
	headless        bool
	ports           []port // named ones of a Service with an address
	endpoints       []endpoint
}

type port struct {
	name, proto string // proto is "tcp", "udp", "sctp"
	number      uint16
}

// endpoint is an address of a headless Service that shall be published.
type endpoint struct {
	host  string // first label of its name
	given bool   // the host was given to it; otherwise it spells the address
	ip    netip.Addr
	ports []port
}

// pointer is what an address is called by one Service.
type pointer struct {
	name  string
	given bool
}

// zone is the cluster's domain and the reverse names of its addresses, as an
// index of Services. Looking up is pure: it reads the index and nothing else.
type zone struct {
	domain   string // "cluster.local.", lower case
	pods     netip.Prefix
	services netip.Prefix

	mu       sync.RWMutex
	spaces   map[string]map[string]*service    // by namespace and name
	reversed map[netip.Addr]map[string]pointer // by address and "namespace/service"
	serial   uint32
}

func newZone(domain string, pods, services netip.Prefix) *zone {
	return &zone{
		domain: strings.ToLower(dns.Fqdn(domain)), pods: pods, services: services,
		spaces: map[string]map[string]*service{}, reversed: map[netip.Addr]map[string]pointer{}, serial: 1,
	}
}

// set replaces what is known of a Service.
func (z *zone) set(s *service) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.forget(s.namespace, s.name)
	if z.spaces[s.namespace] == nil {
		z.spaces[s.namespace] = map[string]*service{}
	}
	z.spaces[s.namespace][s.name] = s
	z.serial++
	for ip, name := range z.reverse(s) {
		if z.reversed[ip] == nil {
			z.reversed[ip] = map[string]pointer{}
		}
		z.reversed[ip][s.namespace+"/"+s.name] = name
	}
}

func (z *zone) remove(namespace, name string) {
	z.mu.Lock()
	defer z.mu.Unlock()
	z.forget(namespace, name)
	z.serial++
}

func (z *zone) forget(namespace, name string) {
	s := z.spaces[namespace][name]
	if s == nil {
		return
	}
	delete(z.spaces[namespace], name)
	if len(z.spaces[namespace]) == 0 {
		delete(z.spaces, namespace)
	}
	for ip := range z.reverse(s) {
		delete(z.reversed[ip], namespace+"/"+name)
		if len(z.reversed[ip]) == 0 {
			delete(z.reversed, ip)
		}
	}
}

// reverse returns the name that each address of a Service has in it.
func (z *zone) reverse(s *service) map[netip.Addr]pointer {
	names := map[netip.Addr]pointer{}
	for _, ip := range s.clusterIPs {
		names[ip] = pointer{z.serviceName(s), true}
	}
	for _, e := range s.endpoints {
		names[e.ip] = pointer{e.host + "." + z.serviceName(s), e.given}
	}
	return names
}

func (z *zone) serviceName(s *service) string {
	return s.name + "." + s.namespace + ".svc." + z.domain
}

// answer is what the zone says to a question.
type answer struct {
	code      int
	answer    []dns.RR
	authority []dns.RR
	extra     []dns.RR
	// follow is the target of a CNAME in answer that lies outside of the
	// zone: whoever asked for addresses wants those of the target.
	follow string
}

// lookup answers a question, or returns false if it is about none of the
// zone's names.
func (z *zone) lookup(q dns.Question) (answer, bool) {
	name := strings.ToLower(q.Name)
	z.mu.RLock()
	defer z.mu.RUnlock()
	var (
		a     answer
		owner string
		ours  bool
	)
	switch {
	case dns.IsSubDomain(z.domain, name):
		a, owner, ours = z.forward(q, name), z.domain, true
	case strings.HasSuffix(name, inAddr):
		owner = inAddr[1:]
		a, ours = z.backward(q, name)
	case strings.HasSuffix(name, ip6):
		owner = ip6[1:]
		a, ours = z.backward(q, name)
	}
	if ours && len(a.answer) == 0 {
		a.authority = []dns.RR{z.soa(owner)}
	}
	return a, ours
}

const (
	inAddr = ".in-addr.arpa."
	ip6    = ".ip6.arpa."
)

var (
	noSuchName = answer{code: dns.RcodeNameError}
	noData     = answer{code: dns.RcodeSuccess}
)

func (z *zone) forward(q dns.Question, name string) answer {
	labels := dns.SplitDomainName(strings.TrimSuffix(name, z.domain))
	slices.Reverse(labels)
	if len(labels) == 0 {
		if q.Qtype == dns.TypeSOA {
			return answer{answer: []dns.RR{z.soa(z.domain)}}
		}
		return noData
	}
	switch labels[0] {
	case "dns-version":
		if len(labels) > 1 {
			return noSuchName
		}
		if q.Qtype == dns.TypeTXT {
			return answer{answer: []dns.RR{&dns.TXT{Hdr: header(q.Name, dns.TypeTXT), Txt: []string{version}}}}
		}
		return noData
	case "pod":
		return z.pod(q, labels[1:])
	case "svc":
	default:
		return noSuchName
	}
	if len(labels) == 1 {
		return noData
	}
	space := z.spaces[labels[1]]
	if space == nil {
		return noSuchName
	}
	if len(labels) == 2 {
		return noData
	}
	s := space[labels[2]]
	if s == nil {
		return noSuchName
	}
	return z.service(q, s, labels[3:])
}

// service answers for the labels before a Service's name, nearest first.
func (z *zone) service(q dns.Question, s *service, labels []string) answer {
	switch {
	case len(labels) == 0:
		if s.externalName != "" {
			return z.external(q, s)
		}
		ips := s.clusterIPs
		for _, e := range s.endpoints {
			ips = append(ips[:len(ips):len(ips)], e.ip)
		}
		if s.headless && len(ips) == 0 {
			return noSuchName
		}
		return addresses(q, ips)
	case s.externalName != "":
		return noSuchName
	case strings.HasPrefix(labels[0], "_"):
		return z.ports(q, s, labels)
	case len(labels) > 1:
		return noSuchName
	}
	var ips []netip.Addr
	for _, e := range s.endpoints {
		if e.host == labels[0] {
			ips = append(ips, e.ip)
		}
	}
	if len(ips) == 0 {
		return noSuchName
	}
	return addresses(q, ips)
}

// external answers for a Service that is another name.
func (z *zone) external(q dns.Question, s *service) answer {
	target := dns.Fqdn(strings.ToLower(s.externalName))
	a := answer{answer: []dns.RR{&dns.CNAME{Hdr: header(q.Name, dns.TypeCNAME), Target: target}}}
	if q.Qtype != dns.TypeCNAME {
		a.follow = target
	}
	return a
}

// ports answers for _port._proto.service and for _proto.service above it.
func (z *zone) ports(q dns.Question, s *service, labels []string) answer {
	var a answer
	found := false
	match := func(p port) bool {
		if "_"+p.proto != labels[0] || len(labels) == 2 && "_"+p.name != labels[1] {
			return false
		}
		found = true
		return len(labels) == 2 && q.Qtype == dns.TypeSRV
	}
	add := func(p port, target string, ips []netip.Addr) {
		a.answer = append(a.answer, &dns.SRV{Hdr: header(q.Name, dns.TypeSRV), Weight: 100, Port: p.number, Target: target})
		a.extra = append(a.extra, records(target, ips)...)
	}
	if len(labels) > 2 {
		return noSuchName
	}
	for _, p := range s.ports {
		if match(p) {
			add(p, z.serviceName(s), s.clusterIPs)
		}
	}
	for _, e := range s.endpoints {
		for _, p := range e.ports {
			if match(p) {
				add(p, e.host+"."+z.serviceName(s), []netip.Addr{e.ip})
			}
		}
	}
	if !found {
		return noSuchName
	}
	a.answer, a.extra = unique(a.answer), unique(a.extra)
	return a
}

// pod answers for names that spell a pod's address, as "10-42-0-7.default".
func (z *zone) pod(q dns.Question, labels []string) answer {
	if len(labels) < 2 {
		return noData
	}
	if len(labels) > 2 {
		return noSuchName
	}
	ip, err := netip.ParseAddr(strings.ReplaceAll(labels[1], "-", "."))
	if err != nil || !z.pods.Contains(ip) {
		return noSuchName
	}
	return addresses(q, []netip.Addr{ip})
}

// backward answers for addresses that the cluster has given out. Those it may
// give out have no name elsewhere either.
func (z *zone) backward(q dns.Question, name string) (answer, bool) {
	ip, ok := reverseAddr(name)
	if !ok {
		return answer{}, false
	}
	names := z.reversed[ip]
	if len(names) == 0 {
		return noSuchName, z.pods.Contains(ip) || z.services.Contains(ip)
	}
	a := noData
	if q.Qtype == dns.TypePTR {
		// A name that was given to a pod is the one it knows itself by: then
		// those that only spell its address would mislead.
		given := false
		for _, p := range names {
			given = given || p.given
		}
		for _, p := range names {
			if p.given == given {
				a.answer = append(a.answer, &dns.PTR{Hdr: header(q.Name, dns.TypePTR), Ptr: p.name})
			}
		}
		slices.SortFunc(a.answer, func(a, b dns.RR) int { return cmp.Compare(a.String(), b.String()) })
	}
	return a, true
}

// reverseAddr reads the address in a name below in-addr.arpa or ip6.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	if labels, ok := strings.CutSuffix(name, inAddr); ok {
		parts := strings.Split(labels, ".")
		slices.Reverse(parts)
		ip, err := netip.ParseAddr(strings.Join(parts, "."))
		return ip, err == nil && ip.Is4()
	}
	if labels, ok := strings.CutSuffix(name, ip6); ok {
		parts := strings.Split(labels, ".")
		if len(parts) != 32 {
			return netip.Addr{}, false
		}
		var b [16]byte
		for i, p := range parts {
			nibble, err := strconv.ParseUint(p, 16, 4)
			if err != nil || len(p) != 1 {
				return netip.Addr{}, false
			}
			b[15-i/2] |= byte(nibble) << (4 * (i % 2))
		}
		return netip.AddrFrom16(b), true
	}
	return netip.Addr{}, false
}

// soa is what negative answers carry: how long they hold.
func (z *zone) soa(owner string) dns.RR {
	return &dns.SOA{
		Hdr: header(owner, dns.TypeSOA), Ns: "ns.dns." + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: z.serial, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: ttl,
	}
}

func header(name string, kind uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: kind, Class: dns.ClassINET, Ttl: ttl}
}

// addresses answers with those of the kind that was asked for.
func addresses(q dns.Question, ips []netip.Addr) answer {
	a := noData
	for _, rr := range records(q.Name, ips) {
		if rr.Header().Rrtype == q.Qtype {
			a.answer = append(a.answer, rr)
		}
	}
	a.answer = unique(a.answer)
	return a
}

func records(name string, ips []netip.Addr) []dns.RR {
	var rrs []dns.RR
	for _, ip := range ips {
		if ip.Is4() {
			rrs = append(rrs, &dns.A{Hdr: header(name, dns.TypeA), A: net.IP(ip.AsSlice())})
		} else {
			rrs = append(rrs, &dns.AAAA{Hdr: header(name, dns.TypeAAAA), AAAA: net.IP(ip.AsSlice())})
		}
	}
	return rrs
}

// unique drops repeated records: a pod may be an endpoint by several ports.
func unique(rrs []dns.RR) []dns.RR {
	seen := map[string]bool{}
	return slices.DeleteFunc(rrs, func(rr dns.RR) bool {
		key := rr.String()
		defer func() { seen[key] = true }()
		return seen[key]
	})
}

// dashed is the host label of an endpoint that has no name.
func dashed(ip netip.Addr) string {
	if ip.Is4() {
		return strings.ReplaceAll(ip.String(), ".", "-")
	}
	return strings.ReplaceAll(ip.StringExpanded(), ":", "-")
}
