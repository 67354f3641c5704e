package registry_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/image/registry"
)

type name string

func (n name) GetName() string { return string(n) }

// roles lets a user in whose password or token is their name, and do what the table
// says: "user verb namespace".
type roles struct {
	rules map[string]bool
	down  atomic.Bool
}

func (a *roles) Authenticate(r *http.Request) (registry.User, error) {
	if token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return name(token), nil
	}
	user, password, ok := r.BasicAuth()
	if !ok || user != password {
		return nil, nil
	}
	return name(user), nil
}

func (a *roles) Allowed(_ context.Context, user registry.User, verb registry.Verb, namespace, _ string) (bool, error) {
	if a.down.Load() {
		return false, fmt.Errorf("the API does not answer")
	}
	return a.rules[strings.TrimSpace(user.GetName()+" "+string(verb)+" "+namespace)], nil
}

func can(all ...string) *roles {
	a := &roles{rules: map[string]bool{}}
	for _, r := range all {
		a.rules[r] = true
	}
	return a
}

type served struct {
	*httptest.Server
	*registry.Registry
	dir, host string
}

func serve(t *testing.T, access registry.Access, quiet time.Duration) served {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "registry")
	r := registry.New(registry.Options{Dir: dir, Access: access, Quiet: quiet})
	s := httptest.NewTLSServer(r)
	t.Cleanup(func() { s.Close(); r.Close() })
	return served{s, r, dir, s.Listener.Addr().String()}
}

// ask sends one request as a user and returns status, headers and body.
func (s served) ask(t *testing.T, user, method, path, mediaType string, body []byte) (int, http.Header, string) {
	t.Helper()
	url := path
	if strings.HasPrefix(path, "/") {
		url = s.URL + path
	}
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if user != "" {
		req.SetBasicAuth(user, user)
	}
	req.Header.Set("Accept", ociManifest)
	if mediaType != "" {
		req.Header.Set("Content-Type", mediaType)
	}
	resp, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(text)
}

func (s served) want(t *testing.T, status int, user, method, path, mediaType string, body []byte) (http.Header, string) {
	t.Helper()
	got, header, text := s.ask(t, user, method, path, mediaType, body)
	if got != status {
		t.Fatalf("%s %s as %q: %d %s, want %d", method, path, user, got, text, status)
	}
	return header, text
}

// blob uploads content.
func (s served) blob(t *testing.T, user, repository string, content []byte) digest.Digest {
	t.Helper()
	d := digest.FromBytes(content)
	header, _ := s.want(t, http.StatusAccepted, user, http.MethodPost, "/v2/"+repository+"/blobs/uploads/", "", nil)
	location := header.Get("Location")
	s.want(t, http.StatusCreated, user, http.MethodPut, location+"&digest="+d.String(), "application/octet-stream", content)
	return d
}

const ociManifest = "application/vnd.oci.image.manifest.v1+json"

// push uploads an image of one blob and tags it.
func (s served) push(t *testing.T, user, repository, tag, content string) (manifest, layer digest.Digest) {
	t.Helper()
	config := []byte(`{"architecture":"amd64","os":"linux","rootfs":{"type":"layers"}}`)
	c, l := s.blob(t, user, repository, config), s.blob(t, user, repository, []byte(content))
	text := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":%q,"size":%d},`+
		`"layers":[{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":%q,"size":%d}]}`, ociManifest, c, len(config), l, len(content))
	s.want(t, http.StatusCreated, user, http.MethodPut, "/v2/"+repository+"/manifests/"+tag, ociManifest, text)
	return digest.FromBytes(text), l
}

