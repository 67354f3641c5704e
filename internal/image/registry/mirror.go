package registry

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/api/errcode"
	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/distribution/distribution/v3/registry/handlers"
)

// retryUpstream is how long a mirror whose upstream did not answer when it
// was opened serves what it has before it asks again.
const retryUpstream = 30 * time.Second

// fetchTimeout is how long one layer may take to arrive and be kept: hours,
// where it is large and the line slow.
const fetchTimeout = 24 * time.Hour

// mirror serves the images of another registry: it fetches what it does not
// have, and keeps it for the week that distribution gives it.
type mirror struct {
	host string // as images name it
	url  string // where it is asked
	dir  string
	log  *slog.Logger

	// gate is held for reading by requests, for writing while what is kept is
	// removed.
	gate sync.RWMutex

	mu      sync.Mutex
	app     *handlers.App // nil until the first request
	fetches bool          // app asks the upstream
	opened  time.Time
}

// open returns the handlers. Those that fetch need an answer of the upstream
// to begin with; while there is none, others serve what is here.
func (m *mirror) open(ctx context.Context) (http.Handler, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.app != nil && (m.fetches || time.Since(m.opened) < retryUpstream) {
		return m.app, nil
	}
	app, err := newApp(ctx, m.dir, configuration.Proxy{RemoteURL: m.url, CacheWriteTimeout: new(fetchTimeout)})
	if m.fetches = err == nil; !m.fetches {
		m.log.Warn("upstream does not answer; what is kept of it is served", "mirror", m.host, "upstream", m.url, "err", err)
		if m.app == nil {
			if app, err = newApp(ctx, m.dir, configuration.Proxy{}); err != nil {
				return nil, err
			}
		} else {
			app = m.app
		}
	}
	m.app, m.opened = app, time.Now()
	return m.app, nil
}

// close forgets the handlers; no request may be under way.
func (m *mirror) close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.app == nil {
		return nil
	}
	err := m.app.Shutdown() // it writes down what it will remove when
	m.app = nil
	return err
}

// mirrored tells of which registry a request wants images, and what it is
// called there. A client says so as containerd does, with ?ns=HOST, or by a
// name that begins with it, HOST/NAME: no namespace has a dot in it.
func mirrored(req *http.Request, name string) (host, path string, ok bool) {
	if host = req.URL.Query().Get("ns"); host != "" {
		return host, req.URL.Path, true
	}
	host, _, ok = strings.Cut(name, "/")
	if !ok || !strings.Contains(host, ".") {
		return "", "", false
	}
	return host, "/v2" + strings.TrimPrefix(req.URL.Path, "/v2/"+host), true
}

// serveMirror answers a request for an image of another registry.
func (r *Registry) serveMirror(w http.ResponseWriter, req *http.Request, user User, host, path string) {
	m := r.mirrors[host]
	switch {
	case m == nil:
		refuse(w, v2.ErrorCodeNameUnknown.WithMessage(fmt.Sprintf("this registry is no mirror of %s: start the server with --mirrors %s", host, host)))
		return
	case req.Method != http.MethodGet && req.Method != http.MethodHead:
		refuse(w, errcode.ErrorCodeUnsupported.WithMessage(fmt.Sprintf("images of %s are mirrored here: push to %s itself", host, host)))
		return
	case !r.allowed(w, req, user, Pull, "", host):
		return
	}
	m.gate.RLock()
	defer m.gate.RUnlock()
	app, err := m.open(r.ctx)
	if err != nil {
		r.log.Error("a mirror does not work", "mirror", host, "err", err)
		refuse(w, errcode.ErrorCodeUnavailable)
		return
	}
	ask := req.Clone(req.Context())
	// Without a query a list of tags comes whole: there would be no way back
	// from the name of its next page.
	ask.URL = &url.URL{Path: path}
	ask.RequestURI = path
	ask.Header.Del("Authorization") // it is for us alone
	app.ServeHTTP(w, ask)
}

// Forget removes everything that was fetched from other registries, also from
// those that are mirrored no longer, and returns how many bytes that has
// freed. It waits for downloads; those that begin meanwhile wait for it.
func (r *Registry) Forget(ctx context.Context) (freed int64, err error) {
	for _, m := range r.mirrors {
		if err := lockWhenIdle(ctx, &m.gate); err != nil {
			return 0, fmt.Errorf("empty the mirror of %s: wait for downloads: %w", m.host, err)
		}
		defer m.gate.Unlock()
		if err := m.close(); err != nil {
			return 0, fmt.Errorf("empty the mirror of %s: %w", m.host, err)
		}
	}
	dir := filepath.Join(r.dir, "mirrors")
	if freed, err = size(dir); err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		return 0, fmt.Errorf("empty the mirrors: %w", err)
	}
	return freed, nil
}

// lockWhenIdle never stands in line for the lock: that would hold up other
// readers for as long as one goes on.
func lockWhenIdle(ctx context.Context, gate *sync.RWMutex) error {
	for !gate.TryLock() {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(100 * time.Millisecond):
		}
	}
	return nil
}

// size is how many bytes the files below a directory have.
func size(dir string) (total int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			total += info.Size()
		}
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return total, err
}
