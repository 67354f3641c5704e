// Package daemon is what makes a server of all the rooms: what runs, in what
// order, and how it stops. Readiness sets the order, never a pause.
//
// A server owns a data directory: it holds its lock, serves its control
// socket, and is the only one to write in it. When it ends, whether in order
// or not, the keeper and the workloads run on and the next server takes them
// over. Only a stop that includes pods, and Cleanup, end them too.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/systemd"
)

// Options say what to serve.
type Options struct {
	Dir api.DataDir // absolute
	// Settings that are not empty are kept for the next start.
	Settings api.Settings
	// Kubeconfig has an agent join the cluster of another machine, as the node
	// whose credentials the file holds; "" is a cluster of this machine's own.
	Kubeconfig string
	// Progress hears of each step of the start and is closed at its end; nil
	// is nobody.
	Progress io.WriteCloser
	Log      *slog.Logger
}

// Log writes for whoever reads a server's log.
func Log(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if os.Getenv("TUTTI_DEBUG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// stopRequest ends a server as POST /stop asks.
type stopRequest struct{ pods bool }

func (stopRequest) Error() string { return "asked to stop" }

// Run serves until ctx ends or the control socket says so; it returns nil
// then, and an error of one line otherwise. A start that fails leaves nothing
// running that did not run before. It can be called once in a process.
func Run(ctx context.Context, o Options) (err error) {
	supervisor := systemd.Supervised()
	defer func() {
		if err != nil {
			supervisor.Failed(err)
		}
	}()
	// The heap of a control plane at rest is small and its garbage short-lived:
	// collecting twice as often costs little and saves half of it.
	debug.SetGCPercent(gcPercent)

	s := &server{dir: o.Dir, log: o.Log, supervisor: supervisor, start: newSteps(o.Progress), parts: newParts(o.Log)}
	if o.Kubeconfig != "" {
		if s.joined, err = readMembership(o.Kubeconfig); err != nil {
			return err
		}
		o.Settings.Agent, o.Settings.NodeName, o.Settings.Port = true, s.joined.node, s.joined.port
	}
	defer s.start.end()
	var unlock func()
	err = s.start.do(api.StepChecks, func() (err error) {
		unlock, err = s.claim(o.Settings)
		return err
	})
	if err != nil {
		return err
	}
	defer unlock()

	life, end := context.WithCancelCause(ctx)
	defer end(nil)
	s.control, err = listenControl(o.Dir, s.start, func(pods bool) { end(stopRequest{pods}) })
	if err != nil {
		return err
	}
	defer s.control.close()
	go func() {
		select {
		case err := <-s.parts.failed:
			end(err)
		case <-life.Done():
		}
	}()

	began := time.Now()
	s.log.Info("server starts", "version", api.Version, "dir", o.Dir, "pid", os.Getpid())
	if err := s.bringUp(life); err != nil {
		if cause := context.Cause(life); cause != nil {
			err = cause // what ended the start says more than how it ended
		}
		return s.giveUp(ctx, err)
	}
	s.control.ready.Store(true)
	s.start.tell(api.Step{Name: api.StepReady, State: api.StepDone, Took: time.Since(began)})
	s.start.end()
	supervisor.Ready()
	s.log.Info("server is ready", "took", time.Since(began))
	debug.FreeOSMemory() // what the start needed and nobody needs again

	<-life.Done()
	return s.shutDown(context.Cause(life))
}

const gcPercent = 50

// server is a machine's server.
type server struct {
	dir      api.DataDir
	log      *slog.Logger
	settings api.Settings
	cluster  netip.Prefix
	service  netip.Prefix
	nodeIP   netip.Addr
	joined   *membership // nil: this machine has a control plane
	fresh    bool        // there was no data directory before this start

	supervisor systemd.Supervisor

	start   *steps
	parts   *parts
	control *control
	rooms   rooms
}

func (s *server) join(elem ...string) string {
	return filepath.Join(append([]string{string(s.dir)}, elem...)...)
}

// claim makes the data directory ours alone, after everything that can be
// known to be wrong was looked at.
func (s *server) claim(asked api.Settings) (unlock func(), err error) {
	s.fresh, err = s.dir.Check()
	if err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return nil, errNotRoot
	}
	if err := os.MkdirAll(string(s.dir), 0o700); err != nil {
		return nil, fmt.Errorf("make the data directory: %w", err)
	}
	release, err := lock(s.dir)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		if s.fresh { // as it was; what is not empty stays
			os.Remove(s.dir.Lock())
			os.Remove(string(s.dir))
		}
		release()
	}()
	before, found, err := readSettings(s.dir)
	if err != nil {
		return nil, err
	}
	if s.settings, err = merge(asked, before, found); err != nil {
		return nil, err
	}
	s.cluster, s.service = netip.MustParsePrefix(s.settings.ClusterCIDR), netip.MustParsePrefix(s.settings.ServiceCIDR)
	if s.nodeIP = nodeAddress(anyone); s.joined != nil {
		s.nodeIP = nodeAddress(s.joined.host)
		if err := s.joined.serves(s.nodeIP); err != nil {
			return nil, err
		}
	}
	if err := checkMachine(s.settings); err != nil {
		return nil, err
	}
	return release, writeSettings(s.dir, s.settings)
}

// giveUp ends a start that failed. What ran before it goes on; when nothing
// did, nothing stays.
func (s *server) giveUp(ctx context.Context, cause error) error {
	var stop stopRequest
	asked := errors.As(cause, &stop)
	if !asked {
		s.start.tell(api.Step{Name: "start", State: api.StepFailed, Message: message(cause)})
	}
	s.start.end()
	if asked {
		return s.shutDown(stop)
	}
	idle := s.idle(ctx)
	s.parts.close()
	if idle {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		if err := Cleanup(ctx, s.dir, false, s.log); err != nil {
			s.log.Warn("cleanup after a failed start", "err", err)
		}
	}
	if s.supervisor.Present() && errors.Is(cause, context.Canceled) {
		return nil // as it was told
	}
	return errors.New(message(cause))
}

// message is an error for people; that of a signal needs words.
func message(err error) string {
	if errors.Is(err, context.Canceled) {
		return "interrupted while starting; `tutti up` starts anew"
	}
	return err.Error()
}

// shutDown ends the server, and with it what the cause says.
func (s *server) shutDown(cause error) error {
	var (
		stop     stopRequest
		stopping = s.control.stopping
	)
	defer stopping.end()
	asked := errors.As(cause, &stop)
	grace := stopGrace
	if !asked && errors.Is(cause, context.Canceled) && s.goingDown() {
		asked, stop.pods, grace = true, true, lastGrace
		s.supervisor.Stopping(lastGrace + stopMargin + cleanupTimeout)
	}
	if asked && stop.pods {
		// A pod that cannot be stopped in order is killed below.
		_ = stopping.do("pods", func() error { return s.stopPods(grace) })
	}
	s.log.Info("server stops", "cause", cause, "pods", stop.pods)
	_ = stopping.do("server", func() error { s.parts.close(); return nil })
	if asked && stop.pods {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
		defer cancel()
		if err := stopping.do("workloads", func() error { return Cleanup(ctx, s.dir, false, s.log) }); err != nil {
			return err
		}
	}
	if asked || errors.Is(cause, context.Canceled) {
		return nil
	}
	return cause
}
