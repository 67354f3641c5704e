//go:build cgo

package server

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// Upgrade replaces this program by another in the same process: workloads
// stay its children, the sockets stay open, and what is in the FIFOs waits.
// The caller loses its connection when it has worked.
func (s *Server) Upgrade(ctx context.Context, req *protocol.UpgradeRequest) (*protocol.Empty, error) {
	check, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// A program that cannot even start must not take this one's place. It is
	// a child like any that libcontainer makes.
	s.children.begin()
	out, err := exec.CommandContext(check, req.Binary, "check").CombinedOutput()
	s.children.end(0)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "try %s: %v: %s", req.Binary, err, strings.TrimSpace(string(out)))
	}

	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.starts.Wait()
	// An exit that was taken from the kernel is recorded first; one that
	// comes from now on is the next program's to take.
	s.ending.Lock()
	s.log.Info("replacing this program", "old", s.binary, "new", req.Binary)
	h, err := s.handOver()
	if err == nil {
		var text []byte
		if text, err = json.Marshal(h); err == nil {
			err = unix.Exec(req.Binary, []string{req.Binary, "--dir", s.dir}, append(os.Environ(), handoverEnv+"="+string(text)))
		}
	}
	// Its streams are given up already. Ending is safe, returning is not: the
	// next keeper takes everything over.
	s.log.Error("program was not replaced", "new", req.Binary, "err", err)
	os.Exit(1)
	return nil, nil
}

// handOver stops reading and makes descriptors that survive an exec.
func (s *Server) handOver() (handover, error) {
	h := handover{}
	pass := func(name string, f interface {
		File() (*os.File, error)
	}) error {
		file, err := f.File()
		if err != nil {
			return fmt.Errorf("hand over %s: %w", name, err)
		}
		fd, err := unix.FcntlInt(file.Fd(), unix.F_DUPFD, 3)
		file.Close()
		if err != nil {
			return fmt.Errorf("hand over %s: %w", name, err)
		}
		h[name] = fd
		return nil
	}
	if err := pass(protocol.Socket, s.ttrpc.(*net.UnixListener)); err != nil {
		return nil, err
	}
	if err := pass(protocol.IOSocket, s.io.(*net.UnixListener)); err != nil {
		return nil, err
	}
	if err := pass(lockName, descriptor{s.lock}); err != nil {
		return nil, err
	}
	for _, w := range s.all() {
		<-w.launched
		if w.startErr != nil || !w.runs() {
			continue
		}
		id := w.rec.ID
		w.mu.Lock()
		out, input := w.out, w.input
		w.mu.Unlock()
		if out == nil {
			continue
		}
		for i, p := range out.pause() {
			name := fmt.Sprintf("hold:%s:%d", id, i)
			if w.rec.Envelope.Tty {
				name = terminalName(id)
			}
			if err := pass(name, descriptor{p}); err != nil {
				return nil, err
			}
		}
		if input != nil && !w.rec.Envelope.Tty {
			if err := pass("hold:"+id+":stdin", descriptor{input}); err != nil {
				return nil, err
			}
		}
	}
	return h, nil
}

// descriptor lets a file be handed over like a listener.
type descriptor struct{ file *os.File }

func (d descriptor) File() (*os.File, error) {
	conn, err := d.file.SyscallConn()
	if err != nil {
		return nil, err
	}
	var dup int
	if cerr := conn.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3) }); cerr != nil {
		return nil, cerr
	}
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(dup), d.file.Name()), nil
}
