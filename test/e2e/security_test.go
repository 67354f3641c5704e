package e2e

import (
	"bytes"
	"crypto/tls"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// contain says whether any file below a directory holds the text.
func contain(t *testing.T, dir, text string) bool {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		if os.IsNotExist(err) {
			return nil // etcd renames
		}
		found = found || bytes.Contains(data, []byte(text))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestSecretsAreEncryptedAtRest(t *testing.T) {
	n := shared(t)
	ns := n.namespace("at-rest")
	n.kubectl("-n", ns, "create", "configmap", "open", "--from-literal=word=seen-by-all-1b7d")
	n.kubectl("-n", ns, "create", "secret", "generic", "closed", "--from-literal=word=seen-by-none-1b7d")
	if !contain(t, filepath.Join(n.Dir, "etcd"), "seen-by-all-1b7d") {
		t.Error("this test does not see what is stored")
	}
	if contain(t, filepath.Join(n.Dir, "etcd"), "seen-by-none-1b7d") {
		t.Error("the secret lies open in etcd's files")
	}
	if contain(t, filepath.Join(n.Dir, "audit"), "seen-by-none-1b7d") {
		t.Error("the secret lies open in the audit log")
	}
	n.until("the secret's creation in the audit log", func() (bool, string) {
		return contain(t, filepath.Join(n.Dir, "audit"), `"name":"closed"`), "no such line"
	})
}

func TestFilesAreClosed(t *testing.T) {
	n := shared(t)
	for name, want := range map[string]fs.FileMode{"": 0o700, "admin.kubeconfig": 0o600, "tutti.sock": 0o600} {
		info, err := os.Stat(filepath.Join(n.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%s%s has mode %o, want %o", n.Dir, name, got, want)
		}
	}
	err := filepath.WalkDir(filepath.Join(n.Dir, "pki"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, ".key") {
			return err
		}
		info, err := d.Info()
		if err == nil && info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %o", path, info.Mode().Perm())
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestStrangersAreTurnedAway(t *testing.T) {
	n := shared(t)
	stranger := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: n.Dial, DisableKeepAlives: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // what is asked is who may, not who answers
	}}
	for _, url := range []string{
		"https://127.0.0.1:6443/api/v1/secrets",
		"https://127.0.0.1:10250/pods",
		"https://" + machine.IP + ":10250/containerLogs/a/b/c",
	} {
		if code, body := get(stranger, url); code != http.StatusUnauthorized && code != http.StatusForbidden {
			t.Errorf("%s answers a stranger %d %s", url, code, body)
		}
	}
	// The node may read what its pods need and nothing else.
	ns := n.namespace("strangers")
	n.kubectl("-n", ns, "create", "secret", "generic", "closed", "--from-literal=a=b")
	node := strings.TrimSpace(n.kubectl("get", "nodes", "-o", "jsonpath={.items[0].metadata.name}"))
	as := []string{"--as=system:node:" + node, "--as-group=system:nodes", "--as-group=system:authenticated"}
	if r := n.Kubectl(append(as, "-n", ns, "get", "secret", "closed")...); r.Err == nil || !strings.Contains(r.Stderr, "orbidden") {
		t.Errorf("the node reads a secret that no pod of it needs: %v", r)
	}
	if r := n.Kubectl(append(as, "label", "node", node, "node-role.kubernetes.io/control-plane=x", "--overwrite")...); r.Err == nil {
		t.Error("the node gives itself a role")
	}
}
