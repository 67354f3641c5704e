package registry_test

import (
	"context"
	"crypto/x509"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/image/registry"
)

// public lets everybody do everything.
type public struct{}

func (public) Authenticate(*http.Request) (registry.User, error) { return name("anyone"), nil }

func (public) Allowed(context.Context, registry.User, registry.Verb, string, string) (bool, error) {
	return true, nil
}

// upstream is a registry that asks nobody who they are.
func upstream(t *testing.T) served {
	t.Helper()
	r := registry.New(registry.Options{Dir: t.TempDir(), Access: public{}, Quiet: time.Hour})
	s := httptest.NewServer(r)
	t.Cleanup(func() { s.Close(); r.Close() })
	return served{s, r, "", s.Listener.Addr().String()}
}

// mirroring returns a registry in a directory that mirrors another one.
func mirroring(t *testing.T, dir, url string) served {
	t.Helper()
	r := registry.New(registry.Options{Dir: dir, Access: can("ed get", "ed get a", "vi get a"), Mirrors: map[string]string{"up.test": url}})
	s := httptest.NewTLSServer(r)
	t.Cleanup(func() { s.Close(); r.Close() })
	return served{s, r, dir, s.Listener.Addr().String()}
}

func TestMirror(t *testing.T) {
	up := upstream(t)
	manifest, layer := up.push(t, "", "lib/web", "1", "hello")
	up.push(t, "", "lib/web", "2", "other")
	dir := filepath.Join(t.TempDir(), "registry")
	s := mirroring(t, dir, up.URL)
	blob := "/v2/lib/web/blobs/" + layer.String() + "?ns=up.test"

	for _, c := range []struct {
		user, method, path string
		status             int
		says               string
	}{
		{"", "GET", blob, 401, "UNAUTHORIZED"},
		{"vi", "GET", blob, 403, "vi may not use the mirror of up.test"},
		{"vi", "GET", "/v2/up.test/lib/web/tags/list", 403, "vi may not use the mirror of up.test"},
		{"ed", "POST", "/v2/up.test/lib/web/blobs/uploads/", 405, "push to up.test itself"},
		{"ed", "DELETE", "/v2/lib/web/manifests/" + manifest.String() + "?ns=up.test", 405, "UNSUPPORTED"},
		{"ed", "GET", "/v2/lib/web/tags/list?ns=down.test", 404, "--mirrors down.test"},
		{"ed", "GET", "/v2/down.test/lib/web/manifests/1", 404, "--mirrors down.test"},
		{"ed", "GET", "/v2/_catalog?ns=up.test", 200, `"repositories"`},
		{"ed", "GET", "/v2/?ns=up.test", 200, ""},
		{"ed", "GET", "/v2/up.test/lib/web/tags/list?n=1", 200, `["1","2"]`},
		{"ed", "GET", "/v2/lib/web/manifests/3?ns=up.test", 404, "MANIFEST_UNKNOWN"},
		{"ed", "GET", "/v2/up.test/lib/web/manifests/1", 200, layer.String()},
		{"ed", "HEAD", "/v2/lib/web/manifests/2?ns=up.test", 200, ""},
		{"ed", "GET", blob, 200, "hello"},
	} {
		t.Run(c.user+" "+c.method+" "+c.path, func(t *testing.T) {
			if status, _, text := s.ask(t, c.user, c.method, c.path, "", nil); status != c.status || !strings.Contains(text, c.says) {
				t.Errorf("got %d %s, want %d with %q", status, text, c.status, c.says)
			}
		})
	}

	// What is here stays here when the upstream does not, also for one that
	// has never met it.
	up.Server.Close()
	for range 2 {
		s.want(t, 200, "ed", http.MethodGet, "/v2/lib/web/manifests/1?ns=up.test", "", nil)
		s.want(t, 200, "ed", http.MethodGet, blob, "", nil)
		s.want(t, 404, "ed", http.MethodGet, "/v2/lib/web/manifests/3?ns=up.test", "", nil)
		s.Server.Close()
		s.Registry.Close()
		s = mirroring(t, dir, up.URL)
	}
	s.want(t, 200, "ed", http.MethodGet, blob, "", nil)
	if freed, err := s.Forget(t.Context()); err != nil || freed < int64(len("hello")) {
		t.Errorf("forget: %d, %v", freed, err)
	}
	s.want(t, 404, "ed", http.MethodGet, blob, "", nil)
	s.want(t, 404, "ed", http.MethodGet, "/v2/a/web/manifests/1", "", nil)
}

// A store pulls by way of the mirror; what that cannot give, the registry
// itself has to refuse.
func TestStoreThroughMirror(t *testing.T) {
	up := upstream(t)
	up.push(t, "", "lib/web", "broken", "no archive")
	made := open(t)
	img, err := made.Import(t.Context(), "web:1", rootfs(t), image.Config{Entrypoint: []string{"/hello"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := made.Push(t.Context(), "web:1", up.host+"/lib/web:1", nil); err != nil {
		t.Fatal(err)
	}
	s := mirroring(t, t.TempDir(), up.URL)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	node := func(token string) *image.Local {
		l := open(t)
		l.UseBuiltin(image.Builtin{Hosts: []string{s.host}, Roots: roots, Mirrors: map[string]string{"up.test": up.URL}, Node: image.Auth{RegistryToken: token}})
		return l
	}
	first, second, stranger := node("ed"), node("ed"), node("vi")
	for name, says := range map[string]string{
		"up.test/lib/web:2":      "pull up.test/lib/web:2: up.test has no lib/web with tag 2",
		"up.test/lib/web:broken": "pull up.test/lib/web:broken: ",
	} {
		if _, err := first.Pull(t.Context(), name, nil); err == nil || !strings.HasPrefix(err.Error(), says) {
			t.Errorf("pull %s: %v", name, err)
		}
	}
	if got, err := first.Pull(t.Context(), "up.test/lib/web:1", nil); err != nil || got.ID != img.ID {
		t.Errorf("first pull: %+v, %v", got, err)
	}
	if got, err := stranger.Pull(t.Context(), "up.test/lib/web:1", nil); err != nil || got.ID != img.ID {
		t.Errorf("a node that may not use the mirror goes past it: %+v, %v", got, err)
	}
	up.Server.Close()
	if got, err := second.Pull(t.Context(), "up.test/lib/web:1", nil); err != nil || got.ID != img.ID {
		t.Errorf("without the upstream: %+v, %v", got, err)
	}
	if _, err := second.Pull(t.Context(), "up.test/lib/web:2", nil); err == nil || !strings.Contains(err.Error(), "pull up.test/lib/web:2: up.test cannot be reached") {
		t.Errorf("what is not kept, without the upstream: %v", err)
	}
	if _, err := second.Pull(t.Context(), "up.test/lib/web:1", []image.Auth{{Username: "me", Password: "mine"}}); err == nil {
		t.Error("credentials did not go to the registry itself")
	}
}
