package metrics

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/kubelet/client"
)

const (
	// freshness is how old the newest sample may be when somebody asks; an older one becomes the beginning of a window.
	freshness = 10 * time.Second
	// settling is the first window: how long those wait who ask for figures that nobody has asked for lately.
	settling = 2 * time.Second
	// shortestWindow and longestWindow bound what a figure may be an average of.
	shortestWindow = time.Second
	longestWindow  = 30 * time.Second

	// scrapeTimeout is how long a node may take to answer.
	scrapeTimeout = 5 * time.Second
	// scrapeLimit is how many bytes its answer may have.
	scrapeLimit = 16 << 20
	// parallel is how many nodes are asked at once.
	parallel = 16
)

// history is what is known of a node: two samples when there are figures.
type history struct {
	older, newer *sample
	failed       time.Time // when the last sample could not be taken; zero if it was
}

// next says whether a sample is wanted at now, and after how long.
func (h history) next(now time.Time) (after time.Duration, wanted bool) {
	switch {
	case now.Sub(h.failed) < freshness:
		return 0, false
	case h.newer == nil || h.stale(now):
		return 0, true
	case h.older == nil:
		return max(0, settling-now.Sub(h.newer.taken)), true
	default:
		return 0, now.Sub(h.newer.taken) >= freshness
	}
}

// stale says whether the newest sample is too old to begin a window with, or to be shown.
func (h history) stale(now time.Time) bool { return now.Sub(h.newer.taken) > longestWindow-settling }

// add returns the history with one more sample.
func (h history) add(s *sample) history {
	if h.newer == nil || h.stale(s.taken) {
		return history{newer: s}
	}
	return history{older: h.newer, newer: s}
}

// sampler takes samples of nodes when they are asked for, and only then.
type sampler struct {
	take func(ctx context.Context, node string) (*sample, error)
	log  *slog.Logger

	mu    sync.Mutex
	nodes map[string]*nodeHistory
}

// nodeHistory is the history of one node. Its lock is a channel, so that those who wait for it may give up.
type nodeHistory struct {
	lock chan struct{}
	history
}

func newSampler(log *slog.Logger, take func(ctx context.Context, node string) (*sample, error)) *sampler {
	return &sampler{take: take, log: log, nodes: map[string]*nodeHistory{}}
}

// forget drops what is known of nodes that are gone.
func (s *sampler) forget(gone func(node string) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.nodes {
		if gone(name) {
			delete(s.nodes, name)
		}
	}
}

// histories returns two samples of each of the nodes, none of a node that does not answer. It takes what time that
// needs; asked twice at once, it takes samples once.
func (s *sampler) histories(ctx context.Context, nodes []string) (map[string]history, error) {
	found := map[string]history{}
	var mu sync.Mutex
	var g errgroup.Group
	g.SetLimit(parallel)
	for _, name := range nodes {
		g.Go(func() error {
			h, err := s.current(ctx, name)
			if err == nil && h.older != nil && !h.stale(time.Now()) {
				mu.Lock()
				defer mu.Unlock()
				found[name] = h
			}
			return err
		})
	}
	return found, g.Wait()
}

// current returns a node's history with the samples that are wanted now. An error is the end of ctx.
func (s *sampler) current(ctx context.Context, name string) (history, error) {
	s.mu.Lock()
	n := s.nodes[name]
	if n == nil {
		n = &nodeHistory{lock: make(chan struct{}, 1)}
		s.nodes[name] = n
	}
	s.mu.Unlock()
	select {
	case n.lock <- struct{}{}:
		defer func() { <-n.lock }()
	case <-ctx.Done():
		return history{}, ctx.Err()
	}
	for {
		after, wanted := n.next(time.Now())
		if !wanted {
			return n.history, nil
		}
		select {
		case <-time.After(after):
		case <-ctx.Done():
			return history{}, ctx.Err()
		}
		// The others who wait want this sample even if the one who asked first has gone.
		scraping, cancel := context.WithTimeout(context.WithoutCancel(ctx), scrapeTimeout)
		taken, err := s.take(scraping, name)
		cancel()
		if err != nil {
			s.log.Warn("cannot sample what a node uses", "node", name, "error", err)
			n.failed = time.Now()
			return n.history, nil
		}
		n.history = n.add(taken)
	}
}

// scraper samples nodes by the endpoint of their agents for this.
func scraper(nodes client.ConnectionInfoGetter) func(ctx context.Context, node string) (*sample, error) {
	return func(ctx context.Context, node string) (*sample, error) {
		info, err := nodes.GetConnectionInfo(ctx, types.NodeName(node))
		if err != nil {
			return nil, fmt.Errorf("find the address of node %s: %w", node, err)
		}
		url := info.Scheme + "://" + net.JoinHostPort(info.Hostname, info.Port) + "/metrics/resource"
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return nil, err
		}
		resp, err := info.Transport.RoundTrip(req)
		if err != nil {
			return nil, fmt.Errorf("get %s: %w", url, err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return nil, fmt.Errorf("get %s: %s", url, resp.Status)
		}
		s, err := parse(io.LimitReader(resp.Body, scrapeLimit), time.Now())
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", url, err)
		}
		return s, nil
	}
}
