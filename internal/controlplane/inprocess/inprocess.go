// Package inprocess carries HTTP requests to a handler of the same process, without a network, TLS or tokens.
//
// The caller's identity travels in the context of the request that the handler sees. That context is made here and
// can be reached from nowhere else, so the identity cannot be forged by anyone who comes in over the network; the
// handler reads it back with [Authenticator] and authorizes it like any other.
package inprocess

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/user"
)

// bufferLimit is how many bytes of a response wait for a slow reader before the handler's Write blocks. It is bounded
// because a watch cache decides by blocked writes which watchers are too slow to keep.
const bufferLimit = 64 << 10

// grace is how long a handler that has not answered yet may go on after its caller has gone. Most are done by then;
// cutting them off halfway, in the store, would save nothing and fill logs.
const grace = 200 * time.Millisecond

// remoteAddr is what the handler sees as the client's address; it appears in audit records.
const remoteAddr = "127.0.0.1:0"

// ErrNotServing is returned for a request that comes before [Server.Serve].
var ErrNotServing = errors.New("the in-process API server is not serving yet")

type userKey struct{}

// Server hands out transports to one handler. The zero value is ready: clients may be made before the handler exists.
type Server struct {
	handler atomic.Pointer[http.Handler]
}

// Serve sets the handler; from now on requests reach it.
func (s *Server) Serve(h http.Handler) { s.handler.Store(&h) }

// Transport returns a round tripper whose requests carry the identity u.
func (s *Server) Transport(u user.Info) http.RoundTripper { return &transport{server: s, user: u} }

// Authenticator recognizes requests that came through a [Server], and no others.
func Authenticator() authenticator.Request {
	return authenticator.RequestFunc(func(req *http.Request) (*authenticator.Response, bool, error) {
		u, ok := req.Context().Value(userKey{}).(user.Info)
		if !ok {
			return nil, false, nil
		}
		return &authenticator.Response{User: u}, true, nil
	})
}

type transport struct {
	server *Server
	user   user.Info
}

// RoundTrip implements [http.RoundTripper]. It returns at the handler's first Flush, when the buffer is full, or at the
// end of the handler, whichever comes first.
func (t *transport) RoundTrip(req *http.Request) (*http.Response, error) {
	h := t.server.handler.Load()
	if h == nil {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, ErrNotServing
	}

	// The handler's context inherits the end of the caller's, but none of its values: when the caller is itself inside
	// a handler (an admission plugin), they hold that request's user, audit record and deadline.
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), userKey{}, t.user))
	w := newResponse(cancel)
	w.stopForwarding = context.AfterFunc(req.Context(), func() { w.abort(context.Cause(req.Context())) })

	go func() {
		defer cancel()
		in := incoming(ctx, req)
		defer in.Body.Close()
		defer func() {
			if p := recover(); p != nil {
				w.finish(panicError(p))
				return
			}
			w.finish(nil)
		}()
		(*h).ServeHTTP(w, in)
	}()

	<-w.published
	return w.result(req)
}

// incoming is req as a server sees it.
func incoming(ctx context.Context, req *http.Request) *http.Request {
	in := req.Clone(ctx)
	in.RequestURI = req.URL.RequestURI()
	in.RemoteAddr = remoteAddr
	in.Proto, in.ProtoMajor, in.ProtoMinor = "HTTP/2.0", 2, 0
	if in.Host == "" {
		in.Host = req.URL.Host
	}
	if in.Header == nil {
		in.Header = http.Header{}
	}
	if in.Body == nil {
		in.Body = http.NoBody
	}
	return in
}

func panicError(p any) error {
	if p == http.ErrAbortHandler { //nolint:errorlint // net/http compares it the same way
		return io.ErrUnexpectedEOF
	}
	return fmt.Errorf("panic while serving an in-process request: %v", p)
}

// response is the handler's writer and the caller's body.
type response struct {
	cancel         context.CancelFunc
	stopForwarding func() bool
	gone           chan bool // for CloseNotify

	published chan struct{} // closed when the header and the first bytes may be seen

	mu       sync.Mutex
	change   sync.Cond // something below changed
	header   http.Header
	snapshot http.Header // header at the first WriteHeader; nil before
	status   int
	visible  bool
	buf      []byte // written, not yet read
	flushed  int    // bytes of buf that the reader may have
	done     bool   // the handler has returned, or the caller has gone
	err      error  // what a reader gets instead of io.EOF
	closed   bool   // the caller has closed the body
}

