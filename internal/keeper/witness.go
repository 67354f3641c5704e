package keeper

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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
	pid      int32
	files    []*os.File
	pidfd    *os.File
	terminal *os.File
}

func (h *holding) close() {
	for _, f := range append(h.files, h.pidfd, h.terminal) {
		if f != nil {
			f.Close()
		}
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
	h := &holding{pid: w.Pid, pidfd: pidfd}
	dir := filepath.Join(c.dir, "workloads", w.Id)
	for _, name := range []string{"stdout", "stderr"} {
		if fd, err := unix.Open(filepath.Join(dir, name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err == nil {
			h.files = append(h.files, os.NewFile(uintptr(fd), name))
		}
	}
	if c.witness.held == nil {
		c.witness.held = map[string]*holding{}
	}
	c.witness.held[w.Id] = h
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
