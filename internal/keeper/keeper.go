// Package keeper is the client of the keeper, the process that holds this
// machine's workloads (internal/keeper/server). A Client finds the keeper of a
// directory, starts it when there is none and finds it again when it has died.
package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tutti.dev/tutti/internal/keeper/protocol"
)

var (
	// ErrNotFound says that the keeper knows no such workload.
	ErrNotFound = errors.New("workload not found")
	// ErrNotRunning says that the workload has ended.
	ErrNotRunning = errors.New("workload is not running")
	// ErrInvalid says that the workload can never start as specified.
	ErrInvalid = errors.New("invalid specification")
	// ErrNone says that no keeper runs and none may be started.
	ErrNone = errors.New("no keeper runs")
)

// startTimeout is how long a new keeper may take to serve: it has to take
// over the workloads of the last one first.
const startTimeout = 60 * time.Second

// Client calls the keeper of one directory. It is safe for concurrent use and
// reconnects as needed; since every call can be repeated, one that was cut off
// is repeated once.
type Client struct {
	dir, binary string // no binary: never starts a keeper
	place       Place

	mu     sync.Mutex
	conn   *ttrpc.Client
	closed bool

	witness witness
}

// Place puts a keeper's process into its control group. It is called again
// for one that is there already.
type Place func(pid int) error

// Ensure returns a client of the keeper of dir. If none runs it starts binary
// as one, in a session of its own and where place puts it, so that it
// outlives the caller and what holds for the caller's control group does not
// hold for it; if one runs that was started from another binary, it is asked
// to replace its program.
func Ensure(ctx context.Context, dir, binary string, place Place) (*Client, error) {
	c := &Client{dir: dir, binary: binary, place: place}
	if _, err := c.connected(ctx); err != nil {
		return nil, err
	}
	info, err := c.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the keeper who it is: %w", err)
	}
	if info.Binary != binary {
		if err := c.upgrade(ctx); err != nil {
			return nil, fmt.Errorf("upgrade keeper from %s to %s: %w", info.Binary, binary, err)
		}
	}
	if err := place(info.PID); err != nil { // one that was started elsewhere
		return nil, err
	}
	return c, nil
}

// Shutdown kills every workload of the keeper of dir and ends the keeper. No
// keeper is no error.
func Shutdown(ctx context.Context, dir string) error {
	c := &Client{dir: dir}
	defer c.Close()
	err := c.call(ctx, func(k protocol.KeeperClient) error {
		_, err := k.Shutdown(ctx, &protocol.ShutdownRequest{})
		return err
	})
	if errors.Is(err, ErrNone) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("shut down keeper of %s: %w", dir, err)
	}
	// The lock is free once the process has gone.
	return withLock(ctx, filepath.Join(dir, "lock"), func() error { return nil })
}

// Close gives up the connection; the keeper and its workloads go on.
func (c *Client) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
	c.witness.close()
}

// Info says who the keeper is: its process and the path of its program.
type Info struct {
	PID    int
	Binary string
}

// Info asks the keeper who it is.
func (c *Client) Info(ctx context.Context) (info Info, err error) {
	err = c.call(ctx, func(k protocol.KeeperClient) error {
		i, err := k.Info(ctx, &protocol.InfoRequest{})
		info = Info{PID: int(i.GetPid()), Binary: i.GetBinary()}
		return err
	})
	return info, err
}

// Start starts the workload id, or returns it if it exists. spec is an OCI
// runtime specification in JSON.
func (c *Client) Start(ctx context.Context, id string, spec []byte, env *protocol.Envelope) (w *protocol.Workload, err error) {
	err = c.call(ctx, func(k protocol.KeeperClient) (err error) {
		w, err = k.Start(ctx, &protocol.StartRequest{Id: id, Spec: spec, Envelope: env})
		return err
	})
	c.see(w)
	return w, err
}

