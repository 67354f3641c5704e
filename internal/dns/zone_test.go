package dns

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/miekg/dns"
	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"

	"tutti.dev/tutti/test/golden"
)

func svc(name, ip string, change ...func(*v1.Service)) *v1.Service {
	s := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1.ServiceSpec{
			Type: v1.ServiceTypeClusterIP, ClusterIP: ip,
			Ports: []v1.ServicePort{
				{Name: "http", Port: 80, Protocol: v1.ProtocolTCP},
				{Name: "metrics", Port: 9090, Protocol: v1.ProtocolTCP},
				{Name: "quic", Port: 443, Protocol: v1.ProtocolUDP},
			},
		},
	}
	if ip != "" {
		s.Spec.ClusterIPs = []string{ip}
	}
	for _, c := range change {
		c(s)
	}
	return s
}

// slice makes endpoints of "hostname address" or "address"; one that begins
// with "!" is not ready.
func slice(service, suffix string, endpoints ...string) *discovery.EndpointSlice {
	name, number, proto := "http", int32(8080), v1.ProtocolTCP
	s := &discovery.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: service + "-" + suffix,
			Labels: map[string]string{discovery.LabelServiceName: service},
		},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &number, Protocol: &proto}},
	}
	for _, text := range endpoints {
		text, waiting := strings.CutPrefix(text, "!")
		ready := !waiting
		e := discovery.Endpoint{Conditions: discovery.EndpointConditions{Ready: &ready}}
		if host, ip, named := strings.Cut(text, " "); named {
			e.Hostname, e.Addresses = &host, []string{ip}
		} else {
			e.Addresses = []string{text}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// shop is a cluster with one Service of each kind.
func shop() []runtime.Object {
	return []runtime.Object{
		svc("web", "10.43.0.20"), slice("web", "a", "10.42.0.7"),
		svc("both", "10.43.0.21", func(s *v1.Service) { s.Spec.ClusterIPs = append(s.Spec.ClusterIPs, "fd00::21") }),
		svc("db", "None"), slice("db", "a", "db-0 10.42.0.10", "db-1 10.42.0.11", "!db-2 10.42.0.12"), slice("db", "b", "10.42.0.13"),
		svc("early", "None", func(s *v1.Service) { s.Spec.PublishNotReadyAddresses = true }), slice("early", "a", "!early-0 10.42.0.14"),
		svc("empty", "None"), slice("empty", "a", "!10.42.0.15"),
		svc("away", "", func(s *v1.Service) {
			s.Spec.Type, s.Spec.ExternalName = v1.ServiceTypeExternalName, "www.example.com"
		}),
		svc("alias", "", func(s *v1.Service) {
			s.Spec.Type, s.Spec.ExternalName = v1.ServiceTypeExternalName, "web.default.svc.cluster.local"
		}),
		svc("loop", "", func(s *v1.Service) {
			s.Spec.Type, s.Spec.ExternalName = v1.ServiceTypeExternalName, "loop.default.svc.cluster.local"
		}),
		svc("pending", ""),
		// A Service of another namespace shares a pod.
		&v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "other", Name: "peers"}, Spec: v1.ServiceSpec{ClusterIP: "None"}},
		func() *discovery.EndpointSlice {
			s := slice("peers", "a", "10.42.0.10")
			s.Namespace = "other"
			return s
		}(),
	}
}

func zoneOf(objects []runtime.Object) *zone {
	z := newZone("cluster.local", netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16"))
	for _, o := range objects {
		if s, ok := o.(*v1.Service); ok {
			var eps []*discovery.EndpointSlice
			for _, o := range objects {
				if e, ok := o.(*discovery.EndpointSlice); ok && e.Namespace == s.Namespace && e.Labels[discovery.LabelServiceName] == s.Name {
					eps = append(eps, e)
				}
			}
			z.set(translate(s, eps))
		}
	}
	return z
}

func describe(a answer, ours bool) string {
	if !ours {
		return "  not ours\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "  %s\n", dns.RcodeToString[a.code])
	for _, section := range []struct {
		name string
		rrs  []dns.RR
	}{{"answer", a.answer}, {"authority", a.authority}, {"extra", a.extra}} {
		for _, rr := range section.rrs {
			fmt.Fprintf(&b, "  %-9s %s\n", section.name, strings.ReplaceAll(rr.String(), "\t", " "))
		}
	}
	if a.follow != "" {
		fmt.Fprintf(&b, "  follow    %s\n", a.follow)
	}
	return b.String()
}

func TestZone(t *testing.T) {
	z := zoneOf(shop())
	z.serial = 1
	questions, err := os.ReadFile("testdata/questions")
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, line := range strings.Split(strings.TrimSpace(string(questions)), "\n") {
		fmt.Fprintln(&got, line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, kind, _ := strings.Cut(line, " ")
		got.WriteString(describe(z.lookup(dns.Question{Name: name, Qtype: dns.StringToType[kind], Qclass: dns.ClassINET})))
	}
	golden.Check(t, "testdata/zone.golden", got.String())
}

// TestZoneForgets sets and removes Services until none is left.
func TestZoneForgets(t *testing.T) {
	z := zoneOf(shop())
	for namespace, services := range z.spaces {
		for name := range services {
			z.remove(namespace, name)
			z.remove(namespace, name)
		}
	}
	if len(z.spaces) > 0 || len(z.reversed) > 0 {
		t.Errorf("left: %v, %v", z.spaces, z.reversed)
	}
	// An endpoint that moves to another Service takes its reverse name along.
	ip := netip.MustParseAddr("10.42.0.10")
	for _, name := range []string{"one", "two"} {
		z.set(&service{namespace: "default", name: "one", headless: true})
		z.set(&service{namespace: "default", name: "two", headless: true})
		z.set(&service{namespace: "default", name: name, headless: true, endpoints: []endpoint{{host: "a", ip: ip}}})
		a, _ := z.lookup(dns.Question{Name: "10.0.42.10.in-addr.arpa.", Qtype: dns.TypePTR})
		if want := "a." + name + ".default.svc.cluster.local."; len(a.answer) != 1 || a.answer[0].(*dns.PTR).Ptr != want {
			t.Errorf("answer %v, want %s", a.answer, want)
		}
	}
}

func TestReverseAddr(t *testing.T) {
	for name, want := range map[string]string{
		"4.3.2.1.in-addr.arpa.":   "1.2.3.4",
		"3.2.1.in-addr.arpa.":     "",
		"256.3.2.1.in-addr.arpa.": "",
		"x.in-addr.arpa.":         "",
		"b.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.":  "2001:db8::567:89ab",
		"bb.a.9.8.7.6.5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa.": "",
		"1.ip6.arpa.": "",
	} {
		got, ok := reverseAddr(name)
		if ok != (want != "") || ok && got.String() != want {
			t.Errorf("%s: %v, %v; want %q", name, got, ok, want)
		}
	}
}

func FuzzLookup(f *testing.F) {
	z := zoneOf(shop())
	f.Add("web.default.svc.cluster.local.", dns.TypeA)
	f.Add("_http._tcp.db.default.svc.cluster.local.", dns.TypeSRV)
	f.Add("10.0.42.10.in-addr.arpa.", dns.TypePTR)
	f.Fuzz(func(t *testing.T, name string, kind uint16) {
		a, ours := z.lookup(dns.Question{Name: name, Qtype: kind})
		if ours && len(a.answer) == 0 && len(a.authority) == 0 {
			t.Errorf("%q %d: nothing at all", name, kind)
		}
	})
}