func TestWhoMayDoWhat(t *testing.T) {
	s := serve(t, can("ed get a", "ed update a", "ed delete a", "vi get a", "root list", "vi get c", "ed get b", "ed update b"), time.Hour)
	manifest, layer := s.push(t, "ed", "a/web", "1", "hello")
	blob := "/v2/a/web/blobs/" + layer.String()
	for _, c := range []struct {
		user, method, path string
		status             int
		says               string
	}{
		{"", "GET", "/v2/", 401, "UNAUTHORIZED"},
		{"", "GET", blob, 401, "UNAUTHORIZED"},
		{"", "GET", "/v2/no/such/route/there", 401, "UNAUTHORIZED"},
		{"vi", "GET", "/v2/", 200, "{}"},
		{"vi", "GET", blob, 200, "hello"},
		{"vi", "HEAD", blob, 200, ""},
		{"vi", "GET", "/v2/a/web/manifests/1", 200, layer.String()},
		{"vi", "GET", "/v2/a/web/tags/list", 200, `"1"`},
		{"vi", "POST", "/v2/a/web/blobs/uploads/", 403, "vi may not update repositories in namespace a"},
		{"vi", "PUT", "/v2/a/web/manifests/1", 403, "DENIED"},
		{"vi", "DELETE", "/v2/a/web/manifests/1", 403, "DENIED"},
		{"vi", "GET", "/v2/b/web/tags/list", 403, "DENIED"},
		{"vi", "GET", "/v2/a/../b/web/tags/list", 404, ""},
		{"vi", "TRACE", "/v2/a/web/manifests/1", 405, "UNSUPPORTED"},
		{"vi", "GET", "/v2/_catalog", 403, "may not list"},
		{"root", "GET", "/v2/_catalog", 200, "a/web"},
		{"root", "GET", blob, 403, "DENIED"},
		{"ed", "GET", "/v2/web/tags/list", 400, "no namespace"},
		{"ed", "POST", "/v2/c/web/blobs/uploads/", 403, "DENIED"},
		{"ed", "GET", "/other", 404, ""},
	} {
		t.Run(c.user+" "+c.method+" "+c.path, func(t *testing.T) {
			status, header, text := s.ask(t, c.user, c.method, c.path, "", nil)
			if status != c.status || !strings.Contains(text, c.says) {
				t.Errorf("got %d %s, want %d with %q", status, text, c.status, c.says)
			}
			if status == 401 && !strings.HasPrefix(header.Get("WWW-Authenticate"), "Basic ") {
				t.Errorf("no challenge: %v", header)
			}
		})
	}

	t.Run("mount", func(t *testing.T) {
		from := "/v2/b/web/blobs/uploads/?mount=" + layer.String() + "&from="
		s.want(t, 201, "ed", http.MethodPost, from+"a/web", "", nil)
		// What one may not read is not there: an ordinary upload begins.
		s := serve(t, can("ed get a", "ed update a", "x get b", "x update b"), time.Hour)
		_, layer := s.push(t, "ed", "a/web", "1", "hello")
		header, _ := s.want(t, 202, "x", http.MethodPost, "/v2/b/web/blobs/uploads/?mount="+layer.String()+"&from=a/web", "", nil)
		if header.Get("Location") == "" {
			t.Error("no upload was begun")
		}
		s.want(t, 202, "x", http.MethodPost, "/v2/b/web/blobs/uploads/", "application/x-www-form-urlencoded", []byte("from=a/web&mount="+layer.String()))
		s.want(t, 404, "x", http.MethodGet, "/v2/b/web/blobs/"+layer.String(), "", nil)
	})

	t.Run("remove", func(t *testing.T) {
		s.want(t, 202, "ed", http.MethodDelete, "/v2/a/web/manifests/"+manifest.String(), "", nil)
		s.want(t, 404, "vi", http.MethodGet, "/v2/a/web/manifests/1", "", nil)
	})
}

func TestAccessDown(t *testing.T) {
	a := can("ed get a")
	s := serve(t, a, time.Hour)
	a.down.Store(true)
	s.want(t, 503, "ed", http.MethodGet, "/v2/a/web/tags/list", "", nil)
	a.down.Store(false)
	s.want(t, 404, "ed", http.MethodGet, "/v2/a/web/tags/list", "", nil)
}

func TestCollect(t *testing.T) {
	quiet := 300 * time.Millisecond
	s := serve(t, can("ed get a", "ed update a", "ed delete a"), quiet)
	if freed, err := s.Collect(t.Context(), false); err != nil || freed != 0 {
		t.Fatalf("of an empty registry: %d, %v", freed, err)
	}
	_, kept := s.push(t, "ed", "a/web", "1", strings.Repeat("kept", 1000))
	old, gone := s.push(t, "ed", "a/web", "2", strings.Repeat("gone", 1000))
	_, untagged := s.push(t, "ed", "a/web", "3", strings.Repeat("untagged", 1000))
	s.push(t, "ed", "a/web", "3", strings.Repeat("new", 1000))
	has := func(d digest.Digest) int {
		status, _, _ := s.ask(t, "ed", http.MethodGet, "/v2/a/web/blobs/"+d.String(), "", nil)
		return status
	}

	// A push under way keeps the garbage.
	short, cancel := context.WithTimeout(t.Context(), quiet/3)
	defer cancel()
	s.want(t, 202, "ed", http.MethodPost, "/v2/a/web/blobs/uploads/", "", nil)
	if _, err := s.Collect(short, false); err == nil {
		t.Fatal("collected while somebody pushed")
	}

	// A removal is followed by a collection once it is quiet.
	s.want(t, 202, "ed", http.MethodDelete, "/v2/a/web/manifests/"+old.String(), "", nil)
	if has(gone) != 200 {
		t.Error("collected at once")
	}
	for deadline := time.Now().Add(20 * time.Second); has(gone) != 404; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("what was removed stays")
		}
	}
	if has(kept) != 200 || has(untagged) != 200 {
		t.Error("collected what a manifest names")
	}
	freed, err := s.Collect(t.Context(), true)
	if err != nil || freed < 8000 || has(untagged) != 404 || has(kept) != 200 {
		t.Errorf("untagged: freed %d, %v; untagged %d, kept %d", freed, err, has(untagged), has(kept))
	}
	// What was collected can be pushed again.
	s.push(t, "ed", "a/web", "2", strings.Repeat("gone", 1000))
	if has(gone) != 200 {
		t.Error("not there after it was pushed again")
	}
}

