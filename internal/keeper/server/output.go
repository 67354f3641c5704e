//go:build cgo

package server

import (
	"errors"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	chunk = 32 << 10
	// how long an attached client may leave its pipe full before it is
	// dropped: a workload must not stand still for its spectators.
	patience = 10 * time.Second
	// what is read at most after the end of a workload: more than the pipe
	// can hold means that somebody else writes to it.
	lastWords = 4 << 20
)

var chunks = sync.Pool{New: func() any { b := make([]byte, chunk); return &b }}

// output carries what a workload says to its log and to attached clients.
type output struct {
	mu    sync.Mutex
	log   *cri
	subs  map[*subscriber]struct{}
	pumps []*pump
	done  sync.WaitGroup
}

// subscriber is an attached client: the write ends of its pipes, nil when it
// does not want the stream.
type subscriber struct {
	stdout, stderr *os.File
	// dropped is closed when the client did not keep up.
	dropped chan struct{}
}

type pump struct {
	stream  string
	file    *os.File
	partial []byte
}

func newOutput(path string, log *slog.Logger) (*output, error) {
	cri, err := openCRI(path, log)
	if err != nil {
		return nil, err
	}
	return &output{log: cri, subs: map[*subscriber]struct{}{}}, nil
}

// pump reads file, which must not block, until finish is called.
func (o *output) pump(stream string, file *os.File) {
	p := &pump{stream: stream, file: file}
	o.mu.Lock()
	o.pumps = append(o.pumps, p)
	o.mu.Unlock()
	o.done.Go(func() { o.run(p) })
}

func (o *output) run(p *pump) {
	conn, err := p.file.SyscallConn()
	if err != nil {
		return
	}
	for {
		var buf *[]byte
		var n int
		// The buffer is taken only when there is something to read, so that
		// silent workloads hold none. End of file and EIO mean that nobody
		// has the other side open just now.
		if err := conn.Read(func(fd uintptr) bool {
			buf, n = take(int(fd))
			return n > 0
		}); err != nil {
			break
		}
		o.emit(p, (*buf)[:n])
		chunks.Put(buf)
	}
	for total := 0; total < lastWords; {
		var buf *[]byte
		var n int
		if err := conn.Control(func(fd uintptr) { buf, n = take(int(fd)) }); err != nil || n <= 0 {
			break
		}
		o.emit(p, (*buf)[:n])
		chunks.Put(buf)
		total += n
	}
	o.mu.Lock()
	o.log.end(p.stream, p.partial)
	o.mu.Unlock()
}

// take reads what is there; the buffer belongs to the caller when n > 0.
func take(fd int) (*[]byte, int) {
	buf := chunks.Get().(*[]byte)
	for {
		n, err := unix.Read(fd, *buf)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if n <= 0 {
			chunks.Put(buf)
			return nil, 0
		}
		return buf, n
	}
}

func (o *output) emit(p *pump, data []byte) {
	o.mu.Lock()
	defer o.mu.Unlock()
	p.partial = o.log.write(p.stream, p.partial, data)
	if len(p.partial) == 0 && cap(p.partial) > 0 {
		p.partial = nil
	}
	for s := range o.subs {
		to := s.stdout
		if p.stream == "stderr" {
			to = s.stderr
		}
		if to == nil {
			continue
		}
		_ = to.SetWriteDeadline(time.Now().Add(patience))
		if _, err := to.Write(data); err != nil {
			delete(o.subs, s)
			close(s.dropped)
		}
	}
}

func (o *output) subscribe(s *subscriber) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.subs[s] = struct{}{}
}

func (o *output) unsubscribe(s *subscriber) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.subs, s)
}

// pause reads what is there, stops reading and returns the streams.
func (o *output) pause() (files []*os.File) {
	o.mu.Lock()
	pumps := o.pumps
	o.mu.Unlock()
	for _, p := range pumps {
		_ = p.file.SetReadDeadline(time.Unix(1, 0))
		files = append(files, p.file)
	}
	o.done.Wait()
	return files
}

// finish reads what is left, closes the streams and the log.
func (o *output) finish() {
	for _, f := range o.pause() {
		f.Close()
	}
	o.log.close()
}
