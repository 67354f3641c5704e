//go:build cgo

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper/protocol"
)

// packets are as large as a socket's default send buffer lets them be.
var packets = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// serveIO serves keeper-io.sock: the client's own descriptors become the
// standard streams of what it runs, so that no byte of an exec passes through
// the keeper.
func (s *Server) serveIO(ctx context.Context, l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, net.ErrClosed) {
				s.log.Error("cannot accept on socket", "socket", protocol.IOSocket, "err", err)
				time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
				continue
			}
			return
		}
		go func() {
			defer conn.Close()
			resp, files, err := s.handleIO(conn.(*net.UnixConn))
			if err != nil {
				st := status.Convert(err)
				resp = &protocol.IOResponse{Code: uint32(st.Code()), Error: st.Message()}
			}
			if err := answer(conn.(*net.UnixConn), resp, files); err != nil && !errors.Is(err, unix.EPIPE) {
				s.log.Warn("answer was not sent", "socket", protocol.IOSocket, "err", err)
			}
		}()
	}
}

// client is what one connection of keeper-io.sock brought.
type client struct {
	conn                           *net.UnixConn
	req                            *protocol.IORequest
	stdin, stdout, stderr, console *os.File
}

func (c *client) close() {
	for _, f := range []*os.File{c.stdin, c.stdout, c.stderr, c.console} {
		if f != nil {
			f.Close()
		}
	}
}

func (s *Server) handleIO(conn *net.UnixConn) (*protocol.IOResponse, []*os.File, error) {
	c := &client{conn: conn, req: new(protocol.IORequest)}
	buf, oob := packets.Get().(*[]byte), make([]byte, unix.CmsgSpace(4*4))
	n, oobn, _, _, err := conn.ReadMsgUnix(*buf, oob)
	files, ferr := parseFiles(oob[:oobn])
	if err = errors.Join(err, ferr); err == nil {
		err = proto.Unmarshal((*buf)[:n], c.req)
	}
	packets.Put(buf)
	for _, slot := range []struct {
		wanted bool
		file   **os.File
	}{{c.req.Stdin, &c.stdin}, {c.req.Stdout, &c.stdout}, {c.req.Stderr, &c.stderr}, {c.req.Console || c.req.Restore, &c.console}} {
		if slot.wanted && len(files) > 0 {
			*slot.file, files = files[0], files[1:]
		}
	}
	for _, f := range files {
		f.Close()
	}
	// Those that a workload keeps are taken out of c.
	defer c.close()
	if err != nil {
		return nil, nil, fmt.Errorf("read request: %w", err)
	}
	w, err := s.find(c.req.Id)
	if err != nil {
		return nil, nil, err
	}
	if !w.runs() {
		return nil, nil, notRunning(c.req.Id)
	}
	switch {
	case c.req.Hold:
		w.mu.Lock()
		defer w.mu.Unlock()
		if !w.rec.Envelope.Tty || w.input == nil {
			return &protocol.IOResponse{}, nil, nil
		}
		return &protocol.IOResponse{}, []*os.File{w.input}, nil
	case c.req.Restore:
		return &protocol.IOResponse{}, nil, s.restore(w, c)
	case len(c.req.Exec) > 0:
		code, err := s.exec(w, c)
		return &protocol.IOResponse{ExitCode: code}, nil, err
	default:
		code, err := s.attach(w, c)
		return &protocol.IOResponse{ExitCode: code}, nil, err
	}
}

// restore takes a terminal back that an earlier keeper had.
func (s *Server) restore(w *workload, c *client) error {
	w.mu.Lock()
	has, out := w.input != nil, w.out
	w.mu.Unlock()
	if has || out == nil || !w.rec.Envelope.Tty || c.console == nil {
		return nil
	}
	w.useTerminal(nonblocking(c.console))
	c.console = nil
	return nil
}

// exec runs a program in the workload's namespaces, as its user.
func (s *Server) exec(w *workload, c *client) (int32, error) {
	p, err := w.loadProcess()
	if err != nil {
		return 0, fmt.Errorf("read process of %s: %w", w.rec.ID, err)
	}
	p.Args, p.Terminal, p.ConsoleSize = c.req.Exec, c.req.Console, nil
	if c.req.Width > 0 && c.req.Height > 0 {
		p.ConsoleSize = &specs.Box{Width: uint(c.req.Width), Height: uint(c.req.Height)}
	}
	s.children.begin()
	pid, err := s.engineOf(w.rec.Envelope).exec(w, &proc{Process: p, stdin: c.stdin, stdout: c.stdout, stderr: c.stderr, console: c.console})
	if err != nil {
		pid = 0
	}
	s.children.end(pid)
	c.close() // the program has its own; its end must be the last
	if err != nil {
		if !w.runs() {
			return 0, notRunning(w.rec.ID)
		}
		return 0, startError(err)
	}
	_, pidfd, err := watch(pid)
	if err != nil {
		s.children.abandon(pid)
		return 0, fmt.Errorf("watch process %d: %w", pid, err)
	}
	defer pidfd.Close()
	go func() {
		if c.hangup() {
			_ = process.Signal(pidfd, unix.SIGKILL)
		}
	}()
	if err := process.Wait(pidfd); err != nil {
		return 0, err
	}
	ws, _ := s.children.reap(pid)
	code, _ := exitCode(ws)
	return code, nil
}

