package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// parts are what runs, in the order of its start. Each part blocks until its
// context ends; closing ends them one by one in reverse order, so that no
// part misses what it builds on.
type parts struct {
	log *slog.Logger

	mu      sync.Mutex
	running []*part
	failed  chan error // receives the first part that ended by itself
}

type part struct {
	name   string
	cancel context.CancelFunc
	ended  chan struct{}
	after  func() error // nil, or what ends a part that does not run by itself
}

func newParts(log *slog.Logger) *parts { return &parts{log: log, failed: make(chan error, 1)} }

// run starts a part. That it ends before it is told to is a failure of the
// whole.
func (p *parts) run(name string, f func(ctx context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	this := &part{name: name, cancel: cancel, ended: make(chan struct{})}
	p.push(this)
	go func() {
		defer close(this.ended)
		err := f(ctx)
		if ctx.Err() != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				p.log.Warn("part ended with an error", "part", name, "err", err)
			}
			return
		}
		if err == nil {
			err = errors.New("ended by itself; the log says why")
		}
		select {
		case p.failed <- fmt.Errorf("%s: %w", name, err):
		default: // another came first
		}
	}()
}

// opened adds what is open but does not run: close ends it in its turn.
func (p *parts) opened(name string, close func() error) {
	p.push(&part{name: name, after: close})
}

func (p *parts) push(this *part) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.running = append(p.running, this)
}

// closeTimeout is how long one part may take to end.
const closeTimeout = 30 * time.Second

// close ends all parts. A part that hangs is left behind: the process ends
// soon.
func (p *parts) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := len(p.running) - 1; i >= 0; i-- {
		this := p.running[i]
		began := time.Now()
		if this.after != nil {
			if err := this.after(); err != nil {
				p.log.Warn("part did not close", "part", this.name, "err", err)
			}
		} else {
			this.cancel()
			select {
			case <-this.ended:
			case <-time.After(closeTimeout):
				p.log.Error("part does not end", "part", this.name, "after", closeTimeout)
			}
		}
		p.log.Debug("part ended", "part", this.name, "took", time.Since(began))
	}
	p.running = nil
}
