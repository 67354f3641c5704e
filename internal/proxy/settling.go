package proxy

import (
	"context"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	proxyconfig "k8s.io/kubernetes/pkg/proxy/config"
)

// stale is how long after a chain was emptied upstream removes it, and a
// little more.
const stale = 1100 * time.Millisecond

// settling has the rules written once more when they have come to rest.
// Upstream empties the chains that nothing uses any more, and removes them
// with a change that comes a second later: without one they would stay for an
// hour. That goes too for what a proxy left that was killed.
type settling struct {
	written func() time.Time // when the rules last were, at the end
	write   func()           // has them written soon
	since   atomic.Pointer[time.Time]
	changed chan struct{}
}

var (
	_ proxyconfig.ServiceHandler       = (*settling)(nil)
	_ proxyconfig.EndpointSliceHandler = (*settling)(nil)
	_ proxyconfig.NodeTopologyHandler  = (*settling)(nil)
)

func newSettling(written func() time.Time, write func()) *settling {
	return &settling{written: written, write: write, changed: make(chan struct{}, 1)}
}

// run returns when ctx ends.
func (s *settling) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.changed:
		}
		asked := stale
		for wait := stale; wait > 0; {
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
			last := s.written()
			if wait = stale - time.Since(last); last.Before(*s.since.Load()) {
				// The change needed no writing, which this makes up for, or
				// it fails.
				s.write()
				wait, asked = asked, min(2*asked, resync)
			}
		}
		s.write()
	}
}

// touch notes that rules are about to be written that may leave something.
func (s *settling) touch() {
	now := time.Now()
	s.since.Store(&now)
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// What is new leaves nothing.

func (s *settling) OnServiceAdd(*v1.Service)                            {}
func (s *settling) OnServiceUpdate(_, _ *v1.Service)                    { s.touch() }
func (s *settling) OnServiceDelete(*v1.Service)                         { s.touch() }
func (s *settling) OnServiceSynced()                                    { s.touch() }
func (s *settling) OnEndpointSliceAdd(*discovery.EndpointSlice)         {}
func (s *settling) OnEndpointSliceUpdate(_, _ *discovery.EndpointSlice) { s.touch() }
func (s *settling) OnEndpointSliceDelete(*discovery.EndpointSlice)      { s.touch() }
func (s *settling) OnEndpointSlicesSynced()                             { s.touch() }
func (s *settling) OnTopologyChange(map[string]string)                  { s.touch() }
