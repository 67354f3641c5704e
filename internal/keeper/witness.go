package keeper

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"tutti.dev/tutti/internal/host/process"
	"tutti.dev/tutti/internal/keeper/protocol"
)

// witness holds what would be lost with the keeper: a pidfd of each running
// workload, from which the kernel (6.15 and later) tells its exit, the read
// ends of its FIFOs with what they contain, and its terminal. Either of the
// two processes may die, and the other knows.
type witness struct {
	mu     sync.Mutex
	closed bool
	held   map[string]*holding
}

type holding struct {
	pid   int32
	tty   bool
	files []*os.File // read ends of FIFOs, or the terminal
	pidfd *os.File
}

func (h *holding) close() {
	h.pidfd.Close()
	for _, f := range h.files {
		f.Close()
	}
}

// see is told of every status that passes by.
func (c *Client) see(w *protocol.Workload) {
	if w == nil {
		return
	}
	if !w.Running {
		if w.Unknown {
			c.settle(w)
		}
		c.witness.forget(w.Id)
		return
	}
	c.witness.mu.Lock()
	defer c.witness.mu.Unlock()
	if _, ok := c.witness.held[w.Id]; ok || c.witness.closed {
		return
	}
	pidfd, err := process.Open(int(w.Pid), w.StartTicks)
	if err != nil {
		return // it has ended meanwhile
	}
	h := &holding{pid: w.Pid, pidfd: pidfd, tty: w.GetEnvelope().GetTty()}
	if c.witness.held == nil {
		c.witness.held = map[string]*holding{}
	}
	c.witness.held[w.Id] = h
	if h.tty {
		h.files = c.exchangeTerminal(w.Id, nil)
		return
	}
	dir := filepath.Join(c.dir, "workloads", w.Id)
	for _, name := range []string{"stdout", "stderr"} {
		if fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			h.files = append(h.files, os.NewFile(uintptr(fd), name))
		}
	}
}

// restore gives a new keeper the terminals that the last one had. It is called
// with the first connection to it.
func (c *Client) restore() {
	c.witness.mu.Lock()
	defer c.witness.mu.Unlock()
	for id, h := range c.witness.held {
		if h.tty && len(h.files) == 1 {
			c.exchangeTerminal(id, h.files[0])
		}
	}
}

// exchangeTerminal gets a workload's terminal from the keeper, or gives it
// back. A keeper that has one keeps its own.
func (c *Client) exchangeTerminal(id string, give *os.File) []*os.File {
	conn, err := dial(c.dir, protocol.IOSocket, "unixpacket")
	if err != nil {
		return nil
	}
	defer conn.Close()
	if conn.SetDeadline(time.Now().Add(10*time.Second)) != nil {
		return nil
	}
	req := &protocol.IORequest{Id: id, Hold: give == nil, Restore: give != nil}
	data, err := proto.Marshal(req)
	if err != nil {
		return nil
	}
	var oob []byte
	if give != nil {
		oob = unix.UnixRights(int(give.Fd()))
	}
	if _, _, err := conn.WriteMsgUnix(data, oob, nil); err != nil {
		return nil
	}
	_, files, err := receive(conn)
	if err != nil {
		return nil
	}
	return files
}

// settle tells the keeper how a workload ended that it could not see.
func (c *Client) settle(w *protocol.Workload) {
	c.witness.mu.Lock()
	h := c.witness.held[w.Id]
	c.witness.mu.Unlock()
	if h == nil || h.pid != w.Pid {
		return
	}
	exit, ok := process.ExitStatus(h.pidfd, time.Second)
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if c.call(ctx, func(k protocol.KeeperClient) error {
		_, err := k.Settle(ctx, &protocol.SettleRequest{Id: w.Id, WaitStatus: uint32(exit)})
		return err
	}) != nil {
		return
	}
	w.Unknown = false
	w.ExitCode, w.Signal = int32(exit.ExitStatus()), 0
	if exit.Signaled() {
		w.ExitCode, w.Signal = 128+int32(exit.Signal()), int32(exit.Signal())
		w.CoreDumped = exit.CoreDump()
	}
}

func (wi *witness) forget(id string) {
	wi.mu.Lock()
	defer wi.mu.Unlock()
	if h, ok := wi.held[id]; ok {
		h.close()
		delete(wi.held, id)
	}
}

func (wi *witness) close() {
	wi.mu.Lock()
	defer wi.mu.Unlock()
	wi.closed = true
	for id, h := range wi.held {
		h.close()
		delete(wi.held, id)
	}
}