func newResponse(cancel context.CancelFunc) *response {
	w := &response{cancel: cancel, published: make(chan struct{}), header: http.Header{}, gone: make(chan bool, 1)}
	w.change.L = &w.mu
	return w
}

// Header implements [http.ResponseWriter].
func (w *response) Header() http.Header { return w.header }

// WriteHeader implements [http.ResponseWriter]; all calls but the first are ignored.
func (w *response) WriteHeader(status int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(status)
}

func (w *response) writeHeader(status int) {
	if w.snapshot != nil || (status >= 100 && status < 200) {
		return
	}
	w.status = status
	w.snapshot = w.header.Clone()
	// A framing that the wire would have undone.
	w.snapshot.Del("Transfer-Encoding")
}

// Write implements [http.ResponseWriter]. It blocks while the buffer is full.
func (w *response) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	n := 0
	for len(p) > 0 {
		for len(w.buf) >= bufferLimit && !w.done {
			w.publish()
			w.change.Wait()
		}
		if w.done {
			return n, io.ErrClosedPipe
		}
		part := p[:min(len(p), bufferLimit-len(w.buf))]
		w.buf = append(w.buf, part...)
		p = p[len(part):]
		n += len(part)
	}
	return n, nil
}

// Flush implements [http.Flusher].
func (w *response) Flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.writeHeader(http.StatusOK)
	w.publish()
}

// CloseNotify implements [http.CloseNotifier], which the API server's response wrappers demand next to Flusher.
func (w *response) CloseNotify() <-chan bool { return w.gone }

// publish lets the reader have everything written so far. The caller holds mu.
func (w *response) publish() {
	w.flushed = len(w.buf)
	if !w.visible {
		w.visible = true
		close(w.published)
	}
	w.change.Broadcast()
}

// finish marks the end of the handler.
func (w *response) finish(err error) {
	w.stopForwarding()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		return
	}
	if err == nil {
		w.writeHeader(http.StatusOK)
		if !w.visible && w.snapshot.Get("Content-Length") == "" {
			w.snapshot.Set("Content-Length", fmt.Sprint(len(w.buf)))
		}
	}
	w.done, w.err = true, err
	w.publish()
}

// abort ends the exchange for both sides because the caller has gone.
func (w *response) abort(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.done {
		w.cancel()
		return
	}
	if w.visible {
		w.cancel()
	} else {
		time.AfterFunc(grace, w.cancel)
	}
	w.done, w.err, w.buf = true, err, nil
	w.gone <- true
	w.publish()
}

func (w *response) result(req *http.Request) (*http.Response, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err != nil {
		return nil, w.err
	}
	resp := &http.Response{
		Status:        fmt.Sprintf("%d %s", w.status, http.StatusText(w.status)),
		StatusCode:    w.status,
		Proto:         "HTTP/2.0",
		ProtoMajor:    2,
		Header:        w.snapshot,
		Body:          body{w},
		ContentLength: -1,
		Request:       req,
	}
	if w.done && w.err == nil {
		resp.ContentLength = int64(len(w.buf))
	}
	return resp, nil
}

// body is the reading side of a response.
type body struct{ w *response }

// Read implements [io.Reader]. It returns what was flushed, and waits when there is nothing.
func (b body) Read(p []byte) (int, error) {
	w := b.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.closed:
			return 0, http.ErrBodyReadAfterClose
		case len(p) == 0:
			return 0, nil
		case w.flushed > 0:
			n := copy(p, w.buf[:w.flushed])
			w.buf = w.buf[n:]
			w.flushed -= n
			if len(w.buf) == 0 {
				w.buf = nil // a quiet watch holds no memory
			}
			w.change.Broadcast()
			return n, nil
		case w.done && w.err != nil:
			return 0, w.err
		case w.done:
			return 0, io.EOF
		}
		w.change.Wait()
	}
}

// Close implements [io.Closer]. It ends the handler's context.
func (b body) Close() error {
	b.w.abort(io.ErrClosedPipe)
	b.w.stopForwarding()
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	b.w.closed = true
	b.w.change.Broadcast()
	return nil
}
