package app

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// town is a cluster of two nodes with a shop on both of them.
func town() Snapshot {
	at := func(ip, node string, p *corev1.Pod) *corev1.Pod {
		p.Status.PodIPs, p.Status.Phase, p.Spec.NodeName = []corev1.PodIP{{IP: ip}}, corev1.PodRunning, node
		return p
	}
	podOf := func(namespace, name, app, owner string) *corev1.Pod {
		p := &corev1.Pod{ObjectMeta: objectMeta(namespace, name, app, "")}
		if owner != "" {
			p.OwnerReferences = []metav1.OwnerReference{{UID: objectMeta(namespace, owner, "", "").UID, Controller: ptr.To(true)}}
		}
		return p
	}
	node := func(name, ip, pods string) *corev1.Node {
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{pods}},
			Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: ip}}},
		}
	}
	service := func(namespace, name, ip string, port, nodePort int32) *corev1.Service {
		return &corev1.Service{ObjectMeta: objectMeta(namespace, name, "", ""), Spec: corev1.ServiceSpec{
			ClusterIPs: []string{ip}, Ports: []corev1.ServicePort{{Port: port, NodePort: nodePort, Protocol: corev1.ProtocolTCP}},
		}}
	}
	ended := at("10.42.0.5", "one", podOf("shop", "old", "shop", ""))
	ended.Status.Phase = corev1.PodSucceeded
	own := at("192.0.2.1", "one", podOf("shop", "probe", "shop", ""))
	own.Spec.HostNetwork = true
	return Snapshot{
		Nodes:        []*corev1.Node{node("one", "192.0.2.1", "10.42.0.0/24"), node("two", "192.0.2.2", "10.42.1.0/24")},
		Deployments:  []*appsv1.Deployment{{ObjectMeta: objectMeta("shop", "front", "shop", "")}},
		ReplicaSets:  []*appsv1.ReplicaSet{{ObjectMeta: objectMeta("shop", "front-rs", "shop", "shop/front")}},
		StatefulSets: []*appsv1.StatefulSet{{ObjectMeta: objectMeta("shop", "db", "shop", "")}},
		CronJobs:     []*batchv1.CronJob{{ObjectMeta: objectMeta("shop", "report", "shop", "")}},
		Jobs:         []*batchv1.Job{{ObjectMeta: objectMeta("shop", "report-1", "shop", "shop/report")}},
		Pods: []*corev1.Pod{
			at("10.42.0.2", "one", podOf("shop", "front-1", "shop", "front-rs")), at("10.42.1.2", "two", podOf("shop", "front-2", "shop", "front-rs")),
			at("10.42.0.3", "one", podOf("shop", "db-0", "shop", "db")), at("10.42.1.3", "two", podOf("shop", "db-1", "shop", "db")),
			at("10.42.0.4", "one", podOf("shop", "report-1-x", "shop", "report-1")), ended,
			at("10.42.0.5", "one", podOf("default", "lone", "", "")), own,
			at("10.42.0.9", "one", podOf("kube-system", "spy", "", "")),
		},
		Services: []*corev1.Service{
			service("shop", "web", "10.43.0.7", 80, 30080), service("default", "kubernetes", "10.43.0.1", 443, 0),
			service("kube-system", "kube-dns", "10.43.0.10", 53, 0), service("shop", "db", "None", 5432, 0),
		},
	}
}

// tell is a connection as one line.
func tell(c Connection) string {
	who := func(p Peer) string { return strings.TrimSuffix(p.Kind+" "+p.Name, " ") }
	text := fmt.Sprintf("%s -> %s :%d", who(c.From), who(c.To), c.Port)
	if c.Service != "" {
		text += " as " + c.Service
	}
	return fmt.Sprintf("%s %d/%d/%d %d", text, c.Open, c.Waiting, c.Recent, c.Addresses)
}

