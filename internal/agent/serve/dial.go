package serve

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	goruntime "runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// dialIn connects to a port of the loopback address in a network namespace,
// "" being the machine's. A socket stays in the namespace it was made in.
func dialIn(ctx context.Context, netns string, port int32) (*net.TCPConn, error) {
	if netns == "" {
		return dialLoopback(ctx, port)
	}
	type result struct {
		conn *net.TCPConn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// Only a thread that is back in its namespace is given back; any
		// other ends with this goroutine.
		goruntime.LockOSThread()
		conn, back, err := dialOnThread(ctx, netns, port)
		if back {
			goruntime.UnlockOSThread()
		}
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func dialOnThread(ctx context.Context, netns string, port int32) (conn *net.TCPConn, back bool, err error) {
	home, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, true, fmt.Errorf("open the machine's network namespace: %w", err)
	}
	defer home.Close()
	pod, err := os.Open(netns)
	if err != nil {
		return nil, true, fmt.Errorf("open the pod's network namespace: %w", err)
	}
	defer pod.Close()
	if err := unix.Setns(int(pod.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, true, fmt.Errorf("enter the pod's network namespace: %w", err)
	}
	conn, err = dialLoopback(ctx, port)
	return conn, unix.Setns(int(home.Fd()), unix.CLONE_NEWNET) == nil, err
}

func dialLoopback(ctx context.Context, port int32) (*net.TCPConn, error) {
	var errs []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		// A literal address is dialled on the calling goroutine.
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		errs = append(errs, err)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			break
		}
	}
	return nil, fmt.Errorf("connect to port %d inside the pod: %w", port, errs[0])
}

// ignoreClosed drops the errors of a connection that one of its ends closed.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}
