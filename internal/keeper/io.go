package keeper

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// Streams are what a caller holds of a program's standard streams; nil ones
// are not connected. With TTY all output comes as Stdout.
type Streams struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	TTY            bool
	Resize         <-chan Size
}

// Size of a terminal in characters.
type Size struct{ Width, Height uint16 }

// Exec runs a program inside a running workload, as its user and in its
// directory, and returns its exit code once it has ended and its output is
// written. When ctx ends the program is killed.
func (c *Client) Exec(ctx context.Context, id string, args []string, s Streams) (int, error) {
	if len(args) == 0 {
		return 0, fmt.Errorf("%w: nothing to execute", ErrInvalid)
	}
	x := exchange{req: &protocol.IORequest{Id: id, Exec: args}, streams: s}
	defer x.close()
	var err error
	if s.TTY {
		err = x.openConsole()
	} else {
		err = x.openPipes()
	}
	if err != nil {
		return 0, err
	}
	return x.run(ctx, c)
}

// Attach connects the caller with the streams of the workload's first process
// until that has ended, the keeper is lost, or ctx ends.
func (c *Client) Attach(ctx context.Context, id string, s Streams) error {
	x := exchange{req: &protocol.IORequest{Id: id}, streams: s}
	defer x.close()
	if err := x.openPipes(); err != nil {
		return err
	}
	_, err := x.run(ctx, c)
	return err
}

// exchange is one conversation on the keeper's io socket.
type exchange struct {
	req     *protocol.IORequest
	streams Streams
	theirs  []*os.File // sent, in the order of the protocol
	ours    []*os.File
	stdin   *os.File // we write
	stdout  *os.File // we read
	stderr  *os.File
	console *os.File // the terminal comes from here

	output sync.WaitGroup
}

func (x *exchange) close() {
	for _, f := range append(x.theirs, x.ours...) {
		f.Close()
	}
}

// pipe makes a pipe whose own end does not hold a thread while it waits, and
// whose other end is an ordinary one, for any program.
func (x *exchange) pipe(weRead bool) (*os.File, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, os.NewSyscallError("pipe2", err)
	}
	own, their := fds[0], fds[1]
	if !weRead {
		own, their = their, own
	}
	x.theirs = append(x.theirs, os.NewFile(uintptr(their), "pipe"))
	return x.own(own), nil
}

func (x *exchange) own(fd int) *os.File {
	_ = unix.SetNonblock(fd, true)
	f := os.NewFile(uintptr(fd), "stream")
	x.ours = append(x.ours, f)
	return f
}

func (x *exchange) openPipes() (err error) {
	x.req.Stdin, x.req.Stdout, x.req.Stderr = x.streams.Stdin != nil, x.streams.Stdout != nil, x.streams.Stderr != nil
	if x.req.Stdin {
		if x.stdin, err = x.pipe(false); err != nil {
			return err
		}
	}
	if x.req.Stdout {
		if x.stdout, err = x.pipe(true); err != nil {
			return err
		}
	}
	if x.req.Stderr {
		if x.stderr, err = x.pipe(true); err != nil {
			return err
		}
	}
	return nil
}

func (x *exchange) openConsole() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	x.req.Console = true
	x.theirs = append(x.theirs, os.NewFile(uintptr(fds[1]), "console"))
	x.console = x.own(fds[0])
	if x.streams.Resize != nil {
		// The first size is there before the program starts, as a rule.
		select {
		case size := <-x.streams.Resize:
			x.req.Width, x.req.Height = uint32(size.Width), uint32(size.Height)
		default:
		}
	}
	return nil
}

// run talks to the keeper until the program has ended or the attachment has.
func (x *exchange) run(ctx context.Context, c *Client) (int, error) {
	conn, err := dial(c.dir, protocol.IOSocket, "unixpacket")
	if err != nil {
		// Any call finds the keeper again, or a new one.
		if _, err := c.Info(ctx); err != nil {
			return 0, err
		}
		conn, err = dial(c.dir, protocol.IOSocket, "unixpacket")
	}
	if err != nil {
		return 0, fmt.Errorf("connect to keeper: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := x.send(conn); err != nil {
		return 0, fmt.Errorf("ask keeper: %w", err)
	}
	stop := make(chan struct{})
	defer close(stop)
	if x.console != nil {
		x.output.Go(x.useConsole)
	} else {
		x.carry(stop, conn)
	}

	resp, files, err := receive(conn)
	for _, f := range files {
		f.Close()
	}
	// What was written before the program ended is in the pipes by now; who
	// else may hold them open does not matter.
	for _, f := range []*os.File{x.stdout, x.stderr, x.console} {
		if f != nil {
			_ = f.SetReadDeadline(time.Unix(1, 0))
		}
	}
	x.output.Wait()
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case err != nil:
		return 0, fmt.Errorf("keeper was lost: %w", err)
	case resp.Code != 0:
		return 0, convert(status.Error(codes.Code(resp.Code), resp.Error))
	}
	return int(resp.ExitCode), nil
}

