package e2e

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const processes = `
apiVersion: v1
kind: ConfigMap
metadata: {name: settings, namespace: %[1]s}
data: {word: from-config}
---
apiVersion: v1
kind: Secret
metadata: {name: secrets, namespace: %[1]s}
stringData: {word: from-secret}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: %[1]s}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      runtimeClassName: process
      terminationGracePeriodSeconds: 2
      containers:
      - name: web
        image: host
        command: [sh, -c, 'mkdir /tmp/w; echo $HOSTNAME >/tmp/w/name; echo up as $HOSTNAME; exec busybox httpd -f -p 8080 -h /tmp/w']
        ports: [{name: http, containerPort: 8080}]
        readinessProbe: {httpGet: {path: /name, port: http}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: %[1]s}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: keeps, namespace: %[1]s}
spec:
  serviceName: keeps
  selector: {matchLabels: {app: keeps}}
  template:
    metadata: {labels: {app: keeps}}
    spec:
      runtimeClassName: process
      terminationGracePeriodSeconds: 0
      containers:
      - name: main
        image: host
        command: [sh, -c, 'echo started >>/var/lib/tutti-claim/starts; exec sleep 100000']
        volumeMounts: [{name: data, mountPath: /var/lib/tutti-claim}]
        readinessProbe: {exec: {command: [test, -s, /var/lib/tutti-claim/starts]}, periodSeconds: 1}
  volumeClaimTemplates: [{metadata: {name: data}, spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: good, namespace: %[1]s}
spec:
  template:
    spec:
      runtimeClassName: process
      restartPolicy: Never
      containers:
      - name: main
        image: host
        command: [sh, -c, 'echo $WORD $SECRET; test -s /run/secrets/kubernetes.io/serviceaccount/token && echo token; id -u; echo x >/usr/tutti-test || echo refused']
        securityContext: {runAsUser: 65534, runAsGroup: 65534}
        env:
        - {name: WORD, valueFrom: {configMapKeyRef: {name: settings, key: word}}}
        - {name: SECRET, valueFrom: {secretKeyRef: {name: secrets, key: word}}}
---
apiVersion: batch/v1
kind: Job
metadata: {name: bad, namespace: %[1]s}
spec:
  backoffLimit: 0
  template:
    spec:
      runtimeClassName: process
      restartPolicy: Never
      containers: [{name: main, image: host, command: [sh, -c, exit 3]}]
---
`

// hostNamespace makes a namespace whose pods may be processes of the host.
func (n node) hostNamespace(name string) string {
	n.t.Helper()
	n.namespace(name)
	n.kubectl("label", "namespace", name, "tutti.dev/allow-host=true")
	return name
}