func open(t *testing.T) *image.Local {
	t.Helper()
	l, err := image.Open(t.Context(), image.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

// rootfs is an archive of one file.
func rootfs(t *testing.T) io.Reader {
	t.Helper()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: "hello", Mode: 0o644, Size: 5}); err != nil {
		t.Fatal(err)
	}
	w.Write([]byte("world"))
	w.Close()
	return &archive
}

// One store pushes, another pulls, as nodes do.
func TestStores(t *testing.T) {
	s := serve(t, can("ed get a", "ed update a", "no get b"), time.Hour)
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	builtin := image.Builtin{Hosts: []string{s.host}, Roots: roots, Admin: image.Auth{Username: "ed", Password: "ed"}}
	from, to := open(t), open(t)
	from.UseBuiltin(builtin)

	made, err := from.Import(t.Context(), "web:1", rootfs(t), image.Config{Entrypoint: []string{"/hello"}})
	if err != nil {
		t.Fatal(err)
	}
	name, err := from.PushName("web:1", "a")
	if err != nil || name != s.host+"/a/web:1" {
		t.Fatalf("goes to %s: %v", name, err)
	}
	if _, err := from.Push(t.Context(), "web:1", name, nil); err == nil || !strings.Contains(err.Error(), "without a password") {
		t.Errorf("without a password: %v", err)
	}
	if _, err := from.Push(t.Context(), "web:1", name, []image.Auth{{Username: "no", Password: "no"}}); err == nil || !strings.Contains(err.Error(), "no may not") {
		t.Errorf("as somebody else: %v", err)
	}
	for range 2 {
		digest, err := from.Push(t.Context(), "web:1", name, []image.Auth{{Username: "ed", Password: "ed"}})
		if err != nil || digest != made.Digest {
			t.Fatalf("push: %s, want %s: %v", digest, made.Digest, err)
		}
	}

	auth := []image.Auth{{Username: "no", Password: "no"}, {Username: "ed", Password: "ed"}}
	if _, err := to.Pull(t.Context(), name, auth); err == nil {
		t.Error("pulled before the authority was known")
	}
	to.UseBuiltin(builtin)
	if _, err := to.Pull(t.Context(), name, nil); err == nil || !strings.Contains(err.Error(), "refuses access") {
		t.Errorf("pull without a password: %v", err)
	}
	got, err := to.Pull(t.Context(), name, auth)
	if err != nil || got.ID != made.ID || got.Config.Entrypoint[0] != "/hello" {
		t.Fatalf("pull: %+v, want %+v: %v", got, made, err)
	}
	layers, err := to.Hold(t.Context(), got, "test")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := os.ReadFile(filepath.Join(layers[0], "hello")); err != nil || string(text) != "world" {
		t.Errorf("%q, %v", text, err)
	}
}

func TestPushNames(t *testing.T) {
	l := open(t)
	if _, err := l.PushName("web", "a"); err == nil || !strings.Contains(err.Error(), "names no registry") {
		t.Errorf("without a registry of one's own: %v", err)
	}
	l.UseBuiltin(image.Builtin{Hosts: []string{"10.41.0.1:5000", "localhost:5000"}})
	for to, want := range map[string]string{
		"web":                     "10.41.0.1:5000/a/web:latest",
		"web:2":                   "10.41.0.1:5000/a/web:2",
		"shop/web:2":              "10.41.0.1:5000/shop/web:2",
		"shop/front/web":          "10.41.0.1:5000/shop/front/web:latest",
		"localhost:5000/shop/web": "localhost:5000/shop/web:latest",
		"example.com/web:1":       "example.com/web:1",
		"docker.io/me/web":        "docker.io/me/web:latest",
	} {
		if got, err := l.PushName(to, "a"); err != nil || got != want {
			t.Errorf("%s: %s, want %s: %v", to, got, want, err)
		}
	}
	for _, bad := range []string{"Web", "web@sha256:" + strings.Repeat("0", 64)} {
		if got, err := l.PushName(bad, "a"); err == nil {
			t.Errorf("%s: %s", bad, got)
		}
	}
}