// Get returns one workload.
func (c *Client) Get(ctx context.Context, id string) (w *protocol.Workload, err error) {
	err = c.call(ctx, func(k protocol.KeeperClient) (err error) {
		w, err = k.Get(ctx, &protocol.WorkloadRequest{Id: id})
		return err
	})
	c.see(w)
	return w, err
}

// List returns every workload, by id.
func (c *Client) List(ctx context.Context) (all []*protocol.Workload, err error) {
	err = c.call(ctx, func(k protocol.KeeperClient) error {
		list, err := k.List(ctx, &protocol.ListRequest{})
		all = list.GetWorkloads()
		return err
	})
	for _, w := range all {
		c.see(w)
	}
	return all, err
}

// Watch delivers each workload that changes after it returned, until ctx ends
// or the keeper is lost; then the channel is closed.
func (c *Client) Watch(ctx context.Context) (<-chan *protocol.Workload, error) {
	if _, err := c.Info(ctx); err != nil { // finds the keeper again, or a new one
		return nil, err
	}
	// It has a connection of its own: closing that is the only way to tell
	// the keeper that nobody listens any more.
	socket, err := dial(c.dir, protocol.Socket, "unix")
	if err != nil {
		return nil, fmt.Errorf("connect to keeper: %w", err)
	}
	conn := ttrpc.NewClient(socket)
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	end := func() { stop(); conn.Close() }
	stream, err := protocol.NewKeeperClient(conn).Watch(ctx, &protocol.WatchRequest{})
	if err == nil {
		_, err = stream.Recv() // it is subscribed
	}
	if err != nil {
		end()
		return nil, convert(err)
	}
	changes := make(chan *protocol.Workload)
	go func() {
		defer close(changes)
		defer end()
		for {
			event, err := stream.Recv()
			if err != nil {
				return
			}
			c.see(event.Workload)
			select {
			case changes <- event.Workload:
			case <-ctx.Done():
				return
			}
		}
	}()
	return changes, nil
}

// Signal sends a signal to a workload's first process, SIGKILL to all of them.
// One that has ended is no error.
func (c *Client) Signal(ctx context.Context, id string, sig syscall.Signal) error {
	return c.call(ctx, func(k protocol.KeeperClient) error {
		_, err := k.Signal(ctx, &protocol.SignalRequest{Id: id, Signal: int32(sig)})
		return err
	})
}

// Update changes the limits of a running workload. resources is LinuxResources
// of an OCI runtime specification in JSON.
func (c *Client) Update(ctx context.Context, id string, resources []byte) error {
	return c.call(ctx, func(k protocol.KeeperClient) error {
		_, err := k.Update(ctx, &protocol.UpdateRequest{Id: id, Resources: resources})
		return err
	})
}

// Remove forgets a workload that has ended, or, with kill, ends it first; an
// unknown one is no error.
func (c *Client) Remove(ctx context.Context, id string, kill bool) error {
	err := c.call(ctx, func(k protocol.KeeperClient) error {
		_, err := k.Remove(ctx, &protocol.RemoveRequest{Id: id, Kill: kill})
		return err
	})
	if err == nil {
		c.witness.forget(id)
	}
	return err
}

// Stats returns what a running workload uses.
func (c *Client) Stats(ctx context.Context, id string) (stats *protocol.StatsResponse, err error) {
	err = c.call(ctx, func(k protocol.KeeperClient) (err error) {
		stats, err = k.Stats(ctx, &protocol.WorkloadRequest{Id: id})
		return err
	})
	return stats, err
}

func (c *Client) upgrade(ctx context.Context) error {
	conn, err := c.connected(ctx)
	if err != nil {
		return err
	}
	_, err = protocol.NewKeeperClient(conn).Upgrade(ctx, &protocol.UpgradeRequest{Binary: c.binary})
	if err != nil && !lost(err) {
		return convert(err)
	}
	c.drop(conn)
	// Answered by the new program: its sockets were never closed.
	info, err := c.Info(ctx)
	if err == nil && info.Binary != c.binary {
		err = fmt.Errorf("it still runs %s", info.Binary)
	}
	return err
}