// Programs of the machine are pods like all others: of a Deployment behind a
// Service, of a StatefulSet and of a Job; they are talked to, run out of
// memory, outlive server and keeper and leave nothing.
func TestProcess(t *testing.T) {
	n := running(t)
	ns := n.hostNamespace("process")
	if has := n.kubectl("get", "nodes", "-o", "jsonpath={.items[0].status.runtimeHandlers[*].name}"); !slices.Contains(strings.Fields(has), "process") {
		t.Errorf("the node tells of the runtimes %q", has)
	}
	const class = "runtimeClassName: process\nterminationGracePeriodSeconds: 0\n"
	host := func(fields string) string { return strings.Replace(one(fields), "busybox:1", "host", 1) + class }
	// What the first of all pods makes stays for the next.
	n.ok(n.Apply(pod(ns, "first", host("command: ['true']"))))
	n.wait(ns, "pod/first", "jsonpath={.status.phase}=Succeeded")
	n.kubectl("-n", ns, "delete", "pod", "first")
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	dumps := strings.Replace(pod(ns, "dumps", host("command: [sh, -c, 'kill -SEGV $$$$']\nworkingDir: /tmp")),
		"  labels:", "  annotations: {process.tutti.dev/limits: core=unlimited}\n  labels:", 1)
	n.ok(n.Apply(fmt.Sprintf(processes, ns) + strings.Join([]string{
		pod(ns, "hungry", host("command: [busybox, tail, /dev/zero]\nresources: {limits: {memory: 24Mi}}")),
		pod(ns, "image", one("command: [sh, -c, 'cat /etc/passwd; [ $$$$ != 1 ] && echo no-init; touch /mine && echo wrote; hostname']")+class),
		pod(ns, "listens", host("command: [sh, -c, 'read line; echo got $line']\nstdin: true\nstdinOnce: true")),
		dumps,
	}, "---\n")))
	n.wait(ns, "deployment/web", "condition=Available")
	n.wait(ns, "pod/keeps-0", "condition=Ready")
	n.wait(ns, "job/good", "condition=Complete")
	n.wait(ns, "job/bad", "condition=Failed")

	if log := n.kubectl("-n", ns, "logs", "job/good"); !strings.HasPrefix(log, "from-config from-secret\ntoken\n65534\n") || !strings.Contains(log, "refused\n") {
		t.Errorf("the job says %q", log)
	}
	if code := n.kubectl("-n", ns, "get", "pods", "-l", "job-name=bad", "-o", "jsonpath={.items[*].status.containerStatuses[0].state.terminated.exitCode}"); code != "3" {
		t.Errorf("the bad job's program exits with %q", code)
	}
	n.wait(ns, "pod/hungry", "jsonpath={.status.containerStatuses[0].state.terminated.reason}=OOMKilled")
	n.wait(ns, "pod/image", "jsonpath={.status.phase}=Succeeded")
	hostname, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if log := n.kubectl("-n", ns, "logs", "image"); log != "root:x:0:0:root:/:/bin/sh\nuser:x:1000:1000:user:/:/bin/sh\nno-init\nwrote\n"+hostname+"\n" {
		t.Errorf("with an image's root it says %q", log)
	}
	n.wait(ns, "pod/dumps", "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}=139")
	if message := n.field(ns, "pod/dumps", "{.status.containerStatuses[0].state.terminated.message}"); !strings.HasPrefix(message, "segmentation fault, memory dumped") {
		t.Errorf("the message of a program that dumped its memory is %q", message)
	}

	// Each has an address of its own, the Service has them all by name.
	pods := strings.Fields(n.kubectl("-n", ns, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].metadata.name}"))
	ips := strings.Fields(n.kubectl("-n", ns, "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[*].status.podIP}"))
	if slices.Sort(ips); len(slices.Compact(ips)) != 3 {
		t.Errorf("three programs on one port have the addresses %q", ips)
	}
	script := strings.NewReplacer("nslookup", "busybox nslookup", " nc ", " busybox nc ", "$", "$$").Replace(fetch) +
		"for i in 1 2 3 4 5 6 7 8 9; do fetch web." + ns + ".svc.cluster.local 80 /name; done"
	n.ok(n.Apply(pod(ns, "caller", host(fmt.Sprintf("command: [sh, -c, %q]", script)))))
	n.wait(ns, "pod/caller", "jsonpath={.status.phase}=Succeeded")
	answers := strings.Fields(n.kubectl("-n", ns, "logs", "caller"))
	if len(answers) != 9 || slices.ContainsFunc(answers, func(a string) bool { return !slices.Contains(pods, a) }) {
		t.Errorf("the Service answers with %q, its programs are %q", answers, pods)
	}

	// They are talked to.
	if name := n.kubectl("-n", ns, "exec", pods[0], "--", "cat", "/tmp/w/name", "/etc/hostname"); name != pods[0]+"\n"+pods[0]+"\n" {
		t.Errorf("exec says %q", name)
	}
	if log := n.kubectl("-n", ns, "logs", pods[1]); log != "up as "+pods[1]+"\n" {
		t.Errorf("the log is %q", log)
	}
	n.wait(ns, "pod/listens", "condition=Ready")
	n.ok(n.RunInput(patience, "you\n", n.Binary(), "kubectl", "-n", ns, "attach", "-i", "listens"))
	n.wait(ns, "pod/listens", "jsonpath={.status.phase}=Succeeded")
	if log := n.kubectl("-n", ns, "logs", "listens"); log != "got you\n" {
		t.Errorf("what was typed came as %q", log)
	}
	n.forward(ns, pods[2])
	node := n.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}")
	n.until("figures of what a program uses", func() (bool, string) {
		r := n.Kubectl("get", "--raw", "/api/v1/nodes/"+node+"/proxy/stats/summary")
		return strings.Contains(r.Stdout, `"`+pods[0]+`"`), r.String()
	})

	// They outlive those that look after them.
	state := func() string {
		return n.kubectl("-n", ns, "get", "pods", "-l", "app in (web,keeps)", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount} {.status.containerStatuses[0].ready}\n{end}")
	}
	was := state()
	server, err := n.Server()
	if err != nil {
		t.Fatal(err)
	}
	keeper, err := n.Keeper()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range []interface{ Kill() error }{server, keeper} {
		if err := p.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Up(); err != nil {
		t.Fatal(err)
	}
	n.until("exec after server and keeper were killed", func() (bool, string) {
		r := n.Kubectl("-n", ns, "exec", pods[0], "--", "cat", "/tmp/w/name")
		return r.Stdout == pods[0]+"\n", r.String()
	})
	if now := state(); now != was {
		t.Errorf("what ran before server and keeper were killed:\n%s\nand after:\n%s", was, now)
	}

	// What a claim holds stays with the StatefulSet, and nothing with the machine.
	n.kubectl("-n", ns, "delete", "pod", "keeps-0")
	n.until("a second start", func() (bool, string) {
		r := n.Kubectl("-n", ns, "exec", "keeps-0", "--", "cat", "/var/lib/tutti-claim/starts")
		return r.Stdout == "started\nstarted\n", r.String()
	})
	for _, f := range []string{"/var/lib/tutti-claim", "/usr/tutti-test", "/run/secrets", "/tmp/w"} {
		if _, err := os.Lstat(f); err == nil {
			t.Errorf("%s is on the machine", f)
		}
	}
	n.kubectl("delete", "namespace", ns)
	n.leavesNothing(before)
}

// forward fetches the page of a web pod by kubectl port-forward.
func (n node) forward(ns, pod string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	cmd := n.Command(ctx, n.Binary(), "kubectl", "-n", ns, "port-forward", "pod/"+pod, ":8080")
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		cancel()
		n.t.Fatal(err)
	}
	defer func() {
		cancel()
		_ = cmd.Wait() // it was killed
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	port := regexp.MustCompile(`127\.0\.0\.1:(\d+)`).FindStringSubmatch(line)
	if port == nil {
		n.t.Fatalf("kubectl port-forward says %q %v", line, err)
	}
	if _, body := get(n.Client(), "http://127.0.0.1:"+port[1]+"/name"); body != pod+"\n" {
		n.t.Errorf("through kubectl port-forward: %q", body)
	}
}
