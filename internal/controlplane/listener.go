package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
)

// listenAll opens one TCP listener for each address and merges them into one.
func listenAll(ctx context.Context, addrs []netip.AddrPort) (net.Listener, error) {
	m := &mergedListener{accepted: make(chan accepted), closed: make(chan struct{})}
	for _, a := range addrs {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a.String())
		if err != nil {
			m.Close()
			return nil, listenError(a, err)
		}
		m.listeners = append(m.listeners, l)
	}
	for _, l := range m.listeners {
		go m.accept(l)
	}
	return m, nil
}

// listenError says in one line which address cannot be used, and what to do.
func listenError(a netip.AddrPort, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("listen on %s: %w; stop the program that uses it (ss -ltnp 'sport = :%d' names it) or choose another port",
			a, syscall.EADDRINUSE, a.Port())
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("listen on %s: %w: no interface of this machine has the address %s; choose another with --address", a, syscall.EADDRNOTAVAIL, a.Addr())
	default:
		return fmt.Errorf("listen on %s: %w", a, err)
	}
}

// mergedListener accepts what any of several listeners accepts.
type mergedListener struct {
	listeners []net.Listener
	accepted  chan accepted
	once      sync.Once
	closed    chan struct{}
}

type accepted struct {
	conn net.Conn
	err  error
}

func (m *mergedListener) accept(l net.Listener) {
	for {
		// Errors go to the server, which knows how long to wait after which.
		c, err := l.Accept()
		select {
		case m.accepted <- accepted{c, err}:
		case <-m.closed:
			if c != nil {
				c.Close()
			}
			return
		}
	}
}

// Accept implements [net.Listener].
func (m *mergedListener) Accept() (net.Conn, error) {
	select {
	case a := <-m.accepted:
		return a.conn, a.err
	case <-m.closed:
		return nil, net.ErrClosed
	}
}

// Close implements [net.Listener].
func (m *mergedListener) Close() error {
	var errs []error
	m.once.Do(func() {
		close(m.closed)
		for _, l := range m.listeners {
			errs = append(errs, l.Close())
		}
	})
	return errors.Join(errs...)
}

// Addr implements [net.Listener]; it is the address of the first listener.
func (m *mergedListener) Addr() net.Addr { return m.listeners[0].Addr() }
