package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/platforms"
	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/inmemory"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/sirupsen/logrus"

	"tutti.dev/tutti/test/golden"
)

func init() { logrus.SetOutput(io.Discard) } // the registry's log

// registry is a real registry on the loopback, with a door before it.
type registry struct {
	*httptest.Server
	host string

	mu    sync.Mutex
	calls map[string]int // "GET blob" → how many were answered
	// door, when set, answers a request itself and returns true.
	door func(http.ResponseWriter, *http.Request) bool
}

func newRegistry(t testing.TB) *registry {
	t.Helper()
	config := &configuration.Configuration{Storage: configuration.Storage{"inmemory": nil}}
	app := handlers.NewApp(context.WithoutCancel(t.Context()), config)
	r := &registry{calls: map[string]int{}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		kind := "other"
		for _, k := range []string{"blob", "manifest"} {
			if strings.Contains(req.URL.Path, "/"+k+"s/") {
				kind = k
			}
		}
		r.mu.Lock()
		r.calls[req.Method+" "+kind]++
		door := r.door
		r.mu.Unlock()
		if door == nil || !door(w, req) {
			app.ServeHTTP(w, req)
		}
	}))
	t.Cleanup(r.Close)
	r.host = r.Listener.Addr().String()
	return r
}

func (r *registry) set(door func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.door = door
	clear(r.calls)
}

func (r *registry) count(call string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.calls[call]
}

// push uploads p and tags its manifest.
func (r *registry) push(t testing.TB, repository, tag string, p *parts) {
	t.Helper()
	for d, data := range p.blobs {
		resp := r.call(t, http.MethodPost, r.URL+"/v2/"+repository+"/blobs/uploads/", "", nil, http.StatusAccepted)
		r.call(t, http.MethodPut, resp.Header.Get("Location")+"&digest="+d.String(), "application/octet-stream", data, http.StatusCreated)
	}
	r.call(t, http.MethodPut, r.URL+"/v2/"+repository+"/manifests/"+tag, p.manifest.MediaType, p.blobs[p.manifest.Digest], http.StatusCreated)
}

func (r *registry) call(t testing.TB, method, url, mediaType string, body []byte, want int) *http.Response {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := r.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != want {
		text, _ := io.ReadAll(resp.Body)
		t.Fatalf("%s %s: %s %s", method, url, resp.Status, text)
	}
	return resp
}

// basic lets in one user with HTTP basic authentication.
func basic(user, password string) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if u, p, ok := r.BasicAuth(); ok && u == user && p == password {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
}

func TestPull(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	p := threeLayers(t)
	r.push(t, "team/three", "1", p)
	var last Progress
	img, err := l.Pull(WithProgress(t.Context(), func(p Progress) { last = p }), r.host+"/team/three:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	if img.ID != p.config.Digest.String() || img.Digest != p.manifest.Digest.String() {
		t.Errorf("got %+v", img)
	}
	if last.Layers != 3 || last.TotalLayers != 3 || last.Bytes != last.TotalBytes || last.Bytes != p.size() {
		t.Errorf("last progress %+v", last)
	}
	checkThreeLayers(t, l, img)

	r.set(nil)
	for _, name := range []string{"/team/three:1", "/team/three@" + img.Digest, "/team/three:9@" + img.Digest} {
		if again, err := l.Pull(t.Context(), r.host+name, nil); err != nil || again.ID != img.ID {
			t.Errorf("%s: %+v, %v", name, again, err)
		}
	}
	if n := r.count("GET blob"); n != 0 {
		t.Errorf("what was here was fetched again, %d times", n)
	}

	moved := imageOf(t, here(), ocispec.ImageConfig{User: "8"}, tarOf(t, text("new", "1")))
	r.push(t, "team/three", "1", moved)
	if img, err = l.Pull(t.Context(), r.host+"/team/three:1", nil); err != nil || img.Config.User != "8" {
		t.Errorf("after the tag moved: %+v, %v", img, err)
	}
}