func TestConnections(t *testing.T) {
	// from > to > at: open/waiting/recent; n: marks an address of the node's own.
	flow := func(line string) api.Flow {
		f := api.Flow{Protocol: "tcp"}
		addresses, counts, _ := strings.Cut(line, ": ")
		ends := strings.Split(addresses, " > ")
		var from, at string
		from, f.FromNode = strings.CutPrefix(ends[0], "n")
		at, f.AtNode = strings.CutPrefix(ends[len(ends)-1], "n")
		f.From, f.To, f.At = netip.MustParseAddr(from), netip.MustParseAddrPort(strings.TrimPrefix(ends[1], "n")), netip.MustParseAddrPort(at)
		if _, err := fmt.Sscanf(counts, "%d/%d/%d", &f.Open, &f.Waiting, &f.Recent); err != nil {
			t.Fatal(line, err)
		}
		return f
	}
	for _, c := range []struct {
		name     string
		one, two []string // what the nodes tell
		system   bool
		want     []string
	}{
		{name: "nothing"},
		{name: "through a Service, to a pod here and one there",
			one:  []string{"10.42.0.3 > 10.43.0.7:80 > 10.42.0.2:8080: 1/0/2", "10.42.0.3 > 10.43.0.7:80 > 10.42.1.2:8080: 1/1/0"},
			two:  []string{"10.42.0.3 > 10.42.1.2:8080 > 10.42.1.2:8080: 1/1/0"}, // the same again, as its other end sees it
			want: []string{"StatefulSet db -> Deployment front :80 as web 2/1/2 0"}},
		{name: "a headless Service: straight to the pod",
			one:  []string{"10.42.0.2 > 10.42.0.3:5432 > 10.42.0.3:5432: 3/0/0"},
			want: []string{"Deployment front -> StatefulSet db :5432 3/0/0 0"}},
		{name: "among themselves",
			one:  []string{"10.42.0.3 > 10.42.1.3:5432 > 10.42.1.3:5432: 1/0/0"},
			two:  []string{"10.42.0.3 > 10.42.1.3:5432 > 10.42.1.3:5432: 1/0/0"},
			want: []string{"StatefulSet db -> StatefulSet db :5432 1/0/0 0"}},
		{name: "a pod of a CronJob's Job",
			one:  []string{"10.42.0.4 > 10.42.0.3:5432 > 10.42.0.3:5432: 0/0/1"},
			want: []string{"CronJob report -> StatefulSet db :5432 0/0/1 0"}},
		{name: "from outside by a node's port, one of them to the other node",
			one:  []string{"198.51.100.1 > 192.0.2.1:30080 > 10.42.0.2:8080: 1/0/0", "198.51.100.2 > 192.0.2.1:30080 > 10.42.1.2:8080: 1/0/1"},
			two:  []string{"192.0.2.1 > 10.42.1.2:8080 > 10.42.1.2:8080: 1/0/1"}, // forwarded in the first node's name
			want: []string{"Outside -> Deployment front :30080 as web 2/0/1 2"}},
		{name: "from one address outside",
			two:  []string{"198.51.100.1 > 192.0.2.2:30080 > 10.42.1.2:8080: 1/0/0"},
			want: []string{"Outside 198.51.100.1 -> Deployment front :30080 as web 1/0/0 1"}},
		{name: "to the outside",
			one:  []string{"10.42.0.2 > 203.0.113.5:443 > 203.0.113.5:443: 1/0/0", "10.42.0.2 > 203.0.113.6:443 > 203.0.113.6:443: 1/0/0", "10.42.0.2 > 203.0.113.6:25 > 203.0.113.6:25: 0/1/0"},
			want: []string{"Deployment front -> Outside :443 2/0/0 2", "Deployment front -> Outside 203.0.113.6 :25 0/1/0 1"}},
		{name: "the node itself by a Service; not its probes",
			one:  []string{"n10.42.0.1 > 10.43.0.7:80 > 10.42.0.2:8080: 0/0/1", "n10.42.0.1 > 10.42.0.2:8080 > 10.42.0.2:8080: 0/0/60"},
			want: []string{"Node one -> Deployment front :80 as web 0/0/1 0"}},
		{name: "a node's own server, and another node's",
			one:  []string{"10.42.0.2 > 10.41.0.1:5000 > n10.41.0.1:5000: 1/0/0", "10.42.0.2 > 192.0.2.2:9100 > 192.0.2.2:9100: 1/0/0"},
			want: []string{"Deployment front -> Node one :5000 1/0/0 0", "Deployment front -> Node two :9100 1/0/0 0"}},
		{name: "the API", one: []string{"10.42.0.5 > 10.43.0.1:443 > n10.41.0.1:6443: 1/0/0"},
			want: []string{"Pod lone -> Service kubernetes :443 as kubernetes 1/0/0 0"}},
		{name: "pods that are gone", one: []string{"10.42.0.99 > 10.42.0.3:5432 > 10.42.0.3:5432: 0/0/9", "10.42.0.2 > 10.42.1.99:1 > 10.42.1.99:1: 0/0/9"}},
		{name: "Kubernetes' own are left out",
			one: []string{"10.42.0.2 > 10.43.0.10:53 > n10.41.0.1:53: 0/0/9", "10.42.0.9 > 10.42.0.2:8080 > 10.42.0.2:8080: 1/0/0"}},
		{name: "and shown to who asks", system: true,
			one:  []string{"10.42.0.2 > 10.43.0.10:53 > n10.41.0.1:53: 0/0/9", "10.42.0.9 > 10.42.0.2:8080 > 10.42.0.2:8080: 1/0/0"},
			want: []string{"Pod spy -> Deployment front :8080 1/0/0 0", "Deployment front -> Service kube-dns :53 as kube-dns 0/0/9 0"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := town()
			s.Flows = map[string][]api.Flow{}
			for node, lines := range map[string][]string{"one": c.one, "two": c.two} {
				for _, l := range lines {
					s.Flows[node] = append(s.Flows[node], flow(l))
				}
			}
			var got []string
			for _, one := range Summarize(s, c.system).Connections {
				got = append(got, tell(one))
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}
