package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/console"

	"tutti.dev/tutti/test/e2e/machine"
)

// kubectl is somebody's own kubectl, which knows of the machine nothing but
// KUBECONFIG, at work in a namespace of its own.
type kubectl struct {
	node
	path string
	ns   string
	home string
	// upgrade is what a connection for streams is upgraded to.
	upgrade string
	env     []string
}

type kubectlRow struct {
	verb string
	try  func(k kubectl)
	// old says why Debian's kubectl 1.20 cannot do it.
	old string
	// streams says that the new one, too, is to try it by SPDY, as old ones
	// do, besides WebSockets.
	streams bool
}

// Every verb that people have in their fingers, by the newest kubectl and by
// Debian's, which is three years and sixteen versions behind the server.
func TestKubectl(t *testing.T) {
	n := shared(t)
	for _, c := range []struct {
		name, path, upgrade string
		old                 bool
	}{
		{"new", "dist/tools/kubectl", "websocket", false},
		{"debian", "dist/tools/debian/usr/bin/kubectl", "SPDY/3.1", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			path := filepath.Join(n.Repo, c.path)
			if _, err := os.Stat(path); err != nil {
				t.Fatalf("run make tools: %v", err)
			}
			n := node{n.Machine, t}
			k := kubectl{node: n, path: path, ns: n.namespace("kubectl-" + c.name), home: t.TempDir(), upgrade: c.upgrade}
			for _, row := range kubectlRows {
				t.Run(row.verb, func(t *testing.T) {
					if c.old && row.old != "" {
						t.Skip(row.old)
					}
					row.try(k.with(t))
				})
				if row.streams && !c.old {
					t.Run(row.verb+" by SPDY", func(t *testing.T) {
						k := k.with(t, "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false", "KUBECTL_PORT_FORWARD_WEBSOCKETS=false")
						k.upgrade = "SPDY/3.1"
						row.try(k)
					})
				}
			}
		})
	}
}

// with is the same in the hands of a part of the test, with more in its
// environment.
func (k kubectl) with(t *testing.T, env ...string) kubectl {
	k.t, k.env = t, append(slices.Clone(k.env), env...)
	return k
}

func (k kubectl) run(input string, args ...string) machine.Result {
	ctx, cancel := context.WithTimeout(k.t.Context(), patience)
	defer cancel()
	cmd := k.Command(ctx, k.path, append([]string{"-n", k.ns}, args...)...)
	cmd.Env = append(cmd.Env, k.environment()...)
	return machine.Finish(cmd, input)
}

func (k kubectl) environment() []string {
	return append([]string{"KUBECONFIG=" + filepath.Join(k.Dir, "admin.kubeconfig"), "HOME=" + k.home}, k.env...)
}

// says runs a command which must succeed and say what is wanted.
func (k kubectl) says(want string, args ...string) string {
	k.t.Helper()
	return k.saysTo("", want, args...)
}

func (k kubectl) saysTo(input, want string, args ...string) string {
	k.t.Helper()
	r := k.run(input, args...)
	if r.Err != nil || !strings.Contains(r.Stdout+r.Stderr, want) {
		k.t.Fatalf("want %q: %v", want, r)
	}
	return r.Stdout
}

// fails runs a command which must end with the exit status and say why.
func (k kubectl) fails(code int, want, input string, args ...string) {
	k.t.Helper()
	if r := k.run(input, args...); r.Code != code || !strings.Contains(r.Stdout+r.Stderr, want) {
		k.t.Fatalf("want exit status %d and %q: %v", code, want, r)
	}
}

// talk runs a command in the background, without a terminal.
func (k kubectl) talk(args ...string) *session { return k.talkAt(console.WinSize{}, args...) }

func (k kubectl) talkAt(size console.WinSize, args ...string) *session {
	k.t.Helper()
	cmd := k.Command(background(k.t), k.path, append([]string{"-n", k.ns}, args...)...)
	cmd.Env = append(cmd.Env, k.environment()...)
	return talk(k.t, cmd, size)
}

// get reads what one field of an object says.
func (k kubectl) get(object, path string) string {
	k.t.Helper()
	return k.says("", "get", object, "-o", "jsonpath="+path)
}

