package e2e

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
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

	n.runs(mine, "web", own)
	spec := "restartPolicy: Never\ncontainers:\n- {name: main, image: \"" + own + "\", imagePullPolicy: Always, command: [echo, from the registry]}\n"
	n.ok(n.Apply(pod(other, "thief", spec)))
	n.wait(other, "pod/thief", "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff")
	// With a pull secret it may.
	n.kubectl("-n", other, "create", "secret", "docker-registry", "pull", "--docker-server="+registryHost, "--docker-username=token", "--docker-password="+viewer)
	n.ok(n.Apply(pod(other, "guest", spec+"imagePullSecrets: [{name: pull}]\n")))
	n.wait(other, "pod/guest", "jsonpath={.status.phase}=Succeeded")
}

// runs runs a pod of an image that is pulled for it.
func (n node) runs(namespace, name, image string) {
	n.t.Helper()
	n.ok(n.Apply(pod(namespace, name, "restartPolicy: Never\ncontainers:\n- {name: main, image: \""+image+"\", imagePullPolicy: Always, command: [echo, from the registry]}\n")))
	n.wait(namespace, "pod/"+name, "jsonpath={.status.phase}=Succeeded")
	if out := n.kubectl("-n", namespace, "logs", name); out != "from the registry\n" {
		n.t.Errorf("pod %s said %q", name, out)
	}
}

// client is somebody who uses the registry from this machine with a program
// that knows nothing of tutti. Each call is the program's own.
type client struct {
	node
	dir string   // of files that go with the test
	env []string // of each call
}

// client gives a test a directory in which ca.crt is the cluster's authority.
func (n node) client(env ...string) client {
	n.t.Helper()
	c := client{n, n.t.TempDir(), env}
	c.write("ca.crt", n.field("default", "configmap/kube-root-ca.crt", `{.data.ca\.crt}`))
	return c
}

func (c client) write(name, text string) string {
	c.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		c.t.Fatal(err)
	}
	return path
}

// debian is how to call a program that test/tools/debian has fetched. It
// finds the authority where it looks for it.
func (c client) debian(args ...string) []string {
	c.t.Helper()
	for _, program := range []string{"docker", "containers"} {
		c.write("etc/"+program+"/certs.d/"+registryHost+"/ca.crt", c.read("ca.crt"))
	}
	return append([]string{"test/tools/debian/run", filepath.Join(c.Repo, "dist/tools/debian"), filepath.Join(c.dir, "etc")}, args...)
}

func (c client) read(name string) string {
	c.t.Helper()
	text, err := os.ReadFile(filepath.Join(c.dir, name))
	if err != nil {
		c.t.Fatal(err)
	}
	return string(text)
}

// input is called with what the program reads.
func (c client) input(input string, args ...string) string {
	c.t.Helper()
	return c.ok(c.RunInput(2*time.Minute, input, "env", slices.Concat(c.env, args)...))
}

func (c client) call(args ...string) string {
	c.t.Helper()
	return c.input("", args...)
}

// refused is a call that must fail, and say why.
func (c client) refused(says string, args ...string) {
	c.t.Helper()
	r := c.Run(2*time.Minute, "env", slices.Concat(c.env, args)...)
	if r.Err == nil || !strings.Contains(r.Stdout+r.Stderr, says) {
		c.t.Errorf("must fail and say %q: %s", says, r)
	}
}

