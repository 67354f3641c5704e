package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// joined is the namespace of pods on machines that joined.
const joined = "joined"

// joinable returns a machine whose API is open to others, and whose registry
// has busybox:1 for the namespace joined, at inCluster.
func joinable(t *testing.T) node {
	t.Helper()
	n := empty(t)
	n.explainFailure()
	n.ok(n.Tutti("up", "--address", machine.IP))
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	n.ok(n.Tutti("image", "push", "busybox:1", joined+"/busybox:1"))
	return n
}

// inCluster is what pods of every node call busybox:1.
const inCluster = "10.41.0.1:5000/" + joined + "/busybox:1"

// credentials writes those of a node at NeighborIP to a file.
func (n node) credentials(name string) (file string) {
	n.t.Helper()
	file = filepath.Join(n.t.TempDir(), name)
	if err := os.WriteFile(file, []byte(n.ok(n.Tutti("node", "credentials", name, "--address", machine.NeighborIP))), 0o600); err != nil {
		n.t.Fatal(err)
	}
	return file
}

// agent runs tutti agent on a machine until it is called.
func (n node) agent(args ...string) (end func()) {
	n.t.Helper()
	log, err := os.OpenFile(filepath.Join(filepath.Dir(n.Dir), "agent.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	cmd := n.Command(context.WithoutCancel(n.t.Context()), n.Binary(), append([]string{"agent"}, args...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		cmd.Wait() // it is killed
		close(ended)
	}()
	end = func() {
		syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	}
	n.t.Cleanup(func() {
		end()
		if text, err := os.ReadFile(log.Name()); err == nil && n.t.Failed() {
			n.t.Logf("the agent's log ends with\n%s", tail(string(text), 40))
		}
	})
	return end
}

func on(nodeName, spec string) string {
	return strings.ReplaceAll(spec, "image: busybox:1", "image: "+inCluster) + "nodeName: " + nodeName + "\n"
}

// An agent runs pods of a control plane that is elsewhere.
func TestAgent(t *testing.T) {
	n := joinable(t)
	own := n.field("", "node", "{.items[0].metadata.name}")
	m, err := n.Neighbor()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close the neighbor: %v", err)
		}
	})
	second := node{m, t}
	file := n.credentials("n2")
	end := second.agent("--kubeconfig", file)
	n.wait("", "node/n2", "create")
	n.wait("", "node/n2", "condition=Ready")

	ns := n.namespace(joined)
	n.ok(n.Apply(`{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: kept, namespace: joined}, spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}}`))
	n.ok(n.Apply(pod(ns, "there", strings.Replace(on("n2", restarting(one(
		"command: [sh, -c, 'echo hello; echo here >/data/f; exec sleep 100000']\nvolumeMounts: [{name: data, mountPath: /data}]\n"))), "nodeName: n2", "nodeSelector: {kubernetes.io/hostname: n2}", 1)+
		"terminationGracePeriodSeconds: 0\nvolumes: [{name: data, persistentVolumeClaim: {claimName: kept}}]\n")))
	n.wait(ns, "pod/there", "condition=Ready")
	n.until("its log", func() (bool, string) { got := n.kubectl("-n", ns, "logs", "there"); return got == "hello\n", got })
	if got := n.kubectl("-n", ns, "exec", "there", "--", "cat", "/data/f"); got != "here\n" {
		t.Errorf("exec on the other node: %q", got)
	}
	// By name, Service and relay; the answer is the API server's.
	if got := n.kubectl("-n", ns, "exec", "there", "--", "sh", "-c", `printf 'GET / HTTP/1.0\r\n\r\n' | nc kubernetes.default.svc.cluster.local 443`); !strings.Contains(got, "HTTP request to an HTTPS server") {
		t.Errorf("the API from a pod of the other node: %q", got)
	}
	container := containerOf(n, ns, "there")

	t.Run("is the node and no other", func(t *testing.T) {
		as := node{second.Machine, t}
		volume := func(name, host string) string {
			return `{apiVersion: v1, kind: PersistentVolume, metadata: {name: ` + name + `}, spec: {capacity: {storage: 1Mi}, accessModes: [ReadWriteOnce], storageClassName: x, local: {path: /x},
				nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [` + host + `]}]}]}}}}`
		}
		create := func(manifest string) machine.Result {
			return as.RunInput(time.Minute, manifest, as.Binary(), "kubectl", "--kubeconfig", file, "create", "-f", "-")
		}
		if r := create(volume("stolen", "elsewhere")); r.Err == nil || !strings.Contains(r.Stderr, "a node may provide only local volumes of its own; name it in their node affinity") {
			t.Errorf("a volume of another node: %s", r)
		}
		as.ok(create(volume("own", "n2")))
		for _, c := range [][]string{{"get", "secrets", "-A"}, {"delete", "node", "n2"}, {"create", "namespace", "x"}, {"delete", "pvc", "-n", ns, "kept"}} {
			if r := as.Tutti(append([]string{"kubectl", "--kubeconfig", file}, c...)...); r.Err == nil || !strings.Contains(r.Stderr, "orbidden") {
				t.Errorf("a node may %v: %s", c, r)
			}
		}
		as.ok(as.Tutti("kubectl", "--kubeconfig", file, "delete", "pv", "own"))
	})

	t.Run("refusals", func(t *testing.T) {
		other := n.ok(n.Tutti("node", "credentials", "n3", "--address", "192.0.2.30"))
		wrong := filepath.Join(t.TempDir(), "wrong")
		if err := os.WriteFile(wrong, []byte(other), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			on   *machine.Machine
			args []string
			says string
		}{
			{second.Machine, []string{"agent", "--data-dir", t.TempDir(), "--kubeconfig", wrong}, "is not for this machine's address 192.0.2.20; make it on the server with `tutti node credentials n3 --address 192.0.2.20`"},
			{second.Machine, []string{"agent", "--data-dir", t.TempDir(), "--kubeconfig", "/no/such"}, "/no/such does not exist; make it on the server with `tutti node credentials`"},
			{second.Machine, []string{"agent", "--data-dir", t.TempDir(), "--kubeconfig", n.Dir + "/admin.kubeconfig"}, "holds no certificate of a node; make it on the server with `tutti node credentials`"},
			{second.Machine, []string{"node", "credentials", "n4", "--address", "192.0.2.30"}, "this machine is a node of another's cluster; run this on the server"},
			{n.Machine, []string{"node", "credentials", own, "--address", "192.0.2.30"}, own + " is this machine's own name in the cluster; choose another for the node"},
		} {
			r := c.on.Tutti(c.args...)
			if r.Err == nil || !strings.Contains(r.Stderr, c.says) || strings.Count(strings.TrimSpace(r.Stderr[strings.LastIndex(r.Stderr, "tutti: "):]), "\n") != 0 {
				t.Errorf("it does not say %q: %s", c.says, r)
			}
		}
	})

	// The next agent takes over what runs; a server that starts again, too.
	end()
	if r := second.Tutti("up"); r.Err == nil || !strings.Contains(r.Stderr, "this data directory is an agent's, of a cluster elsewhere; run `tutti agent` with it, or begin anew with `tutti stop --purge`") {
		t.Errorf("a server where an agent was: %s", r)
	}
	server, err := n.Server()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Kill(); err != nil {
		t.Fatal(err)
	}
	end = second.agent("--kubeconfig", file)
	n.ok(n.Tutti("up"))
	n.until("the node is looked after", func() (bool, string) {
		r := n.Kubectl("-n", ns, "exec", "there", "--", "hostname")
		return strings.TrimSpace(r.Stdout) == "there", r.String()
	})
	if got := containerOf(n, ns, "there"); got != container {
		t.Errorf("the pod's container is %s, was %s", got, container)
	}

	// What goes, goes from the machine.
	volumes := func() string { return strings.TrimSpace(second.Run(time.Minute, "ls", second.Dir+"/volumes").Stdout) }
	if volumes() == "" {
		t.Error("the claim's data is not on the node")
	}
	n.kubectl("-n", ns, "delete", "pod/there", "pvc/kept")
	n.until("its volume is gone", func() (bool, string) { return volumes() == "", volumes() })

	// A stop leaves the machine as it was.
	second.ok(second.Tutti("stop", "--purge"))
	end()
	if left, err := second.Processes(); err != nil || len(left) > 0 {
		t.Errorf("processes are left: %v %v", left, err)
	}
}