// web is the name of a pod of the Deployment web that is there to stay.
func (k kubectl) web() string {
	k.t.Helper()
	k.says("", "rollout", "status", "deployment/web", "--timeout=60s")
	return k.says("", "get", "pods", "-l", "app=web", "-o", "jsonpath={.items[0].metadata.name}")
}

func (k kubectl) file(name, text string) string {
	k.t.Helper()
	path := filepath.Join(k.t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		k.t.Fatal(err)
	}
	return path
}

// fetch reads a page at an address of the machine.
func (k kubectl) fetch(url string) string {
	k.t.Helper()
	r, err := k.Client().Get(url)
	if err != nil {
		k.t.Fatal(err)
	}
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		k.t.Fatalf("%s: %s %v\n%s", url, r.Status, err, body)
	}
	return string(body)
}

// oneAtATime is for what there is only one of, like the machine as a Node.
var oneAtATime sync.Mutex

const kubectlWeb = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 1
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web, of: NAMESPACE}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: web
        image: busybox:1
        command: [sh, -c, "mkdir /www; echo a page >/www/index.html; echo serving; exec httpd -f -p 8080 -h /www"]
        readinessProbe: {tcpSocket: {port: 8080}}
        resources: {requests: {cpu: 10m, memory: 8Mi}}
      - name: side
        image: busybox:1
        command: [sh, -c, "i=0; while sleep 0.2; do echo tick $((i=i+1)); done"]
