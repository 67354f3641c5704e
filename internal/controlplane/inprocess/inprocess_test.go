package inprocess

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apiserver/pkg/authentication/user"
)

const patience = 10 * time.Second

func clientOf(h http.HandlerFunc) *http.Client {
	var s Server
	s.Serve(h)
	return &http.Client{Transport: s.Transport(&user.DefaultInfo{Name: "ada", Groups: []string{"g"}}), Timeout: patience}
}

// within fails the test when f does not return in time.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%s: still waiting after %s", what, patience)
	}
}

func TestRequestAndResponse(t *testing.T) {
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Method", r.Method)
		w.Header().Set("X-Uri", r.RequestURI)
		w.Header().Set("X-Proto", r.Proto)
		w.WriteHeader(http.StatusCreated)
		w.WriteHeader(http.StatusTeapot)
		w.Header().Set("X-Late", "no")
		w.Write(append([]byte("got "), b...))
	})
	resp, err := c.Post("https://api.test/a/b?q=1", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || string(b) != "got hello" {
		t.Fatalf("body %q, %v", b, err)
	}
	if resp.StatusCode != http.StatusCreated || resp.ContentLength != int64(len(b)) {
		t.Errorf("status %d, length %d", resp.StatusCode, resp.ContentLength)
	}
	for k, want := range map[string]string{"X-Method": "POST", "X-Uri": "/a/b?q=1", "X-Proto": "HTTP/2.0", "X-Late": ""} {
		if got := resp.Header.Get(k); got != want {
			t.Errorf("%s = %q, want %q", k, got, want)
		}
	}
}

func TestIdentity(t *testing.T) {
	var got user.Info
	var inherited any
	type key struct{}
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		resp, ok, err := Authenticator().AuthenticateRequest(r)
		if ok && err == nil {
			got = resp.User
		}
		inherited = r.Context().Value(key{})
	})
	req, _ := http.NewRequestWithContext(context.WithValue(context.Background(), key{}, "caller's"), "GET", "https://api.test/", nil)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if got == nil || got.GetName() != "ada" {
		t.Errorf("identity %v", got)
	}
	if inherited != nil {
		t.Errorf("the handler sees a value of the caller's context: %v", inherited)
	}
	outside, _ := http.NewRequest("GET", "https://api.test/", nil)
	if _, ok, _ := Authenticator().AuthenticateRequest(outside); ok {
		t.Error("a request from outside was recognized")
	}
}

func TestRequestIsNotModified(t *testing.T) {
	c := clientOf(func(w http.ResponseWriter, r *http.Request) { r.Header.Del("Authorization"); r.URL.Path = "/x" })
	req, _ := http.NewRequest("GET", "https://api.test/p", nil)
	req.Header.Set("Authorization", "Bearer b")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if req.Header.Get("Authorization") == "" || req.URL.Path != "/p" {
		t.Errorf("request changed: %v %s", req.Header, req.URL)
	}
}

func TestBeforeServe(t *testing.T) {
	var s Server
	_, err := (&http.Client{Transport: s.Transport(&user.DefaultInfo{})}).Get("https://api.test/")
	if !errors.Is(err, ErrNotServing) {
		t.Fatalf("got %v", err)
	}
}

func TestStreamAndClose(t *testing.T) {
	next := make(chan string)
	ended := make(chan struct{})
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		defer close(ended)
		if _, ok := w.(http.CloseNotifier); !ok { //nolint:staticcheck // what the API server asks for
			t.Error("no CloseNotifier")
		}
		w.Header().Set("Transfer-Encoding", "chunked")
		w.(http.Flusher).Flush()
		for {
			select {
			case s := <-next:
				io.WriteString(w, s)
				w.(http.Flusher).Flush()
			case <-r.Context().Done():
				return
			}
		}
	})
	resp, err := c.Get("https://api.test/watch")
	if err != nil {
		t.Fatal(err)
	}
	if resp.Header.Get("Transfer-Encoding") != "" {
		t.Error("Transfer-Encoding came through")
	}
	for _, s := range []string{"one", "two", "three"} {
		within(t, "event "+s, func() {
			next <- s
			p := make([]byte, len(s))
			if _, err := io.ReadFull(resp.Body, p); err != nil || string(p) != s {
				t.Errorf("read %q, %v", p, err)
			}
		})
	}
	reading := make(chan error, 1)
	go func() { _, err := resp.Body.Read(make([]byte, 1)); reading <- err }()
	resp.Body.Close()
	within(t, "end of the handler", func() { <-ended })
	within(t, "end of the reader", func() {
		if err := <-reading; err == nil {
			t.Error("read succeeded after close")
		}
	})
}

