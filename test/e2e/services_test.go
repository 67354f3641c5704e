package e2e

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// get fetches a page and returns its body; an error is its text.
func get(c *http.Client, url string) (int, string) {
	resp, err := c.Get(url)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}

// fetch is a shell function: fetch NAME PORT PATH gets a page from one address
// of a full name. Debian's static busybox has a wget that crashes, for want of
// the C library's shared half; the shop's programs use short names.
const fetch = `fetch() {
	address=$(nslookup "$1" | sed -n '/^Name/,$ s/^Address[^:]*: *//p' | head -n 1)
	printf 'GET %s HTTP/1.0\r\n\r\n' "$3" | timeout 3 nc "$address" "$2" | sed '1,/^.\{0,1\}$/d'
}
`

func TestServices(t *testing.T) {
	n := shared(t)
	ns := n.namespace("services")
	n.ok(n.Apply(fmt.Sprintf(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: %[1]s}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: web
        image: busybox:1
        command: [sh, -c, "mkdir /tmp/w; hostname >/tmp/w/name; exec httpd -f -p 8080 -h /tmp/w"]
        ports: [{name: http, containerPort: 8080, hostPort: 0}]
        readinessProbe: {httpGet: {path: /name, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: http, nodePort: 31080}]}
---
apiVersion: v1
kind: Service
metadata: {name: each, namespace: %[1]s}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 8080}]}
---
`, ns) + pod(ns, "asker", one("command: [sleep, '1000']")+"terminationGracePeriodSeconds: 0\n") +
		"---\n" + pod(ns, "door", one("command: [httpd, -f, -p, '8080', -h, /etc]\nports: [{containerPort: 8080, hostPort: 18080}]")+"terminationGracePeriodSeconds: 0\n") +
		"---\n" + pod(ns, "plain", one("command: [httpd, -f, -p, '18081', -h, /etc]")+"hostNetwork: true\nterminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "deployment/web", "condition=Available")
	n.wait(ns, "pod/asker", "condition=Ready")
	n.wait(ns, "pod/door", "condition=Ready")
	n.wait(ns, "pod/plain", "condition=Ready")
	ask := func(command string) string {
		return n.Kubectl("-n", ns, "exec", "asker", "--", "sh", "-c", fetch+command).Stdout
	}
	// Each of these may need a moment until the rules are in the kernel.
	for _, c := range []struct{ what, command, want string }{
		{"by name", "fetch web.services.svc.cluster.local 80 /name", "web-"},
		{"by headless name", "fetch each.services.svc.cluster.local 8080 /name", "web-"},
		{"the API", "nslookup kubernetes.default.svc.cluster.local", "10.43.0.1"},
		{"every address of a headless name", "nslookup each.services.svc.cluster.local | grep -c 'Address.*10.42'", "2"},
		{"the world outside", "ping -c 1 -W 2 " + machine.OutsideIP, "1 packets received"},
	} {
		n.until(c.what, func() (bool, string) {
			got := ask(c.command)
			return strings.Contains(got, c.want), got
		})
	}
	seen := map[string]bool{}
	n.until("both pods behind one address", func() (bool, string) {
		seen[ask("fetch web.services.svc.cluster.local 80 /name")] = true
		return len(seen) == 2, fmt.Sprint(seen)
	})
	for _, c := range []struct {
		what, url string
		client    *http.Client
	}{
		{"node port from the machine", "http://" + machine.IP + ":31080/name", n.Client()},
		{"node port from outside", "http://" + machine.IP + ":31080/name", n.OutsideClient()},
		{"host port from outside", "http://" + machine.IP + ":18080/group", n.OutsideClient()},
		{"host network from outside", "http://" + machine.IP + ":18081/group", n.OutsideClient()},
	} {
		n.until(c.what, func() (bool, string) {
			code, body := get(c.client, c.url)
			return code == http.StatusOK, body
		})
	}
	if code, body := get(n.OutsideClient(), "https://"+machine.IP+":6443/version"); code != 0 {
		t.Errorf("the API answers the world outside: %d %s", code, body)
	}
	// An address that leaves its Service gets no more requests.
	n.kubectl("-n", ns, "scale", "deployment/web", "--replicas=0")
	n.until("nobody behind the address", func() (bool, string) {
		got := ask("fetch web.services.svc.cluster.local 80 /name")
		return got == "", got
	})
}