`

func kubectlConfig(name, value string) string {
	return "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: " + name + "}\ndata: {word: " + value + "}\n"
}

// The rows build on the Deployment of the first.
var kubectlRows = []kubectlRow{
	{verb: "apply", try: func(k kubectl) {
		web := strings.ReplaceAll(kubectlWeb, "NAMESPACE", k.ns)
		k.saysTo(web, "deployment.apps/web created", "apply", "-f", "-")
		k.saysTo(web, "deployment.apps/web unchanged", "apply", "-f", "-")
		k.saysTo(kubectlConfig("words", "one"), "created", "apply", "-f", "-")
		k.saysTo(kubectlConfig("words", "two"), "configured", "apply", "-f", "-")
	}},
	{verb: "apply server side", try: func(k kubectl) {
		k.saysTo(kubectlConfig("owned", "one"), "serverside-applied", "apply", "--server-side", "-f", "-")
		k.fails(1, "conflict", kubectlConfig("owned", "two"), "apply", "--server-side", "--field-manager=other", "-f", "-")
		k.saysTo(kubectlConfig("owned", "two"), "serverside-applied", "apply", "--server-side", "--field-manager=other", "--force-conflicts", "-f", "-")
		if got := k.get("configmap/owned", "{.data.word}"); got != "two" {
			k.t.Errorf("word %q", got)
		}
	}},
	{verb: "diff", try: func(k kubectl) {
		k.fails(1, "+  word: three", kubectlConfig("words", "three"), "diff", "-f", "-")
		k.fails(0, "", kubectlConfig("words", "two"), "diff", "-f", "-")
	}},
	{verb: "rollout status", try: func(k kubectl) {
		k.says("successfully rolled out", "rollout", "status", "deployment/web", "--timeout=60s")
	}},
	{verb: "wait", try: func(k kubectl) {
		k.says("condition met", "wait", "deployment/web", "--for=condition=Available", "--timeout=60s")
		k.fails(1, "timed out", "", "wait", "deployment/web", "--for=condition=Unheard", "--timeout=1s")
	}},
	{verb: "wait for a field", old: "came with 1.23", try: func(k kubectl) {
		k.says("condition met", "wait", "deployment/web", "--for=jsonpath={.status.readyReplicas}=1", "--timeout=60s")
	}},
	{verb: "get", try: func(k kubectl) {
		k.says("2/2     Running", "get", "pods", "-o", "wide")
		k.says("web", "get", "deployments,configmaps", "-o", "name")
		k.says("10.43.0.1", "get", "services", "-A", "-o", "custom-columns=IP:.spec.clusterIP")
		watch := k.talk("get", "configmaps", "--watch", "-o", "name")
		watch.await("configmap/words")
		k.says("created", "create", "configmap", "seen")
		watch.await("configmap/seen")
		watch.kill()
	}},
	{verb: "describe", try: func(k kubectl) {
		k.says("Started", "describe", "pod", k.web())
		k.says("1 desired | 1 updated | 1 total | 1 available", "describe", "deployment", "web")
		k.says("Allocated resources", "describe", "nodes")
	}},
	{verb: "explain", try: func(k kubectl) {
		k.says("rollingUpdate", "explain", "deployment.spec.strategy", "--recursive")
		k.says("ClusterFirst", "explain", "pod.spec.dnsPolicy")
	}},
	{verb: "api-resources", try: func(k kubectl) {
		k.says("horizontalpodautoscalers", "api-resources", "--api-group=autoscaling")
		k.says("metrics.k8s.io/v1beta1", "api-versions")
	}},
	{verb: "cluster-info", try: func(k kubectl) {
		k.says("127.0.0.1:6443", "cluster-info")
		k.says("v1.36", "version")
	}},
	{verb: "edit", try: func(k kubectl) {
		k = k.with(k.t, `KUBE_EDITOR=sed -i "s/word: two/word: edited/"`)
		k.says("edited", "edit", "configmap", "words")
		if got := k.get("configmap/words", "{.data.word}"); got != "edited" {
			k.t.Errorf("word %q", got)
		}
	}},
	{verb: "patch", try: func(k kubectl) {
		k.says("patched", "patch", "configmap", "words", "-p", `{"data":{"a":"1"}}`)
		k.says("patched", "patch", "configmap", "words", "--type=merge", "-p", `{"data":{"word":null}}`)
		k.says("patched", "patch", "configmap", "words", "--type=json", "-p", `[{"op":"add","path":"/data/b","value":"2"}]`)
		if got := k.get("configmap/words", "{.data}"); got != `{"a":"1","b":"2"}` {
			k.t.Errorf("data %s", got)
		}
	}},
	{verb: "label", try: func(k kubectl) {
		k.says("labeled", "label", "configmap", "words", "kind=small")
		k.says("configmap/words", "get", "configmaps", "-l", "kind=small", "-o", "name")
		k.fails(1, "already has a value", "", "label", "configmap", "words", "kind=big")
	}},
	{verb: "annotate", try: func(k kubectl) {
		k.says("annotated", "annotate", "configmap", "words", "note=this")
		k.says("annotated", "annotate", "configmap", "words", "note-")
	}},
	{verb: "expose", try: func(k kubectl) {
		k.says("exposed", "expose", "deployment", "web", "--port=80", "--target-port=8080")
		ip := k.get("service/web", "{.spec.clusterIP}")
		k.until("the Service answers", func() (bool, string) {
			r, err := k.Client().Get("http://" + ip + "/")
			if err != nil {
				return false, err.Error()
			}
			r.Body.Close()
			return r.StatusCode == http.StatusOK, r.Status
		})
	}},
	{verb: "logs", try: func(k kubectl) {
		web := k.web()
		k.says("serving", "logs", web, "-c", "web")
		k.says("serving", "logs", "deployment/web", "--all-containers", "--tail=-1")
		k.says("[pod/"+web+"/web] serving", "logs", "-l", "app=web", "--all-containers", "--prefix", "--tail=-1")
		k.until("what is older than two seconds is left out", func() (bool, string) {
			out := k.says("", "logs", web, "-c", "side", "--since=2s")
			return strings.Contains(out, "tick") && !strings.Contains(out, "tick 1\n"), out
		})
		if out := k.says("tick 1\n", "logs", web, "-c", "side"); !strings.HasPrefix(out, "tick 1\ntick 2\n") {
			k.t.Errorf("from the start: %q", out)
		}
		if out := k.says("tick", "logs", web, "-c", "side", "--tail=2"); strings.Count(out, "\n") != 2 {
			k.t.Errorf("two lines: %q", out)
		}
		k.says("", "logs", web, "-c", "side", "--since-time="+time.Now().Add(time.Hour).UTC().Format(time.RFC3339))
		k.says(time.Now().UTC().Format("2006-01-02T"), "logs", web, "-c", "side", "--timestamps", "--tail=1")
		k.fails(1, "not found", "", "logs", web, "-c", "web", "--previous")
	}},
	{verb: "logs of the previous run", try: func(k kubectl) {
		k.saysTo(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "again"}, "spec": {
			"terminationGracePeriodSeconds": 0, "volumes": [{"name": "mark", "emptyDir": {}}],
			"containers": [{"name": "main", "image": "busybox:1", "volumeMounts": [{"name": "mark", "mountPath": "/mark"}],
			"command": ["sh", "-c", "[ -e /mark/ran ] && echo second && exec sleep 1000; touch /mark/ran; echo first; exit 3"]}]}}`,
			"created", "create", "-f", "-")
		k.until("the container runs again", func() (bool, string) {
			r := k.run("", "logs", "again", "--previous")
			return r.Err == nil && r.Stdout == "first\n", r.String()
		})
		k.says("second", "logs", "again")
		k.says("deleted", "delete", "pod", "again")
	}},
	{verb: "logs --follow", try: func(k kubectl) {
		follow := k.talk("logs", "-f", "deployment/web", "-c", "side", "--tail=1")
		follow.await("tick [0-9]+")
		follow.await("tick [0-9]+")
		follow.await("tick [0-9]+")
		follow.kill()
		k.says("created", "run", "brief", "--image=busybox:1", "--restart=Never", "--", "sh", "-c", "sleep 1; echo over")
		k.until("the pod has a log", func() (bool, string) {
			r := k.run("", "logs", "-f", "brief")
			return r.Err == nil && r.Stdout == "over\n", r.String()
		})
		k.says("deleted", "delete", "pod", "brief")
	}},
	{verb: "exec", streams: true, try: func(k kubectl) {
		k.says("uid=0(root)", "exec", "deployment/web", "-c", "web", "--", "id")
		k.says("Upgrade: "+k.upgrade, "exec", "deployment/web", "-c", "web", "-v=8", "--", "true")
		if out := k.saysTo("to upper", "", "exec", "-i", "deployment/web", "-c", "side", "--", "tr", "a-z", "A-Z"); out != "TO UPPER" {
			k.t.Errorf("said %q", out)
		}
		k.fails(7, "exit code 7", "", "exec", "deployment/web", "-c", "web", "--", "sh", "-c", "exit 7")
		k.fails(1, `exec: "nonsense": executable file not found`, "", "exec", "deployment/web", "-c", "web", "--", "nonsense")
		large := strings.Repeat("0123456789abcdef", 1<<16)
		if out := k.saysTo(large, "", "exec", "-i", "deployment/web", "-c", "side", "--", "cat"); out != large {
			k.t.Errorf("a megabyte came back as %d bytes", len(out))
		}
	}},
	{verb: "exec -it", streams: true, try: func(k kubectl) {
		s := k.talkAt(console.WinSize{Height: 40, Width: 100}, "exec", "-it", "deployment/web", "-c", "web", "--", "sh")
		s.enter("stty size; tty")
		s.await(`40 100\s+/dev/pts/`)
		if err := s.terminal.Resize(console.WinSize{Height: 50, Width: 120}); err != nil {
			k.t.Fatal(err)
		}
		s.enter("until stty size | grep '50 120'; do sleep 0.05; done")
		s.await(`\s50 120\s`)
		s.enter("sh -c 'echo sleeps $((1 + 1)); exec sleep 1000'")
		s.await("sleeps 2")
		s.press(3) // control-C
		s.enter("echo $((40 + 2))")
		s.await("42")
		s.enter("exit 7")
		if code := s.end(); code != 7 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
	}},
	{verb: "attach", streams: true, try: func(k kubectl) {
		s := k.talk("attach", "deployment/web", "-c", "side")
		s.await("tick [0-9]+")
		s.await("tick [0-9]+")
		s.kill()
		k.saysTo(`{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "shell"}, "spec": {"restartPolicy": "Never", "containers": [
			{"name": "main", "image": "busybox:1", "command": ["sh"], "stdin": true, "tty": true}]}}`, "created", "create", "-f", "-")
		k.says("condition met", "wait", "pod/shell", "--for=condition=Ready", "--timeout=60s")
		s = k.talkAt(console.WinSize{Height: 30, Width: 90}, "attach", "-it", "shell")
		s.enter("until stty size | grep '30 90'; do sleep 0.05; done")
		s.await(`\s30 90\s`)
		s.enter("exit")
		if code := s.end(); code != 0 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
		k.says("deleted", "delete", "pod", "shell")
	}},
	{verb: "cp", try: func(k kubectl) {
		web, dir := k.web(), k.t.TempDir()
		text := strings.Repeat("a line of text\n", 1<<14)
		k.says("", "cp", k.file("up", text), web+":/tmp/up", "-c", "side")
		k.says("", "cp", web+":/tmp/up", filepath.Join(dir, "down"), "-c", "side")
		if down, err := os.ReadFile(filepath.Join(dir, "down")); err != nil || string(down) != text {
			k.t.Errorf("came back as %d bytes: %v", len(down), err)
		}
		k.says("", "cp", web+":/etc", filepath.Join(dir, "etc"), "-c", "side")
		if _, err := os.Stat(filepath.Join(dir, "etc", "passwd")); err != nil {
			k.t.Error(err)
		}
	}},
	{verb: "port-forward", streams: true, try: func(k kubectl) {
		for _, to := range []string{"pod/" + k.web(), "deployment/web"} {
			s := k.talk("port-forward", to, ":8080", "-v=8")
			s.await("Upgrade: " + k.upgrade)
			port := s.await(`127.0.0.1:([0-9]+) -> 8080`)
			for range 3 {
				if page := k.fetch("http://127.0.0.1:" + port + "/"); page != "a page\n" {
					k.t.Errorf("%s: %q", to, page)
				}
			}
			s.kill()
		}
	}},
	{verb: "run", try: func(k kubectl) {
		if out := k.saysTo("said\n", "", "run", "once", "--image=busybox:1", "--restart=Never", "--rm", "-i", "--quiet", "--", "sed", "s/^/was /"); !strings.Contains(out, "was said\n") {
			k.t.Errorf("said %q", out)
		}
		s := k.talkAt(console.WinSize{Height: 24, Width: 80}, "run", "interactive", "--image=busybox:1", "--restart=Never", "--rm", "-it", "--", "sh")
		s.enter("echo $((40 + 2))")
		s.await("42")
		s.enter("exit")
		s.await(`pod "interactive" deleted`)
		if code := s.end(); code != 0 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
	}},
	{verb: "debug a pod", old: "1.20 speaks an alpha of ephemeral containers that the API server dropped in 1.22", try: func(k kubectl) {
		s := k.talkAt(console.WinSize{Height: 24, Width: 80}, "debug", k.web(), "-it", "--image=busybox:1", "--target=web", "--", "sh")
		s.enter("ps; cat /proc/1/root/www/index.html")
		s.await("httpd -f")
		s.await("a page")
		s.enter("exit")
		if code := s.end(); code != 0 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
		k.saysTo("ps | grep '[h]ttpd' || echo alone; exit\n", "alone", "debug", k.web(), "-i", "--image=busybox:1", "--profile=baseline", "--", "sh")
		k.saysTo("ip addr add 127.9.9.9/32 dev lo && ip addr del 127.9.9.9/32 dev lo && echo changed the network; exit\n", "changed the network",
			"debug", k.web(), "-i", "--image=busybox:1", "--profile=netadmin", "--", "sh")
		k.saysTo("mount -t tmpfs tmpfs /tmp && echo mounted; exit\n", "mounted",
			"debug", k.web(), "-i", "--image=busybox:1", "--profile=sysadmin", "--", "sh")
	}},
	{verb: "debug a copy", try: func(k kubectl) {
		s := k.talkAt(console.WinSize{Height: 24, Width: 80}, "debug", k.web(), "-it", "--copy-to=copy", "--share-processes", "--image=busybox:1", "-c", "debugger", "--", "sh")
		s.enter("until ps | grep 'httpd -[f]'; do sleep 0.05; done")
		s.await("httpd -f")
		s.enter("exit")
		if code := s.end(); code != 0 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
		k.says("deleted", "delete", "pod", "copy")
	}},
	{verb: "debug a node", try: func(k kubectl) {
		node := "node/" + k.get("nodes", "{.items[0].metadata.name}")
		s := k.talkAt(console.WinSize{Height: 24, Width: 80}, "debug", node, "-it", "--image=busybox:1", "--", "sh")
		s.enter("test -S /host" + k.Dir + "/tutti.sock && echo its files; ps | grep -q 'tutti[-]keeper' && echo its processes; ip addr show eth0")
		s.await("its files")
		s.await("its processes")
		s.await(machine.IP)
		s.enter("exit")
		if code := s.end(); code != 0 {
			k.t.Errorf("exit status %d: %s", code, s.text())
		}
	}},
	{verb: "debug a node by profile", old: "profiles came with 1.23", try: func(k kubectl) {
		node := "node/" + k.get("nodes", "{.items[0].metadata.name}")
		k.saysTo("ip addr add 127.9.9.9/32 dev lo && ip addr del 127.9.9.9/32 dev lo && echo changed the network; exit\n", "changed the network",
			"debug", node, "-i", "--image=busybox:1", "--profile=netadmin", "--", "sh")
		k.saysTo("chroot /host nsenter --target 1 --mount "+k.Binary()+" kubeconfig; exit\n", "admin.kubeconfig",
			"debug", node, "-i", "--image=busybox:1", "--profile=sysadmin", "--", "sh")
	}},
	{verb: "set", try: func(k kubectl) {
		k.says("env updated", "set", "env", "deployment/web", "-c", "web", "GREETING=hello")
		k.says("image updated", "set", "image", "deployment/web", "side=docker.io/library/busybox:1")
		k.says("hello", "exec", "pod/"+k.web(), "-c", "web", "--", "sh", "-c", "echo $GREETING")
	}},
	{verb: "rollout history, undo, restart, pause", try: func(k kubectl) {
		k.says("GREETING", "rollout", "history", "deployment/web", "--revision=2")
		k.says("rolled back", "rollout", "undo", "deployment/web", "--to-revision=1")
		k.web()
		if env := k.get("deployment/web", "{.spec.template.spec.containers[0].env}"); env != "" {
			k.t.Errorf("still there: %s", env)
		}
		k.says("restarted", "rollout", "restart", "deployment/web")
		k.says("paused", "rollout", "pause", "deployment/web")
		k.says("resumed", "rollout", "resume", "deployment/web")
		k.web()
	}},
	{verb: "scale", try: func(k kubectl) {
		k.says("scaled", "scale", "deployment/web", "--replicas=2")
		k.web()
		if got := k.get("deployment/web", "{.status.readyReplicas}"); got != "2" {
			k.t.Errorf("%s are ready", got)
		}
		k.fails(1, "Expected replicas to be 5", "", "scale", "deployment/web", "--current-replicas=5", "--replicas=1")
		k.says("scaled", "scale", "deployment/web", "--current-replicas=2", "--replicas=1")
	}},
	{verb: "autoscale", try: func(k kubectl) {
		k.says("autoscaled", "autoscale", "deployment", "web", "--min=1", "--max=3")
		k.says("Deployment/web", "get", "hpa", "web")
		k.says("deleted", "delete", "hpa", "web")
	}},
	{verb: "top", try: func(k kubectl) {
		k.until("what the pods use", func() (bool, string) {
			r := k.run("", "top", "pod", "--containers", "-l", "app=web")
			return r.Err == nil && strings.Contains(r.Stdout, "side"), r.String()
		})
		k.says("%", "top", "node")
	}},
	{verb: "get events", try: func(k kubectl) {
		k.says("Started", "get", "events", "--field-selector=involvedObject.kind=Pod", "--sort-by=.metadata.creationTimestamp")
	}},
	{verb: "events", old: "came with 1.26; it has get events", try: func(k kubectl) {
		k.says("Started", "events", "--for=pod/"+k.web(), "--types=Normal")
	}},
	{verb: "auth", try: func(k kubectl) {
		k.says("yes", "auth", "can-i", "create", "deployments.apps")
		k.fails(1, "no", "", "auth", "can-i", "delete", "nodes", "--as=system:serviceaccount:"+k.ns+":default")
		k.says("selfsubjectaccessreviews", "auth", "can-i", "--list", "--as=system:serviceaccount:"+k.ns+":default")
	}},
	{verb: "auth whoami", old: "came with 1.26", try: func(k kubectl) {
		k.says("system:serviceaccount:"+k.ns+":default", "auth", "whoami", "--as=system:serviceaccount:"+k.ns+":default")
	}},
	{verb: "create token", old: "came with 1.24", try: func(k kubectl) {
		token := strings.TrimSpace(k.says("", "create", "token", "default", "--duration=15m"))
		review := `{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": "` + token + `"}}`
		k.saysTo(review, "system:serviceaccount:"+k.ns+":default", "create", "-f", "-", "-o", "jsonpath={.status.user.username}")
	}},
	{verb: "certificate", try: func(k kubectl) {
		for verb, condition := range map[string]string{"approve": "Approved", "deny": "Denied"} {
			name := k.ns + "-" + verb
			k.saysTo(kubectlRequest(k.t, name), "created", "create", "-f", "-")
			k.t.Cleanup(func() { k.Kubectl("delete", "csr", name) })
			k.says(name, "certificate", verb, name)
			if got := k.get("csr/"+name, "{.status.conditions[0].type}"); got != condition {
				k.t.Errorf("%s: %s", verb, got)
			}
		}
		k.until("a certificate", func() (bool, string) {
			text := k.get("csr/"+k.ns+"-approve", "{.status.certificate}")
			return text != "", text
		})
	}},
	{verb: "proxy", try: func(k kubectl) {
		s := k.talk("proxy", "--port=0")
		api := "http://" + s.await(`Starting to serve on (127.0.0.1:[0-9]+)`)
		if page := k.fetch(api + "/api/v1/namespaces/" + k.ns + "/configmaps/words"); !strings.Contains(page, `"a":"1"`) {
			k.t.Errorf("of the API: %s", page)
		}
		if page := k.fetch(api + "/api/v1/namespaces/" + k.ns + "/services/web:80/proxy/"); page != "a page\n" {
			k.t.Errorf("of a Service: %s", page)
		}
		s.kill()
	}},
	{verb: "kustomize", try: func(k kubectl) {
		file := k.file("kustomization.yaml", "namePrefix: kustomized-\nresources: [words.yaml]\nconfigMapGenerator:\n- {name: made, literals: [a=1]}\n")
		if err := os.WriteFile(filepath.Join(filepath.Dir(file), "words.yaml"), []byte(kubectlConfig("words", "one")), 0o600); err != nil {
			k.t.Fatal(err)
		}
		k.says("kustomized-made-", "kustomize", filepath.Dir(file))
		k.says("configmap/kustomized-words created", "apply", "-k", filepath.Dir(file))
		k.says("deleted", "delete", "-k", filepath.Dir(file))
	}},
	{verb: "cordon, drain", try: func(k kubectl) {
		oneAtATime.Lock()
		defer oneAtATime.Unlock()
		name := k.get("nodes", "{.items[0].metadata.name}")
		defer k.Kubectl("uncordon", name)
		k.says("cordoned", "cordon", name)
		k.says("SchedulingDisabled", "get", "node", name)
		k.says("uncordoned", "uncordon", name)
		before := k.web()
		k.says("created", "run", "bare", "--image=busybox:1", "--labels=app=web,of="+k.ns, "--", "sleep", "1000")
		own := "--pod-selector=of=" + k.ns // the machine has other guests
		k.fails(1, "cannot delete", "", "drain", name, own)
		k.says("evict", "drain", name, own, "--force", "--ignore-daemonsets", "--delete-emptydir-data", "--grace-period=0", "--timeout=60s")
		k.says("Pending", "get", "pods", "-l", "app=web")
		k.says("uncordoned", "uncordon", name)
		if after := k.web(); after == before {
			k.t.Errorf("%s was not evicted", before)
		}
	}},
	{verb: "delete", try: func(k kubectl) {
		k.says("deleted", "delete", "service,deployment", "web")
		k.says("deleted", "delete", "configmaps", "--all")
		k.fails(1, "not found", "", "delete", "configmap", "words")
	}},
}

// kubectlRequest is a request for a certificate of a client.
func kubectlRequest(t *testing.T, name string) string {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}, key)
	if err != nil {
		t.Fatal(err)
	}
	request := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	return fmt.Sprintf(`{"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": {"name": %q},
		"spec": {"request": %q, "signerName": "kubernetes.io/kube-apiserver-client", "usages": ["client auth"]}}`, name, request)
}
