package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
	"time"
)

// connect serves l on a unix socket and returns a client of it.
func connect(t *testing.T, l *Local) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: Handler(l)}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 10*time.Second)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			t.Errorf("requests are still running: %v", err)
		}
		<-served
	})
	return &Client{HTTP: &http.Client{Transport: transport}, Base: "http://tutti"}
}

func TestClient(t *testing.T) {
	l := open(t, t.TempDir())
	c := connect(t, l)
	ctx := t.Context()

	if all, err := c.List(ctx); err != nil || len(all) != 0 {
		t.Errorf("list of nothing: %v, %v", all, err)
	}
	p := threeLayers(t)
	// More than the buffers of a socket hold, so that the answer begins while
	// the archive is still on its way.
	p.add("ballast", bytes.Repeat([]byte("ballast "), 1<<20))
	var last Progress
	loaded, err := c.Load(WithProgress(ctx, func(p Progress) { last = p }),
		bytes.NewReader(ociLayout(t, p, named(p.manifest, "three:1"))))
	if err != nil || len(loaded) != 1 || loaded[0].ID != p.config.Digest.String() {
		t.Fatalf("loaded %+v, %v", loaded, err)
	}
	if last.Bytes == 0 {
		t.Error("no progress was reported")
	}
	cfg := Config{Cmd: []string{"/bin/busybox"}, Labels: map[string]string{"a": "b"}}
	img, err := c.Import(ctx, "busybox", bytes.NewReader(gz(t, busyboxTar(t))), cfg)
	if err != nil || img.Name != "docker.io/library/busybox:latest" || img.Config.Labels["a"] != "b" {
		t.Fatalf("imported %+v, %v", img, err)
	}
	r := newRegistry(t)
	r.push(t, "three", "1", p)
	r.set(basic("ann", "secret"))
	pulled, err := c.Pull(ctx, r.host+"/three:1", []Auth{{Username: "ann", Password: "secret"}})
	if err != nil || pulled.ID != loaded[0].ID {
		t.Fatalf("pulled %+v, %v", pulled, err)
	}
	all, err := c.List(ctx)
	if err != nil || len(all) != 3 {
		t.Errorf("list %+v, %v", all, err)
	}

	var saved bytes.Buffer
	if err := c.Save(ctx, "busybox", &saved); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Hold(ctx, img, "pod"); err != nil {
		t.Fatal(err)
	}
	if err := c.Remove(ctx, "busybox", false); !errors.Is(err, ErrHeld) {
		t.Errorf("removed while held: %v", err)
	}
	if err := c.Remove(ctx, "busybox", true); err != nil {
		t.Error(err)
	}
	if err := c.Remove(ctx, "busybox", false); !errors.Is(err, ErrNotFound) {
		t.Errorf("removed twice: %v", err)
	}
	if err := c.Save(ctx, "busybox", io.Discard); !errors.Is(err, ErrNotFound) {
		t.Errorf("saved what is not there: %v", err)
	}
	if err := c.Collect(ctx); err != nil {
		t.Error(err)
	}
	if again, err := c.Load(ctx, &saved); err != nil || again[0].ID != img.ID {
		t.Errorf("loaded what was saved: %+v, %v", again, err)
	}
}

func TestClientErrors(t *testing.T) {
	l := open(t, t.TempDir())
	c := connect(t, l)
	// The archive is refused at its first bytes; the answer must arrive even
	// though most of it has not been sent yet.
	_, err := c.Load(t.Context(), io.LimitReader(endless{}, 64<<20))
	if want := "load images: the archive is broken, or is no tar archive; make or copy it again"; !errors.Is(err, ErrBroken) || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	if _, err := c.Load(t.Context(), failing{}); !errors.Is(err, errFailing) {
		t.Errorf("error %v, want %v", err, errFailing)
	}
	if _, err := c.Import(t.Context(), "No Name", bytes.NewReader(nil), Config{}); !errors.Is(err, ErrName) {
		t.Errorf("error %v, want ErrName", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(50*time.Millisecond, cancel)
	if _, err := c.Load(ctx, endless{}); !errors.Is(err, context.Canceled) && !errors.Is(err, ErrBroken) {
		t.Errorf("error %v", err)
	}
	waitEmpty(t, l)
}

type endless struct{}

func (endless) Read(b []byte) (int, error) {
	for i := range b {
		b[i] = 'x'
	}
	return len(b), nil
}