func (x *exchange) send(conn *net.UnixConn) error {
	data, err := proto.Marshal(x.req)
	if err != nil {
		return err
	}
	var oob []byte
	if len(x.theirs) > 0 {
		fds := make([]int, len(x.theirs))
		for i, f := range x.theirs {
			fds[i] = int(f.Fd())
		}
		oob = unix.UnixRights(fds...)
	}
	_, _, err = conn.WriteMsgUnix(data, oob, nil)
	for _, f := range x.theirs {
		f.Close()
	}
	x.theirs = nil
	return err
}

func receive(conn *net.UnixConn) (*protocol.IOResponse, []*os.File, error) {
	buf, oob := make([]byte, 64<<10), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err == nil && n == 0 {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, nil, err
	}
	resp := new(protocol.IOResponse)
	return resp, files(oob[:oobn]), proto.Unmarshal(buf[:n], resp)
}

func files(oob []byte) (files []*os.File) {
	messages, _ := unix.ParseSocketControlMessage(oob)
	for _, m := range messages {
		fds, _ := unix.ParseUnixRights(&m)
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

// carry copies between the caller's streams and the pipes, and sends sizes.
func (x *exchange) carry(stop <-chan struct{}, conn *net.UnixConn) {
	if x.stdin != nil {
		// It ends with the caller's reader, which cannot be interrupted, or
		// when the other side has gone.
		go func() {
			_, _ = io.Copy(x.stdin, x.streams.Stdin)
			x.stdin.Close()
		}()
	}
	if x.stdout != nil {
		x.output.Go(func() { drain(x.streams.Stdout, x.stdout) })
	}
	if x.stderr != nil {
		x.output.Go(func() { drain(x.streams.Stderr, x.stderr) })
	}
	if x.streams.Resize != nil && x.streams.TTY {
		go x.sizes(stop, func(size Size) {
			data, err := proto.Marshal(&protocol.Resize{Width: uint32(size.Width), Height: uint32(size.Height)})
			if err == nil && len(data) > 0 {
				_, _ = conn.Write(data)
			}
		})
	}
}

func (x *exchange) sizes(stop <-chan struct{}, set func(Size)) {
	for {
		select {
		case size, ok := <-x.streams.Resize:
			if !ok {
				return
			}
			set(size)
		case <-stop:
			return
		}
	}
}

// useConsole waits for the terminal, which the program's first step sends, and
// carries its bytes. There is none when the program could not be started.
func (x *exchange) useConsole() {
	conn, err := x.console.SyscallConn()
	if err != nil {
		return
	}
	var got []*os.File
	receive := func(fd uintptr) bool {
		oob := make([]byte, unix.CmsgSpace(4))
		_, n, _, _, err := unix.Recvmsg(int(fd), make([]byte, 4096), oob, unix.MSG_CMSG_CLOEXEC)
		if err == nil {
			got = files(oob[:n])
		}
		return err != unix.EAGAIN && err != unix.EINTR
	}
	if err := conn.Read(receive); err != nil {
		_ = conn.Control(func(fd uintptr) { receive(fd) })
	}
	if len(got) == 0 {
		return
	}
	fd, err := unix.FcntlInt(got[0].Fd(), unix.F_DUPFD_CLOEXEC, 0)
	got[0].Close()
	if err != nil {
		return
	}
	_ = unix.SetNonblock(fd, true)
	master := os.NewFile(uintptr(fd), "terminal")
	defer master.Close()
	stop := make(chan struct{})
	defer close(stop)
	if x.streams.Resize != nil {
		go x.sizes(stop, func(size Size) {
			if conn, err := master.SyscallConn(); err == nil {
				_ = conn.Control(func(fd uintptr) {
					_ = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size.Height, Col: size.Width})
				})
			}
		})
	}
	if x.streams.Stdin != nil {
		go func() { _, _ = io.Copy(master, x.streams.Stdin) }()
	}
	out := x.streams.Stdout
	if out == nil {
		out = io.Discard
	}
	// The end of the program hangs the terminal up, which ends this.
	drain(out, master)
}

// drain copies until the end of src or, once its read deadline has passed,
// until there is nothing more to read at once.
func drain(dst io.Writer, src *os.File) {
	// Its writers learn that nobody reads any more.
	defer src.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return
			}
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return
		}
	}
	conn, err := src.SyscallConn()
	if err != nil {
		return
	}
	for {
		n := 0
		if conn.Control(func(fd uintptr) { n, _ = unix.Read(int(fd), buf) }) != nil || n <= 0 {
			return
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}
