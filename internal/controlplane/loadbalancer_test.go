package controlplane

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

func TestAssign(t *testing.T) {
	balancer := func(name string, age int, change func(*corev1.Service), ports ...int32) *corev1.Service {
		s := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, CreationTimestamp: metav1.NewTime(time.Unix(int64(1000-age), 0)), Annotations: map[string]string{}},
			Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer},
		}
		for _, p := range ports {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Port: p, Protocol: corev1.ProtocolTCP})
		}
		if change != nil {
			change(s)
		}
		return s
	}
	on := func(ip string) func(*corev1.Service) {
		return func(s *corev1.Service) { s.Annotations[api.AnnotationHostIP] = ip }
	}
	holds := func(s *corev1.Service) {
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: "10.0.0.1"}}
	}
	for name, c := range map[string]struct {
		services []*corev1.Service
		want     string // "name: addresses or problem", by name
	}{
		"every address":          {[]*corev1.Service{balancer("a", 1, nil, 80)}, "a: 10.0.0.1 127.0.0.1"},
		"the older has it":       {[]*corev1.Service{balancer("a", 1, nil, 80), balancer("b", 2, nil, 80)}, "a: port 80 (TCP) of 10.0.0.1 is Service ns/b's; choose another | b: 10.0.0.1 127.0.0.1"},
		"who has it keeps it":    {[]*corev1.Service{balancer("a", 1, holds, 80), balancer("b", 2, nil, 80)}, "a: 10.0.0.1 127.0.0.1 | b: port 80 (TCP) of 10.0.0.1 is Service ns/a's; choose another"},
		"another port":           {[]*corev1.Service{balancer("a", 1, nil, 80), balancer("b", 2, nil, 81)}, "a: 10.0.0.1 127.0.0.1 | b: 10.0.0.1 127.0.0.1"},
		"another address":        {[]*corev1.Service{balancer("a", 1, on("10.0.0.1"), 80), balancer("b", 2, on("127.0.0.1"), 80)}, "a: 10.0.0.1 | b: 127.0.0.1"},
		"another protocol":       {[]*corev1.Service{balancer("a", 1, nil, 80), balancer("b", 2, func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolUDP }, 80)}, "a: 10.0.0.1 127.0.0.1 | b: 10.0.0.1 127.0.0.1"},
		"others' addresses":      {[]*corev1.Service{balancer("a", 1, on("192.0.2.1"), 80)}, "a: 192.0.2.1 is no address of a node; use one of 10.0.0.1, 127.0.0.1 in tutti.dev/host-ip"},
		"a program's":            {[]*corev1.Service{balancer("a", 1, nil, 80, 22)}, "a: a program of this machine listens on port 22 (TCP); choose another, or stop it"},
		"a program that is late": {[]*corev1.Service{balancer("a", 1, holds, 22)}, "a: 10.0.0.1 127.0.0.1"},
		"another's business": {[]*corev1.Service{balancer("a", 1, func(s *corev1.Service) { s.Spec.LoadBalancerClass = ptr.To("theirs") }, 80),
			balancer("b", 1, func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeNodePort }, 80)}, ""},
		"leaving": {[]*corev1.Service{balancer("a", 1, func(s *corev1.Service) { s.DeletionTimestamp = &metav1.Time{} }, 80)}, "a: "},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			taken := func(p corev1.Protocol, port int32) bool { return p == corev1.ProtocolTCP && port == 22 }
			for s, status := range assign(c.services, []string{"10.0.0.1", "127.0.0.1"}, taken) {
				var text []string
				for _, i := range status.LoadBalancer.Ingress {
					text = append(text, i.IP)
				}
				if p := meta.FindStatusCondition(status.Conditions, corev1.LoadBalancerPortsError); p != nil {
					text = append(text, p.Message)
				}
				got = append(got, fmt.Sprintf("%s: %s", s.Name, strings.Join(text, " ")))
			}
			slices.Sort(got)
			if text := strings.Join(got, " | "); text != c.want {
				t.Errorf("\n got %s\nwant %s", text, c.want)
			}
		})
	}
}
