// Package hangup tells handlers whose client has gone: those that have taken
// the connection over, for which net/http does not see to it.
package hangup

import (
	"bufio"
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// period is how often the kernel is asked. Who reads a connection hears of its
// end at once, but one over which more came than a program takes is not read.
const period = time.Second

// tcpEstablished is the state of a connection that neither side has closed,
// from the kernel's net/tcp_states.h.
const tcpEstablished = 1

// Handler is next, but the context of a request whose TCP connection next
// takes over ([http.Hijacker]) ends when the client has closed or lost it, a
// second later at most. Other requests are left to net/http.
func Handler(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		original, ok := w.(response)
		if !ok || r.Header.Get("Upgrade") == "" {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		next.ServeHTTP(watched{original, ctx, cancel}, r.WithContext(ctx))
	})
}

// response is all that net/http's can do and that handlers look for.
type response interface {
	http.ResponseWriter
	http.Flusher
	http.Hijacker
	http.CloseNotifier //nolint:staticcheck // the API server asks for it
}

type watched struct {
	response
	ctx    context.Context // the request's
	cancel context.CancelFunc
}

// Hijack implements [http.Hijacker].
func (w watched) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	conn, buffered, err := w.response.Hijack()
	if err == nil {
		go w.watch(conn)
	}
	return conn, buffered, err
}

func (w watched) watch(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	socket, ok := conn.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	for {
		select {
		case <-w.ctx.Done():
			return
		case <-tick.C:
		}
		var info *unix.TCPInfo
		var asked error
		closed := raw.Control(func(fd uintptr) {
			info, asked = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		})
		// What reads the connection may have closed this side too by now.
		if closed != nil || asked == nil && info.State != tcpEstablished {
			w.cancel()
			return
		}
	}
}
