package proxy

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	networking "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"tutti.dev/tutti/internal/host/netns"
	"tutti.dev/tutti/internal/host/netns/netnstest"
	"tutti.dev/tutti/internal/network"
)

func TestMain(m *testing.M) { netnstest.Main(m) }

const (
	here     = "/proc/self/ns/net"
	patience = 10 * time.Second
)

// serve answers TCP connections in the namespace with its own name and the
// address of the caller.
func serve(t *testing.T, ns, name string, port int) {
	t.Helper()
	var l net.Listener
	netnstest.Do(t, ns, func() (err error) {
		l, err = net.Listen("tcp4", ":"+strconv.Itoa(port))
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			host, _, _ := net.SplitHostPort(c.RemoteAddr().String())
			fmt.Fprint(c, name, " ", host)
			c.Close()
		}
	}()
}

func ask(ns, addr string) (server, caller string, err error) {
	err = netns.Do(ns, func() error {
		c, err := net.DialTimeout("tcp", addr, 2*time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(2 * time.Second))
		b, err := io.ReadAll(c)
		if err == nil {
			_, err = fmt.Sscan(string(b), &server, &caller)
		}
		return err
	})
	return server, caller, err
}

// servers asks often enough to see every server.
func servers(t *testing.T, ns, addr string) map[string]int {
	t.Helper()
	seen := map[string]int{}
	for range 30 {
		s, _, err := ask(ns, addr)
		if err != nil {
			t.Fatalf("%s: %v", addr, err)
		}
		seen[s]++
	}
	return seen
}

func eventually(t *testing.T, what string, ok func() bool) time.Duration {
	t.Helper()
	start := time.Now()
	for !ok() {
		if time.Since(start) > patience {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(2 * time.Millisecond)
	}
	return time.Since(start)
}

func service(name, ip string, nodePort int32, change ...func(*v1.Service)) *v1.Service {
	s := &v1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name},
		Spec: v1.ServiceSpec{
			Type: v1.ServiceTypeClusterIP, ClusterIP: ip, ClusterIPs: []string{ip}, IPFamilies: []v1.IPFamily{v1.IPv4Protocol},
			Ports:           []v1.ServicePort{{Name: "http", Port: 80, NodePort: nodePort, Protocol: v1.ProtocolTCP}},
			SessionAffinity: v1.ServiceAffinityNone,
		},
	}
	if nodePort != 0 {
		s.Spec.Type = v1.ServiceTypeNodePort
		s.Spec.ExternalTrafficPolicy = v1.ServiceExternalTrafficPolicyCluster
	}
	for _, c := range change {
		c(s)
	}
	return s
}

func slice(service string, ips ...netip.Addr) *discovery.EndpointSlice {
	yes, node, port, name, proto := true, "node", int32(8080), "http", v1.ProtocolTCP
	s := &discovery.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "default", Name: service + "-1",
			Labels: map[string]string{discovery.LabelServiceName: service},
		},
		AddressType: discovery.AddressTypeIPv4,
		Ports:       []discovery.EndpointPort{{Name: &name, Port: &port, Protocol: &proto}},
	}
	for _, ip := range ips {
		s.Endpoints = append(s.Endpoints, discovery.Endpoint{
			Addresses: []string{ip.String()}, NodeName: &node,
			Conditions: discovery.EndpointConditions{Ready: &yes, Serving: &yes},
		})
	}
	return s
}

func TestServices(t *testing.T) {
	// The kernel refuses a host's packets once a second; a test asks more often.
	if err := os.WriteFile("/proc/sys/net/ipv4/icmp_ratelimit", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	for _, filtered := range []string{"1", "0"} {
		if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(filtered), 0); err != nil && filtered == "1" {
			continue // a kernel without br_netfilter
		}
		t.Run("br_netfilter="+filtered, testServices)
	}
}