func TestPullsShareOneDownload(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	p := threeLayers(t)
	r.push(t, "three", "1", p)
	all := make(chan struct{})
	r.set(func(http.ResponseWriter, *http.Request) bool { <-all; return false })
	name := r.host + "/three:1"
	var work sync.WaitGroup
	for range 10 {
		work.Go(func() {
			if img, err := l.Pull(t.Context(), name, nil); err != nil || img.ID != p.config.Digest.String() {
				t.Errorf("%+v, %v", img, err)
			}
		})
	}
	// One gives up; the others do not notice.
	ctx, cancel := context.WithCancel(t.Context())
	work.Go(func() {
		if _, err := l.Pull(ctx, name, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("given up: %v", err)
		}
	})
	wait(t, "all wait for one download", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		for _, p := range l.pulls {
			return p.waiting == 11
		}
		return false
	})
	cancel()
	close(all)
	work.Wait()
	if n := r.count("GET blob"); n != 4 { // a configuration and three layers
		t.Errorf("%d blobs were fetched, want 4", n)
	}
}

func TestPullEndsWhenNobodyWaits(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	r.push(t, "three", "1", threeLayers(t))
	ended := make(chan struct{})
	r.set(func(_ http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/blobs/") {
			<-req.Context().Done()
			ended <- struct{}{}
			return true
		}
		return false
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for r.count("GET blob") == 0 && t.Context().Err() == nil {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := l.Pull(ctx, r.host+"/three:1", nil); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Fatal("the download goes on")
	}
	wait(t, "job ended", func() bool { l.mu.Lock(); defer l.mu.Unlock(); return len(l.working) == 0 })
	if err := l.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitEmpty(t, l)
}

func TestPullGoesOnWhereItEnded(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	p := threeLayers(t)
	r.push(t, "three", "1", p)
	last := p.layers[2].Digest.String()
	r.set(func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, last) {
			return false
		}
		panic(http.ErrAbortHandler) // the connection breaks
	})
	if _, err := l.Pull(t.Context(), r.host+"/three:1", nil); err == nil {
		t.Fatal("pulled over a broken connection")
	}
	r.set(nil)
	img, err := l.Pull(t.Context(), r.host+"/three:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	checkThreeLayers(t, l, img)
	if n := r.count("GET blob"); n > 3 {
		t.Errorf("%d blobs were fetched again", n)
	}
}

func TestPullAuthentication(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	p := threeLayers(t)
	r.push(t, "three", "1", p)
	good := Auth{Username: "ann", Password: "secret"}
	check := func(t *testing.T, auths ...Auth) {
		t.Helper()
		if err := l.Remove(t.Context(), r.host+"/three:1", true); err != nil && !errors.Is(err, ErrNotFound) {
			t.Fatal(err)
		}
		img, err := l.Pull(t.Context(), r.host+"/three:1", auths)
		if err != nil || img.ID != p.config.Digest.String() {
			t.Errorf("%+v, %v", img, err)
		}
	}
	t.Run("basic", func(t *testing.T) {
		r.set(basic("ann", "secret"))
		check(t, good)
		check(t, Auth{Username: "bob", Password: "x"}, good) // in order, until one works
	})
	bearer := func(grant func(*http.Request) bool) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, req *http.Request) bool {
			switch {
			case req.URL.Path == "/token" && grant(req):
				json.NewEncoder(w).Encode(map[string]string{"token": "ticket", "access_token": "ticket"})
			case req.URL.Path == "/token":
				w.WriteHeader(http.StatusUnauthorized)
			case req.Header.Get("Authorization") == "Bearer ticket":
				return false
			default:
				w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test",scope="repository:three:pull"`, r.URL))
				w.WriteHeader(http.StatusUnauthorized)
			}
			return true
		}
	}
	t.Run("token for a password", func(t *testing.T) {
		r.set(bearer(func(req *http.Request) bool {
			u, p, ok := req.BasicAuth()
			return ok && u == "ann" && p == "secret" || req.FormValue("username") == "ann" && req.FormValue("password") == "secret"
		}))
		check(t, good)
	})
	t.Run("token for anyone", func(t *testing.T) {
		r.set(bearer(func(*http.Request) bool { return true }))
		check(t)
	})
	t.Run("identity token", func(t *testing.T) {
		r.set(bearer(func(req *http.Request) bool { return req.FormValue("refresh_token") == "id" }))
		check(t, Auth{IdentityToken: "id"})
	})
	t.Run("registry token", func(t *testing.T) {
		r.set(bearer(func(*http.Request) bool { return false }))
		check(t, Auth{RegistryToken: "ticket"})
	})
}