func TestNothingIsSeenBeforeFlush(t *testing.T) {
	wrote, flush := make(chan struct{}), make(chan struct{})
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "a")
		close(wrote)
		<-flush
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	answered := make(chan *http.Response, 1)
	go func() {
		resp, err := c.Get("https://api.test/")
		if err != nil {
			t.Error(err)
		}
		answered <- resp
	}()
	<-wrote
	select {
	case <-answered:
		t.Fatal("answered before the flush")
	default:
	}
	close(flush)
	within(t, "answer", func() { (<-answered).Body.Close() })
}

func TestCancel(t *testing.T) {
	started, ended := make(chan struct{}), make(chan struct{})
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		close(started)
		<-r.Context().Done()
		if _, err := w.Write([]byte("too late")); err == nil {
			t.Error("a write to a caller who has gone succeeded")
		}
		close(ended)
	})
	// The caller is released at once, the handler a little later.
	ctx, cancel := context.WithCancel(context.Background())
	go func() { <-started; cancel() }()
	req, _ := http.NewRequestWithContext(ctx, "GET", "https://api.test/", nil)
	within(t, "cancelled request", func() {
		if _, err := c.Do(req); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	within(t, "end of the handler", func() { <-ended })
}

func TestCancelWhileReading(t *testing.T) {
	c := clientOf(func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); <-r.Context().Done() })
	ctx, cancel := context.WithCancel(context.Background())
	req, _ := http.NewRequestWithContext(ctx, "GET", "https://api.test/", nil)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cancel()
	within(t, "cancelled read", func() {
		if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestBackPressure(t *testing.T) {
	chunk := bytes.Repeat([]byte("0123456789abcdef"), 64)
	const chunks = 4 * bufferLimit / 1024
	var written atomic.Int64
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		for range chunks {
			n, err := w.Write(chunk)
			if err != nil {
				t.Error(err)
			}
			written.Add(int64(n))
		}
	})
	// Nothing is flushed: the answer comes when the buffer is full, and the writer must not get past that.
	resp, err := c.Get("https://api.test/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if n := written.Load(); n > bufferLimit {
		t.Errorf("%d bytes written while nobody reads, more than %d", n, bufferLimit)
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || !bytes.Equal(got, bytes.Repeat(chunk, chunks)) {
		t.Errorf("read %d bytes, %v; want %d", len(got), err, chunks*len(chunk))
	}
}

func TestBlockedWriterIsReleasedByClose(t *testing.T) {
	released := make(chan error, 1)
	c := clientOf(func(w http.ResponseWriter, r *http.Request) {
		_, err := w.Write(make([]byte, 2*bufferLimit))
		released <- err
	})
	resp, err := c.Get("https://api.test/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	within(t, "blocked writer", func() {
		if err := <-released; err == nil {
			t.Error("write succeeded")
		}
	})
}

func TestPanics(t *testing.T) {
	for name, tt := range map[string]struct {
		handler http.HandlerFunc
		want    error
		text    string
	}{
		"abort before the header": {handler: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, want: io.ErrUnexpectedEOF},
		"abort in the stream": {handler: func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "a")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, want: io.ErrUnexpectedEOF},
		"any other": {handler: func(http.ResponseWriter, *http.Request) { panic("boom") }, text: "boom"},
	} {
		t.Run(name, func(t *testing.T) {
			within(t, name, func() {
				resp, err := clientOf(tt.handler).Get("https://api.test/")
				if err == nil {
					_, err = io.ReadAll(resp.Body)
					resp.Body.Close()
				}
				if err == nil || (tt.want != nil && !errors.Is(err, tt.want)) || !strings.Contains(err.Error(), tt.text) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}

func TestEmptyAnswer(t *testing.T) {
	resp, err := clientOf(func(http.ResponseWriter, *http.Request) {}).Get("https://api.test/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || len(b) != 0 || err != nil {
		t.Errorf("%d %q %v", resp.StatusCode, b, err)
	}
}