// hangup blocks until the client has closed its connection, which is true, or
// the connection was closed here.
func (c *client) hangup() bool {
	for {
		n, err := c.conn.Read(make([]byte, 16))
		if errors.Is(err, net.ErrClosed) {
			return false
		}
		if err != nil || n == 0 {
			return true
		}
	}
}

// attach connects the client with the workload's own streams until either is
// gone.
func (s *Server) attach(w *workload, c *client) (int32, error) {
	sub := &subscriber{stdout: nonblocking(c.stdout), stderr: nonblocking(c.stderr), dropped: make(chan struct{})}
	stdin := nonblocking(c.stdin)
	c.stdin, c.stdout, c.stderr = stdin, sub.stdout, sub.stderr
	w.mu.Lock()
	out, input := w.out, w.input
	w.mu.Unlock()
	if out == nil {
		return 0, notRunning(w.rec.ID)
	}
	out.subscribe(sub)
	defer out.unsubscribe(sub)
	if stdin != nil && input != nil {
		// A descriptor of its own, whose deadline is its own: a program that
		// takes no input must not hold a client that has left.
		if own := duplicate(input); own != nil {
			go func() {
				// Without ReadFrom: splicing would hold on to the other's end.
				_, err := io.Copy(struct{ io.Writer }{own}, struct{ io.Reader }{stdin})
				own.Close()
				env := w.rec.Envelope
				if env.StdinOnce && !env.Tty && !errors.Is(err, os.ErrDeadlineExceeded) {
					w.closeInput()
				}
			}()
			defer func() {
				_ = own.SetWriteDeadline(time.Unix(1, 0))
				_ = stdin.SetReadDeadline(time.Unix(1, 0))
			}()
		}
	}
	left := make(chan struct{})
	go func() {
		defer close(left)
		s.followSize(w, c)
	}()
	select {
	case <-w.ended:
		m := w.message()
		return m.ExitCode, nil
	case <-sub.dropped:
		return 0, status.Error(codes.ResourceExhausted, "the client did not keep up with the output")
	case <-left:
		if w.rec.Envelope.StdinOnce && !w.rec.Envelope.Tty && stdin != nil {
			w.closeInput()
		}
		return 0, nil
	}
}

// closeInput ends the workload's standard input, for good.
func (w *workload) closeInput() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.input != nil {
		w.input.Close()
		w.input = nil
	}
}

// followSize gives the terminal the sizes that the client sends until it
// leaves.
func (s *Server) followSize(w *workload, c *client) {
	buf := make([]byte, 256)
	for {
		n, err := c.conn.Read(buf)
		if err != nil || n == 0 {
			return
		}
		var size protocol.Resize
		if proto.Unmarshal(buf[:n], &size) != nil || !w.rec.Envelope.Tty {
			continue
		}
		w.mu.Lock()
		if w.input != nil {
			if conn, err := w.input.SyscallConn(); err == nil {
				_ = conn.Control(func(fd uintptr) {
					_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: uint16(size.Height), Col: uint16(size.Width)})
				})
			}
		}
		w.mu.Unlock()
	}
}

// nonblocking returns f, which may be nil, such that waiting for it holds no
// thread and can be interrupted.
func nonblocking(f *os.File) *os.File {
	if f == nil {
		return nil
	}
	defer f.Close()
	return duplicate(f)
}

// duplicate returns another descriptor of f that can be waited for and
// interrupted on its own, or nil if there can be none.
func duplicate(f *os.File) *os.File {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil
	}
	fd := -1
	// Not by f.Fd, which would make f itself block.
	if err := conn.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 0) }); err != nil || fd < 0 {
		return nil
	}
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), f.Name())
}

// parseFiles returns the descriptors in a packet's ancillary data.
func parseFiles(oob []byte) (files []*os.File, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, nil
}

func answer(conn *net.UnixConn, resp *protocol.IOResponse, files []*os.File) error {
	resp.Done = true // or the packet could be empty, which looks like the end
	data, err := proto.Marshal(resp)
	if err != nil {
		return err
	}
	var fds []int
	for _, f := range files {
		c, err := f.SyscallConn()
		if err != nil {
			return err
		}
		if err := c.Control(func(fd uintptr) { fds = append(fds, int(fd)) }); err != nil {
			return err
		}
	}
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(data, oob, nil)
	return err
}
