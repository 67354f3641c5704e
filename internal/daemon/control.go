package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/image/registry"
)

// control is the server's end of the control socket.
type control struct {
	listener net.Listener
	server   *http.Server
	start    *steps
	stopping *steps
	ready    atomic.Bool

	images  atomic.Pointer[http.Handler]      // nil until the store is open
	collect atomic.Pointer[registry.Registry] // nil until, and unless, images are served

	stop func(pods bool) // may be called many times; the first counts
}

// listenControl serves the control socket. Only the holder of the data
// directory's lock may: it takes the place of a socket that is there.
func listenControl(dir api.DataDir, start *steps, stop func(pods bool)) (*control, error) {
	if err := os.Remove(dir.Socket()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("replace the control socket: %w", err)
	}
	l, err := net.Listen("unix", dir.Socket())
	if err != nil {
		return nil, fmt.Errorf("listen on the control socket: %w", err)
	}
	// The directory is root's alone already.
	if err := os.Chmod(dir.Socket(), 0o600); err != nil {
		l.Close()
		return nil, fmt.Errorf("protect the control socket: %w", err)
	}
	c := &control{listener: l, start: start, stopping: newSteps(nil), stop: stop}
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+api.PathStatus, c.status)
	mux.HandleFunc("GET "+api.PathProgress, func(w http.ResponseWriter, r *http.Request) { stream(w, r, c.start) })
	mux.HandleFunc("POST "+api.PathStop, c.stopNow)
	mux.HandleFunc("POST "+api.PathCollect, c.collectRegistry)
	mux.HandleFunc(api.PathImages, c.image)
	mux.HandleFunc(api.PathImages+"/", c.image)
	c.server = &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	go c.server.Serve(l)
	return c, nil
}

// close ends the socket; whoever follows a stop hears its last step first.
func (c *control) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	if c.server.Shutdown(ctx) != nil { // it closes the listener, which removes the socket
		c.server.Close()
	}
}

func (c *control) status(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(api.ServerStatus{Ready: c.ready.Load(), PID: os.Getpid(), Version: api.Version, Steps: c.start.past()})
}

func (c *control) stopNow(w http.ResponseWriter, r *http.Request) {
	pods, err := strconv.ParseBool(r.FormValue("pods"))
	if err != nil && r.FormValue("pods") != "" {
		http.Error(w, "pods must be true or false; it is false when left out", http.StatusBadRequest)
		return
	}
	c.stop(pods)
	stream(w, r, c.stopping)
}

func (c *control) image(w http.ResponseWriter, r *http.Request) {
	if h := c.images.Load(); h != nil {
		(*h).ServeHTTP(w, r)
		return
	}
	http.Error(w, "the image store is not open yet; `tutti up` waits for it", http.StatusServiceUnavailable)
}

func (c *control) collectRegistry(w http.ResponseWriter, r *http.Request) {
	reg := c.collect.Load()
	if reg == nil {
		http.Error(w, "this machine serves no registry; stop it, and start it with --registry-port 5000", http.StatusNotFound)
		return
	}
	untagged, err := strconv.ParseBool(r.FormValue("untagged"))
	if err != nil && r.FormValue("untagged") != "" {
		http.Error(w, "untagged must be true or false; it is false when left out", http.StatusBadRequest)
		return
	}
	mirrors, err := strconv.ParseBool(r.FormValue("mirrors"))
	if err != nil && r.FormValue("mirrors") != "" {
		http.Error(w, "mirrors must be true or false; it is false when left out", http.StatusBadRequest)
		return
	}
	var freed int64
	if mirrors {
		freed, err = reg.Forget(r.Context())
	}
	if err == nil {
		var own int64
		own, err = reg.Collect(r.Context(), untagged)
		freed += own
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(api.Collected{Freed: freed})
}

// stream writes steps as they come, one a line.
func stream(w http.ResponseWriter, r *http.Request, s *steps) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	flush := http.NewResponseController(w)
	if err := flush.Flush(); err != nil {
		return
	}
	_ = s.follow(r.Context().Done(), func(step api.Step) error { // ends when the client is gone
		if err := json.NewEncoder(w).Encode(step); err != nil {
			return err
		}
		return flush.Flush()
	})
}
