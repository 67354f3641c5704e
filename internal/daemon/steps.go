package daemon

import (
	"encoding/json"
	"io"
	"slices"
	"sync"
	"time"

	"tutti.dev/tutti/internal/api"
)

// steps keeps the steps of a start or a stop and tells them to whoever
// listens, those that were before included.
type steps struct {
	mu        sync.Mutex
	all       []api.Step
	ended     bool
	listeners map[chan struct{}]struct{}
	out       io.WriteCloser // nil: nobody
}

func newSteps(out io.WriteCloser) *steps {
	return &steps{listeners: map[chan struct{}]struct{}{}, out: out}
}

// do runs one step.
func (s *steps) do(name string, f func() error) error {
	began := time.Now()
	s.tell(api.Step{Name: name, State: api.StepStarted})
	if err := f(); err != nil {
		s.tell(api.Step{Name: name, State: api.StepFailed, Took: time.Since(began), Message: err.Error()})
		return err
	}
	s.tell(api.Step{Name: name, State: api.StepDone, Took: time.Since(began)})
	return nil
}

func (s *steps) tell(step api.Step) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, step)
	if s.out != nil {
		// Nobody may be listening any more; the start goes on all the same.
		json.NewEncoder(s.out).Encode(step)
	}
	s.wake()
}

// end says that no more steps come.
func (s *steps) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return
	}
	s.ended = true
	if s.out != nil {
		s.out.Close()
		s.out = nil
	}
	s.wake()
}

func (s *steps) wake() {
	for l := range s.listeners {
		select {
		case l <- struct{}{}:
		default: // it is to look already
		}
	}
}

// past is what was told so far.
func (s *steps) past() []api.Step {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.all)
}

// follow calls tell with every step, from the first, until they end or gone
// is closed.
func (s *steps) follow(gone <-chan struct{}, tell func(api.Step) error) error {
	news := make(chan struct{}, 1)
	s.mu.Lock()
	s.listeners[news] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, news)
		s.mu.Unlock()
	}()
	for told := 0; ; {
		s.mu.Lock()
		more, ended := slices.Clone(s.all[told:]), s.ended
		s.mu.Unlock()
		for _, step := range more {
			if err := tell(step); err != nil {
				return err
			}
		}
		told += len(more)
		if ended {
			return nil
		}
		select {
		case <-news:
		case <-gone:
			return nil
		}
	}
}