func testServices(t *testing.T) {
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	away := netnstest.New(t)
	netnstest.Cable(t, away, "out0", "192.0.2.1/24", "192.0.2.2/24")
	dir := t.TempDir()
	t.Cleanup(func() {
		if err := network.Purge(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	n, err := network.New(t.Context(), network.Config{
		Dir: dir, Bridge: "tutti0", Local: netip.MustParseAddr("10.41.0.1"),
		Cluster: netip.MustParsePrefix("10.42.0.0/16"), Service: netip.MustParsePrefix("10.43.0.0/16"),
	}, log)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if err := n.SetRange(t.Context(), netip.MustParsePrefix("10.42.0.0/24")); err != nil {
		t.Fatal(err)
	}
	pods := map[string]network.Attachment{}
	for _, name := range []string{"one", "two", "client"} {
		pods[name], err = n.Attach(t.Context(), network.Pod{ID: name})
		if err != nil {
			t.Fatal(err)
		}
		serve(t, pods[name].NetNS, name, 8080)
	}
	one, two, client := pods["one"], pods["two"], pods["client"]
	serve(t, here, "machine", 6443)

	sticky := func(s *v1.Service) {
		seconds := int32(600)
		s.Spec.SessionAffinity = v1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &v1.SessionAffinityConfig{ClientIP: &v1.ClientIPConfig{TimeoutSeconds: &seconds}}
	}
	api := slice("kubernetes", netip.MustParseAddr("10.41.0.1"))
	*api.Ports[0].Port = 6443
	cluster := fake.NewClientset(
		&v1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node"}},
		&networking.ServiceCIDR{ObjectMeta: metav1.ObjectMeta{Name: "kubernetes"}, Spec: networking.ServiceCIDRSpec{CIDRs: []string{"10.43.0.0/16"}}},
		service("kubernetes", "10.43.0.1", 0), api,
		service("web", "10.43.0.20", 30080), slice("web", one.IPs[0], two.IPs[0]),
		service("sticky", "10.43.0.21", 0, sticky), slice("sticky", one.IPs[0], two.IPs[0]),
		service("self", "10.43.0.22", 0), slice("self", client.IPs[0]),
		service("empty", "10.43.0.23", 30081), slice("empty"),
	)
	// What a proxy that was killed left of a Service that is gone.
	const left = "service-LEFTOVER-default/gone/tcp/http"
	nft(t, "add table ip kube-proxy; add chain ip kube-proxy "+left)
	p := New(Config{
		Client: cluster, NodeName: "node", NodeIP: netip.MustParseAddr("192.0.2.1"),
		ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"), Log: log,
	})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx) }()
	defer func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Error("Run does not return")
		}
	}()
	select {
	case <-p.Ready():
	case err := <-done:
		t.Fatal(err)
	case <-time.After(patience):
		t.Fatal("not ready")
	}

	for what, call := range map[string]struct{ ns, addr string }{
		"ClusterIP from a pod":       {client.NetNS, "10.43.0.20:80"},
		"ClusterIP from the machine": {here, "10.43.0.20:80"},
		"NodePort from outside":      {away, "192.0.2.1:30080"},
		"NodePort from the machine":  {here, "192.0.2.1:30080"},
		"NodePort from a pod":        {client.NetNS, "192.0.2.1:30080"},
		"NodePort on loopback":       {here, "127.0.0.1:30080"},
	} {
		if seen := servers(t, call.ns, call.addr); seen["one"] == 0 || seen["two"] == 0 {
			t.Errorf("%s: %v", what, seen)
		}
	}
	if _, caller, err := ask(client.NetNS, "10.43.0.20:80"); caller != client.IPs[0].String() {
		t.Errorf("a pod's call to a ClusterIP comes from %s, %v", caller, err)
	}
	if server, _, err := ask(client.NetNS, "10.43.0.1:80"); server != "machine" {
		t.Errorf("the API's ClusterIP from a pod: %s, %v", server, err)
	}
	if server, _, err := ask(here, "10.43.0.1:80"); server != "machine" {
		t.Errorf("the API's ClusterIP from the machine: %s, %v", server, err)
	}
	if seen := servers(t, client.NetNS, "10.43.0.21:80"); len(seen) != 1 {
		t.Errorf("with affinity: %v", seen)
	}
	if server, _, err := ask(client.NetNS, "10.43.0.22:80"); server != "client" {
		t.Errorf("a pod calling itself by its Service: %s, %v", server, err)
	}
	refused := func(ns, addr string) bool {
		start := time.Now()
		_, _, err := ask(ns, addr)

		return err != nil && time.Since(start) < time.Second
	}
	for _, addr := range []string{"10.43.0.23:80", "192.0.2.1:30081", "10.43.0.20:81"} {
		if !refused(client.NetNS, addr) {
			t.Errorf("%s is not refused at once", addr)
		}
	}
	if _, _, err := ask(here, "127.0.0.1:30081"); err == nil {
		t.Error("a node port without endpoints answers on loopback")
	}

	// A change is in place soon after its event.
	slices := cluster.DiscoveryV1().EndpointSlices("default")
	if _, err := slices.Update(t.Context(), slice("empty", two.IPs[0]), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	took := eventually(t, "an endpoint comes", func() bool { s, _, _ := ask(client.NetNS, "10.43.0.23:80"); return s == "two" })
	t.Log("an endpoint was reachable after", took)
	if _, err := slices.Update(t.Context(), slice("web", one.IPs[0]), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	took = eventually(t, "an endpoint goes", func() bool { return servers(t, client.NetNS, "10.43.0.20:80")["two"] == 0 })
	t.Log("an endpoint was gone after", took)
	if err := cluster.CoreV1().Services("default").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a Service goes", func() bool { _, _, err := ask(away, "192.0.2.1:30080"); return err != nil })
	eventually(t, "it goes from loopback", func() bool { return refused(here, "127.0.0.1:30080") })
	// Nothing changes any more.
	eventually(t, "nothing is left of Services that are gone", func() bool {
		rules := nft(t, "list table ip kube-proxy")
		return !strings.Contains(rules, left) && !strings.Contains(rules, "default/web/")
	})
}

func nft(t *testing.T, commands string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "nft", commands).CombinedOutput()
	if err != nil {
		t.Fatalf("nft %s: %v\n%s", commands, err, out)
	}
	return string(out)
}

func TestSupported(t *testing.T) {
	if err := Supported(); err != nil {
		t.Error(err)
	}
	t.Setenv("PATH", t.TempDir())
	const want = "nftables cannot be used (could not find nftables binary: exec: \"nft\": executable file not found in $PATH); install version 1.0.1 or later (`apt-get install nftables`)"
	if err := Supported(); err == nil || err.Error() != want {
		t.Errorf("without the program: %v", err)
	}
}
