package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A static pod runs because of a file on its node. What the API has of it is
// for people to look at: deleting that ends nothing.
func TestStaticPod(t *testing.T) {
	n := shared(t)
	file := filepath.Join(n.Dir, "manifests", "static.yaml")
	t.Cleanup(func() { _ = os.Remove(file) })
	text := pod("default", "static", "containers:\n- name: main\n  image: busybox:1\n"+
		"  command: [sh, -c, \"trap 'exit 0' TERM; date +%s%N; while :; do sleep 0.1; done\"]\nterminationGracePeriodSeconds: 5\n")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	node := strings.TrimSpace(n.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"))
	name := "pod/static-" + strings.ToLower(node)
	exists := func() bool { return n.Kubectl("get", name).Err == nil }
	n.until("the mirror pod", func() (bool, string) { return exists(), "no " + name })
	n.wait("default", name, "condition=Ready")
	said := n.kubectl("logs", name)
	if out := n.kubectl("exec", name, "--", "hostname"); out != strings.TrimPrefix(name, "pod/")+"\n" {
		t.Errorf("exec says %q", out)
	}

	uid := n.field("default", name, "{.metadata.uid}")
	n.kubectl("delete", name, "--wait=false")
	n.until("another mirror pod", func() (bool, string) {
		now := n.Kubectl("get", name, "-o", "jsonpath={.metadata.uid}").Stdout
		return now != "" && now != uid, now
	})
	n.wait("default", name, "condition=Ready")
	if again := n.kubectl("logs", name); again != said {
		t.Errorf("it was started again: %q, then %q", said, again)
	}

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	n.until("the end of the pod", func() (bool, string) { return !exists(), name + " is still there" })
}