// TestPullErrors holds the texts that the owner of a pod reads.
func TestPullErrors(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	r.push(t, "three", "1", threeLayers(t))
	other := ocispec.Platform{OS: "linux", Architecture: "s390x"}
	r.push(t, "foreign", "1", imageOf(t, other, ocispec.ImageConfig{}, tarOf(t, text("x", "x"))))
	chart := &parts{blobs: map[digest.Digest][]byte{}}
	chart.manifest = chart.addJSON(t, ocispec.MediaTypeImageManifest, map[string]any{"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest,
		"config": chart.add("application/vnd.cncf.helm.config.v1+json", []byte("{}")), "layers": []any{}})
	r.push(t, "chart", "1", chart)
	tls := httptest.NewTLSServer(http.NotFoundHandler())
	tls.Config.ErrorLog = log.New(io.Discard, "", 0)
	t.Cleanup(tls.Close)
	tlsHost := tls.Listener.Addr().String()
	gone, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone.Close()

	status := func(code int) func(http.ResponseWriter, *http.Request) bool {
		return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
	}
	var got strings.Builder
	for _, c := range []struct {
		what, name string
		auths      []Auth
		door       func(http.ResponseWriter, *http.Request) bool
		kind       error
	}{
		{"no such tag", "REGISTRY/three:2", nil, nil, ErrNotFound},
		{"no such repository", "REGISTRY/four", nil, nil, ErrNotFound},
		{"no such digest", "REGISTRY/three@" + digest.FromString("x").String(), nil, nil, ErrNotFound},
		{"not a name", "REGISTRY/Three:1", nil, nil, ErrName},
		{"no password given", "REGISTRY/three:1", nil, basic("ann", "secret"), nil},
		{"wrong password", "REGISTRY/three:1", []Auth{{Username: "ann", Password: "guess"}}, basic("ann", "secret"), nil},
		{"forbidden", "REGISTRY/three:1", []Auth{{Username: "ann", Password: "guess"}}, status(http.StatusForbidden), nil},
		{"too many requests", "REGISTRY/three:1", nil, status(http.StatusTooManyRequests), nil},
		{"registry fails", "REGISTRY/three:1", nil, status(http.StatusBadGateway), nil},
		{"other platform", "REGISTRY/foreign:1", nil, nil, ErrBroken},
		{"not an image", "REGISTRY/chart:1", nil, nil, ErrBroken},
		{"damaged blobs", "REGISTRY/three:1", nil, func(w http.ResponseWriter, r *http.Request) bool {
			if !strings.Contains(r.URL.Path, "/blobs/") {
				return false
			}
			io.WriteString(w, strings.Repeat("x", 10_000))
			return true
		}, ErrBroken},
		{"nobody there", "NOBODY/three:1", nil, nil, nil},
		{"no such host", "registry.invalid/three:1", nil, nil, nil},
		{"TLS expected, plain found", "PLAIN/three:1", nil, nil, nil},
		{"certificate not trusted", "TLS/three:1", nil, nil, nil},
	} {
		r.set(c.door)
		hosts := strings.NewReplacer("REGISTRY", r.host, "NOBODY", gone.Addr().String(), "PLAIN", "plain.test", "TLS", "tls.test")
		back := strings.NewReplacer(r.host, "REGISTRY", gone.Addr().String(), "NOBODY", tlsHost, "TLS", platforms.Format(here()), "PLATFORM")
		transport := http.DefaultTransport.(*http.Transport).Clone()
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			switch addr {
			case "plain.test:443":
				addr = r.host
			case "tls.test:443":
				addr = tlsHost
			}
			return new(net.Dialer).DialContext(ctx, network, addr)
		}
		l.client = &http.Client{Transport: transport}
		_, err := l.Pull(t.Context(), hosts.Replace(c.name), c.auths)
		if err == nil {
			t.Errorf("%s: no error", c.what)
			continue
		}
		for _, kind := range []error{ErrNotFound, ErrBroken, ErrName} {
			if errors.Is(err, kind) != (kind == c.kind) {
				t.Errorf("%s: is %q: %v", c.what, kind, errors.Is(err, kind))
			}
		}
		fmt.Fprintf(&got, "%s\n\t%s\n", c.what, back.Replace(err.Error()))
		transport.CloseIdleConnections()
	}
	golden.Check(t, "testdata/pull-errors.txt", got.String())
	r.set(nil)
	if err := l.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitEmpty(t, l)
}
