package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const registryHost = "10.41.0.1:5000"

// pushAs pushes busybox:1 with somebody's token.
func (n node) pushAs(token, to string) (said string, ok bool) {
	r := n.RunInput(time.Minute, token, n.Binary(), "image", "push", "busybox:1", to, "--password-stdin")
	return r.Stderr, r.Err == nil
}

// token is one of a ServiceAccount made for it, which has a role in its
// namespace.
func (n node) token(namespace, name, role string) string {
	n.t.Helper()
	n.kubectl("-n", namespace, "create", "serviceaccount", name)
	n.kubectl("-n", namespace, "create", "rolebinding", name, "--clusterrole="+role, "--serviceaccount="+namespace+":"+name)
	return strings.TrimSpace(n.kubectl("-n", namespace, "create", "token", name))
}

// A developer's token pushes where its role says so; pods of that namespace
// run what was pushed, and those of others do not.
func TestRegistry(t *testing.T) {
	n := shared(t)
	mine, other := n.namespace("registry-mine"), n.namespace("registry-other")
	dev, viewer := n.token(mine, "dev", "edit"), n.token(mine, "viewer", "view")
	own := registryHost + "/" + mine + "/web:1"

	// Roles take a moment to come into force.
	n.until("push by role edit", func() (bool, string) { said, ok := n.pushAs(dev, own); return ok, said })
	for _, c := range []struct{ what, token, to, says string }{
		// What is there already need not be pushed.
		{"role view", viewer, own + "-new", "may not"},
		{"another namespace", dev, registryHost + "/" + other + "/web:1", "may not"},
		{"no such token", "word", own, "refuses access"},
	} {
		if said, ok := n.pushAs(c.token, c.to); ok || !strings.Contains(said, c.says) {
			t.Errorf("push by %s: %v: %s", c.what, ok, said)
		}
	}
	// Root is the administrator.
	if out := n.ok(n.Tutti("image", "push", "busybox:1", other+"/web:1")); !strings.HasPrefix(out, registryHost+"/"+other+"/web:1@sha256:") {
		t.Errorf("push by root: %s", out)
	}

	spec := "restartPolicy: Never\ncontainers:\n- {name: main, image: \"" + own + "\", imagePullPolicy: Always, command: [echo, from the registry]}\n"
	n.ok(n.Apply(pod(mine, "web", spec)))
	n.wait(mine, "pod/web", "jsonpath={.status.phase}=Succeeded")
	if out := n.kubectl("-n", mine, "logs", "web"); out != "from the registry\n" {
		t.Errorf("the pod said %q", out)
	}
	n.ok(n.Apply(pod(other, "thief", spec)))
	n.wait(other, "pod/thief", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
	// With a pull secret it may.
	n.kubectl("-n", other, "create", "secret", "docker-registry", "pull", "--docker-server="+registryHost, "--docker-username=token", "--docker-password="+viewer)
	n.ok(n.Apply(pod(other, "guest", spec+"imagePullSecrets: [{name: pull}]\n")))
	n.wait(other, "pod/guest", "jsonpath={.status.phase}=Succeeded")

	t.Run("skopeo", func(t *testing.T) {
		if testing.Short() {
			t.Skip("the tools that others wrote are for the long run")
		}
		if _, err := exec.LookPath("skopeo"); err != nil {
			t.Skip("skopeo is not installed")
		}
		n := node{n.Machine, t}
		n.skopeo(mine, dev)
	})
}

// skopeo copies, lists and removes, trusting the cluster's authority alone.
func (n node) skopeo(namespace, token string) {
	t := n.t
	t.Helper()
	dir := t.TempDir()
	authority := n.kubectl("-n", namespace, "get", "configmap", "kube-root-ca.crt", "-o", `jsonpath={.data.ca\.crt}`)
	if err := os.WriteFile(filepath.Join(dir, "ca.crt"), []byte(authority), 0o600); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) string {
		t.Helper()
		return n.ok(n.Run(time.Minute, "skopeo", append([]string{"--insecure-policy"}, args...)...))
	}
	creds, name := "token:"+token, "docker://"+registryHost+"/"+namespace+"/tool"
	from := "docker://" + registryHost + "/" + namespace + "/web:1"
	run("copy", "--src-cert-dir="+dir, "--dest-cert-dir="+dir, "--src-creds="+creds, "--dest-creds="+creds, from, name+":1")
	run("copy", "--src-cert-dir="+dir, "--dest-cert-dir="+dir, "--src-creds="+creds, "--dest-creds="+creds, from, name+":2")
	var list struct{ Tags []string }
	if err := json.Unmarshal([]byte(run("list-tags", "--cert-dir="+dir, "--creds="+creds, name)), &list); err != nil || strings.Join(list.Tags, " ") != "1 2" {
		t.Errorf("tags %v: %v", list.Tags, err)
	}
	run("copy", "--src-cert-dir="+dir, "--src-creds="+creds, name+":2", "oci:"+filepath.Join(dir, "out")+":2")
	run("delete", "--cert-dir="+dir, "--creds="+creds, name+":1")
	if r := n.Run(time.Minute, "skopeo", "inspect", "--cert-dir="+dir, "--creds="+creds, name+":1"); r.Err == nil {
		t.Errorf("still there after its removal: %s", r.Stdout)
	}
}