// Programs that others wrote log in, push, pull, list and remove, trusting
// the cluster's authority alone; the node runs what they have pushed.
func TestRegistryTools(t *testing.T) {
	n := shared(t)
	mine, other := n.namespace("tools-mine"), n.namespace("tools-other")
	dev := n.token(mine, "dev", "edit")
	n.ok(n.Tutti("image", "push", "busybox:1", mine+"/base:1"))
	n.until("push by role edit", func() (bool, string) {
		said, ok := n.pushAs(dev, registryHost+"/"+mine+"/first:1")
		return ok, said
	})
	base, repo, foreign := registryHost+"/"+mine+"/base:1", registryHost+"/"+mine+"/", registryHost+"/"+other+"/web:1"

	t.Run("crane", func(t *testing.T) {
		c := node{n.Machine, t}.client()
		c.env = []string{"SSL_CERT_FILE=" + filepath.Join(c.dir, "ca.crt"), "DOCKER_CONFIG=" + c.dir}
		crane := func(args ...string) []string { return append([]string{"dist/tools/crane"}, args...) }
		c.refused("UNAUTHORIZED", crane("digest", base)...)
		c.input(dev, crane("auth", "login", registryHost, "-u", "token", "--password-stdin")...)
		c.call(crane("pull", base, filepath.Join(c.dir, "image.tar"))...)
		c.call(crane("push", filepath.Join(c.dir, "image.tar"), repo+"crane:1")...)
		c.call(crane("copy", repo+"crane:1", repo+"crane:2")...)
		c.refused("403 Forbidden", crane("push", filepath.Join(c.dir, "image.tar"), foreign)...)
		c.refused("may not list all repositories", crane("catalog", registryHost)...)
		if tags := c.call(crane("ls", repo+"crane")...); tags != "1\n2\n" {
			t.Errorf("tags %q", tags)
		}
		c.runs(mine, "crane", repo+"crane:2")
		c.call(crane("delete", repo+"crane@"+strings.TrimSpace(c.call(crane("digest", repo+"crane:1")...)))...)
		c.refused("MANIFEST_UNKNOWN", crane("manifest", repo+"crane:1")...)
	})

	t.Run("skopeo", func(t *testing.T) {
		c := node{n.Machine, t}.client()
		c.env = []string{"REGISTRY_AUTH_FILE=" + filepath.Join(c.dir, "auth.json")}
		skopeo := func(args ...string) []string { return c.debian(append([]string{"skopeo"}, args...)...) }
		c.refused("unauthorized", skopeo("inspect", "docker://"+base)...)
		c.input(dev, skopeo("login", "--username=token", "--password-stdin", registryHost)...)
		c.call(skopeo("copy", "docker://"+base, "oci:"+filepath.Join(c.dir, "layout")+":1")...)
		c.call(skopeo("copy", "oci:"+filepath.Join(c.dir, "layout")+":1", "docker://"+repo+"skopeo:1")...)
		c.call(skopeo("copy", "docker://"+repo+"skopeo:1", "docker://"+repo+"skopeo:2")...)
		c.refused("403 (Forbidden)", skopeo("copy", "docker://"+base, "docker://"+foreign)...)
		if list := decode[struct{ Tags []string }](t, c.call(skopeo("list-tags", "docker://"+repo+"skopeo")...)); !slices.Equal(list.Tags, []string{"1", "2"}) {
			t.Errorf("tags %v", list.Tags)
		}
		c.runs(mine, "skopeo", repo+"skopeo:2")
		c.call(skopeo("delete", "docker://"+repo+"skopeo:1")...)
		c.refused("manifest unknown", skopeo("inspect", "docker://"+repo+"skopeo:1")...)
	})

	t.Run("podman", func(t *testing.T) {
		c := node{n.Machine, t}.client()
		c.env = []string{"REGISTRY_AUTH_FILE=" + filepath.Join(c.dir, "auth.json")}
		podman := func(args ...string) []string {
			return c.debian(slices.Concat([]string{"podman", "--storage-driver=vfs", "--root=" + filepath.Join(c.dir, "root"),
				"--runroot=" + filepath.Join(c.dir, "run"), "--cgroup-manager=cgroupfs", "--events-backend=none"}, args)...)
		}
		c.write("auth.json", "{}") // podman wants the file to be there
		c.refused("log in with any user name", podman("pull", base)...)
		c.input(dev, podman("login", "--username=token", "--password-stdin", registryHost)...)
		c.call(podman("pull", base)...)
		for _, tag := range []string{"1", "2"} {
			c.call(podman("push", base, repo+"podman:"+tag)...)
		}
		c.refused("403 (Forbidden)", podman("push", base, foreign)...)
		if list := c.call(podman("search", "--list-tags", repo+"podman")...); strings.Join(strings.Fields(list), " ") != "NAME TAG "+repo+"podman 1 "+repo+"podman 2" {
			t.Errorf("tags %q", list)
		}
		c.runs(mine, "podman", repo+"podman:2")
	})

	t.Run("docker", func(t *testing.T) {
		c := node{n.Machine, t}.client()
		socket := "unix://" + filepath.Join(c.dir, "docker.sock")
		c.env = []string{"DOCKER_CONFIG=" + c.dir, "DOCKER_HOST=" + socket}
		c.dockerd(socket)
		docker := func(args ...string) []string { return c.debian(append([]string{"/usr/bin/docker"}, args...)...) }
		c.refused("no basic auth credentials", docker("pull", base)...)
		c.input(dev, docker("login", "--username=token", "--password-stdin", registryHost)...)
		c.call(docker("pull", base)...)
		for _, tag := range []string{"1", "2"} {
			c.call(docker("tag", base, repo+"docker:"+tag)...)
		}
		c.call(docker("push", "--all-tags", repo+"docker")...)
		c.call(docker("tag", base, foreign)...)
		c.refused("may not update repositories in namespace "+other, docker("push", foreign)...)
		c.runs(mine, "docker", repo+"docker:2")
		c.call(docker("rmi", "--force", repo+"docker:1")...)
		c.call(docker("pull", repo+"docker:1")...)
		// To localhost it needs no authority.
		local := "localhost:5000/" + mine + "/docker:3"
		c.input(dev, docker("login", "--username=token", "--password-stdin", "localhost:5000")...)
		c.call(docker("tag", base, local)...)
		c.call(docker("push", local)...)
		c.runs(mine, "docker-local", repo+"docker:3")
	})
}

// dockerd runs until the test ends. It makes no containers: it needs no
// network.
func (c client) dockerd(socket string) {
	c.t.Helper()
	c.daemon(c.debian("/usr/bin/docker", "version"), "dockerd", "--host="+socket, "--data-root="+filepath.Join(c.dir, "data"),
		"--exec-root="+filepath.Join(c.dir, "exec"), "--pidfile="+filepath.Join(c.dir, "docker.pid"), "--storage-driver=vfs",
		"--bridge=none", "--iptables=false", "--ip6tables=false", "--ip-forward=false", "--ip-masq=false")
}

// daemon runs one that test/tools/debian has fetched until the test ends. It
// is there once the other program succeeds.
func (c client) daemon(ready []string, args ...string) {
	t := c.t
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	call := c.debian(args...)
	cmd := c.Command(ctx, call[0], call[1:]...)
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	name := args[0] + ".log"
	log, err := os.Create(filepath.Join(c.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr, cmd.WaitDelay = log, log, 30*time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was told to end
		log.Close()
		if t.Failed() {
			t.Logf("%s said\n%s", args[0], tail(c.read(name), 20))
		}
	})
	c.until(args[0]+" to answer", func() (bool, string) {
		r := c.Run(time.Minute, "env", slices.Concat(c.env, ready)...)
		return r.Err == nil, r.Stderr
	})
}