// call repeats what was cut off by the keeper's death with its successor.
func (c *Client) call(ctx context.Context, do func(protocol.KeeperClient) error) error {
	for tries := 1; ; tries++ {
		conn, err := c.connected(ctx)
		if err != nil {
			return err
		}
		err = do(protocol.NewKeeperClient(conn))
		if !lost(err) || tries == 3 {
			return convert(err)
		}
		c.drop(conn)
	}
}

// lost tells whether a call failed because the connection did.
func lost(err error) bool {
	return errors.Is(err, ttrpc.ErrClosed) || errors.Is(err, net.ErrClosed) || errors.Is(err, io.EOF) ||
		errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}

func convert(err error) error {
	st, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch st.Code() {
	case codes.NotFound:
		return fmt.Errorf("%w: %s", ErrNotFound, st.Message())
	case codes.FailedPrecondition:
		return fmt.Errorf("%w: %s", ErrNotRunning, st.Message())
	case codes.InvalidArgument:
		return fmt.Errorf("%w: %s", ErrInvalid, st.Message())
	default:
		return errors.New(st.Message())
	}
}

func (c *Client) connected(ctx context.Context) (*ttrpc.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil, net.ErrClosed
	}
	if c.conn != nil {
		return c.conn, nil
	}
	conn, err := dial(c.dir, protocol.Socket, "unix")
	if err != nil && c.binary == "" {
		return nil, fmt.Errorf("%w in %s", ErrNone, c.dir)
	}
	if err != nil {
		conn, err = start(ctx, c.dir, c.binary, c.place)
	}
	if err != nil {
		return nil, err
	}
	c.conn = ttrpc.NewClient(conn)
	c.restore()
	return c.conn, nil
}

func (c *Client) drop(conn *ttrpc.Client) {
	conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn == conn {
		c.conn = nil
	}
}

// dial reaches a socket by way of a descriptor of its directory, since a
// socket's path may have 107 bytes at most.
func dial(dir, name, network string) (*net.UnixConn, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return net.DialUnix(network, nil, &net.UnixAddr{
		Name: fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name), Net: network,
	})
}

// start starts a keeper, or finds the one that somebody else started first.
func start(ctx context.Context, dir, binary string, place Place) (conn *net.UnixConn, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	err = withLock(ctx, filepath.Join(dir, "start.lock"), func() error {
		if conn, err = dial(dir, protocol.Socket, "unix"); err == nil {
			return nil
		}
		if err := spawn(ctx, dir, binary, place); err != nil {
			return err
		}
		conn, err = dial(dir, protocol.Socket, "unix")
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start keeper in %s: %w", dir, err)
	}
	return conn, nil
}

// spawn starts the program and waits until it serves.
func spawn(ctx context.Context, dir, binary string, place Place) error {
	log, err := os.OpenFile(filepath.Join(dir, "keeper.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	cmd := exec.Command(binary, "--dir", dir, "--ready-fd", "3")
	cmd.Dir, cmd.Stdout, cmd.Stderr = "/", log, log
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return err
	}
	go func() { _ = cmd.Wait() }() // it may die before this process does
	if err := place(cmd.Process.Pid); err != nil {
		_ = cmd.Process.Kill()
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	said, err := io.ReadAll(ready)
	switch {
	case ctx.Err() != nil:
		_ = cmd.Process.Kill()
		return ctx.Err()
	case err != nil:
		return err
	case string(said) != "ready":
		return fmt.Errorf("keeper: %s (see %s)", strings.TrimSpace(string(said)), log.Name())
	}
	return nil
}

// withLock holds an exclusive lock of a file while it calls do.
func withLock(ctx context.Context, path string, do func() error) error {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	locked := make(chan error, 1)
	go func() {
		locked <- unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}()
	select {
	case err := <-locked:
		defer f.Close()
		if err != nil {
			return fmt.Errorf("lock %s: %w", path, err)
		}
		return do()
	case <-ctx.Done():
		go func() { <-locked; f.Close() }()
		return fmt.Errorf("lock %s: %w", path, ctx.Err())
	}
}
