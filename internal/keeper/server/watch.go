//go:build cgo

package server

import "sync"

// watchers hears of every change of a workload. What a slow one has not been
// told yet is kept once per workload, so that it can never fall behind by more
// than there are workloads.
type watchers struct {
	mu  sync.Mutex
	all map[*watcher]struct{}
}

type watcher struct {
	mu      sync.Mutex
	changed map[*workload]struct{}
	wake    chan struct{}
}

func (ws *watchers) add() *watcher {
	w := &watcher{changed: map[*workload]struct{}{}, wake: make(chan struct{}, 1)}
	ws.mu.Lock()
	defer ws.mu.Unlock()
	if ws.all == nil {
		ws.all = map[*watcher]struct{}{}
	}
	ws.all[w] = struct{}{}
	return w
}

func (ws *watchers) remove(w *watcher) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	delete(ws.all, w)
}

func (ws *watchers) tell(changed *workload) {
	ws.mu.Lock()
	defer ws.mu.Unlock()
	for w := range ws.all {
		w.mu.Lock()
		w.changed[changed] = struct{}{}
		w.mu.Unlock()
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

func (w *watcher) take() map[*workload]struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	changed := w.changed
	w.changed = map[*workload]struct{}{}
	return changed
}
