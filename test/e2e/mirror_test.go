package e2e

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// What another registry has is fetched once, and stays when that registry
// goes, for pods and for people.
func TestMirror(t *testing.T) {
	n := empty(t)
	n.explainFailure()
	upstream := machine.OutsideIP + ":5001"
	n.ok(n.Tutti("up", "--mirrors", "up.test=http://"+upstream))
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	c := n.client()
	c.env = []string{"SSL_CERT_FILE=" + filepath.Join(c.dir, "ca.crt"), "DOCKER_CONFIG=" + c.dir}
	token := n.token("default", "dev", "edit")
	c.input(token, "dist/tools/crane", "auth", "login", registryHost, "-u", "token", "--password-stdin")

	serve, stop := context.WithCancel(t.Context())
	server := n.CommandOutside(serve, "dist/tools/crane", "registry", "serve", "--address="+upstream)
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() { stop(); _ = server.Wait() } // it was killed
	t.Cleanup(end)
	n.ok(n.Tutti("image", "push", "busybox:1", "default/web:1"))
	n.until("copy to the other registry", func() (bool, string) {
		r := c.Run(time.Minute, "env", append(c.env, "dist/tools/crane", "copy", "--insecure", registryHost+"/default/web:1", upstream+"/lib/web:1")...)
		return r.Err == nil, r.String()
	})

	pull := func(says string) {
		t.Helper()
		r := n.Tutti("image", "pull", "up.test/lib/none:1")
		if want := "tutti: pull up.test/lib/none:1: up.test " + says; r.Code != 1 || !strings.HasPrefix(r.Stderr, want) || strings.Count(r.Stderr, "\n") != 1 {
			t.Errorf("want one line, %q…: %s", want, r)
		}
	}
	// With the image that it was made of on the machine there would be
	// nothing to fetch.
	n.ok(n.Tutti("image", "rm", "busybox:1"))
	n.runs("default", "first", "up.test/lib/web:1")
	pull("has no lib/none with tag 1")
	c.refused("push to up.test itself", "dist/tools/crane", "copy", registryHost+"/default/web:1", registryHost+"/up.test/lib/web:2")

	end()
	n.kubectl("delete", "pod", "first")
	n.ok(n.Tutti("image", "rm", "--force", "up.test/lib/web:1"))
	n.runs("default", "second", "up.test/lib/web:1")
	pull("cannot be reached")
	c.call("dist/tools/crane", "pull", registryHost+"/up.test/lib/web:1", filepath.Join(c.dir, "web.tar"))

	// skopeo and podman find it by their own list of mirrors, containerd by
	// its, which says ?ns=.
	c.write("etc/containers/registries.conf", `[[registry]]
location = "up.test"
[[registry.mirror]]
location = "`+registryHost+`/up.test"
`)
	c.env = append(c.env, "REGISTRY_AUTH_FILE="+filepath.Join(c.dir, "config.json"))
	c.call(c.debian("skopeo", "copy", "docker://up.test/lib/web:1", "oci:"+filepath.Join(c.dir, "layout")+":1")...)
	c.write("hosts/up.test/hosts.toml", `server = "http://`+upstream+`"
[host."https://`+registryHost+`"]
  capabilities = ["pull", "resolve"]
  ca = "`+filepath.Join(c.dir, "ca.crt")+`"
`)
	ctr := func(args ...string) []string {
		return c.debian(append([]string{"ctr", "--address=" + filepath.Join(c.dir, "containerd.sock")}, args...)...)
	}
	c.daemon(ctr("version"), "containerd", "--address="+filepath.Join(c.dir, "containerd.sock"), "--root="+filepath.Join(c.dir, "containerd"), "--state="+filepath.Join(c.dir, "state"))
	c.call(ctr("content", "fetch", "--hosts-dir="+filepath.Join(c.dir, "hosts"), "--user=token:"+token, "up.test/lib/web:1")...)

	// A server that has never met the other registry serves what is here.
	n.ok(n.Tutti("stop"))
	n.up()
	n.ok(n.Tutti("image", "rm", "--force", "up.test/lib/web:1"))
	n.runs("default", "third", "up.test/lib/web:1")

	if testing.Short() {
		return // a collection waits until nobody has pushed for a minute
	}
	n.kubectl("delete", "pod", "third")
	n.ok(n.Tutti("image", "rm", "--force", "up.test/lib/web:1"))
	if out := n.ok(n.Tutti("image", "gc", "--mirrors")); !strings.HasPrefix(out, "the registry is smaller by 2.") {
		t.Errorf("gc: %s", out)
	}
	if r := n.Tutti("image", "pull", "up.test/lib/web:1"); !strings.Contains(r.Stderr, "cannot be reached") {
		t.Errorf("it is still there: %s", r)
	}
}
