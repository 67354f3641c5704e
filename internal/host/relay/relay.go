// Package relay passes TCP connections on to another address.
package relay

import (
	"context"
	"io"
	"net"
	"sync"
)

// Serve passes every connection that l takes on to target, host:port, until l
// is closed or ctx ends, and returns when all of them have ended. They end
// with ctx. When target refuses, so does Serve.
func Serve(ctx context.Context, l net.Listener, target string) {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	var all sync.WaitGroup
	defer all.Wait()
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		all.Go(func() { pass(ctx, conn.(*net.TCPConn), target) })
	}
}

// pass copies both ways until both sides have ended, or all ends.
func pass(ctx context.Context, client *net.TCPConn, target string) {
	defer client.Close()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", target)
	if err != nil {
		_ = client.SetLinger(0) // refuse, as the target did
		return
	}
	server := conn.(*net.TCPConn)
	defer server.Close()
	defer context.AfterFunc(ctx, func() { client.Close(); server.Close() })()
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{client, server}, {server, client}} {
		both.Go(func() {
			_, _ = io.Copy(way[1], way[0])
			_ = way[1].CloseWrite()
		})
	}
	both.Wait()
}
