package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"k8s.io/cri-streaming/pkg/streaming/portforward"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"
	utilexec "k8s.io/utils/exec"

	"tutti.dev/tutti/internal/runtime"
)

// idle ends a session in which nothing has moved for this long.
const idle = 4 * time.Hour

func (s *Server) exec(w http.ResponseWriter, r *http.Request) {
	s.remoteCommand(w, r, func(id runtime.ID, options *remotecommand.Options) {
		remotecommand.ServeExec(w, r, session{s.cfg.Runtime, id, options}, "", "", "", r.URL.Query()["command"], options,
			idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	})
}

func (s *Server) attach(w http.ResponseWriter, r *http.Request) {
	s.remoteCommand(w, r, func(id runtime.ID, options *remotecommand.Options) {
		remotecommand.ServeAttach(w, r, session{s.cfg.Runtime, id, options}, "", "", "", options,
			idle, remotecommand.DefaultStreamCreationTimeout, remotecommand.SupportedStreamingProtocols)
	})
}

func (s *Server) remoteCommand(w http.ResponseWriter, r *http.Request, serve func(runtime.ID, *remotecommand.Options)) {
	options, err := remotecommand.NewOptions(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if id, ok := s.container(w, r); ok {
		serve(id, options)
	}
}

// session runs what the streaming library asks for in one container. The
// library's names for it are not used.
type session struct {
	runtime Workloads
	id      runtime.ID
	options *remotecommand.Options
}

func (s session) ExecInContainer(ctx context.Context, _, _, _ string, argv []string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize, _ time.Duration) error {
	code, err := s.runtime.Exec(ctx, s.id, runtime.Exec{Args: argv, Streams: s.streams(ctx, in, out, errOut, resize)})
	if err != nil {
		return err
	}
	if code != 0 {
		return utilexec.CodeExitError{Err: fmt.Errorf("command terminated with exit code %d", code), Code: code}
	}
	return nil
}

func (s session) AttachContainer(ctx context.Context, _, _, _ string, in io.Reader, out, errOut io.WriteCloser, _ bool, resize <-chan remotecommand.TerminalSize) error {
	err := s.runtime.Attach(ctx, s.id, s.streams(ctx, in, out, errOut, resize))
	if ctx.Err() != nil {
		return nil // the client has gone: there is nobody to tell
	}
	return err
}

// streams leaves out those that the client did not ask for: over a WebSocket
// the library hands on all, and one of stdin never ends.
func (s session) streams(ctx context.Context, in io.Reader, out, errOut io.WriteCloser, resize <-chan remotecommand.TerminalSize) runtime.Streams {
	streams := runtime.Streams{TTY: s.options.TTY}
	if s.options.Stdin {
		streams.Stdin = in
	}
	if s.options.Stdout {
		streams.Stdout = out
	}
	if s.options.Stderr {
		streams.Stderr = errOut
	}
	if s.options.TTY && resize != nil {
		sizes := make(chan runtime.Size)
		streams.Resize = sizes
		go func() {
			defer close(sizes)
			for {
				select {
				case <-ctx.Done():
					return
				case size, ok := <-resize:
					if !ok {
						return
					}
					select {
					case <-ctx.Done():
						return
					case sizes <- runtime.Size{Width: size.Width, Height: size.Height}:
					}
				}
			}
		}()
	}
	return streams
}

func (s *Server) portForward(w http.ResponseWriter, r *http.Request) {
	options, err := portforward.NewV4Options(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	pod := s.pod(w, r)
	if pod == nil {
		return
	}
	netns, err := s.cfg.Pods.NetNS(pod.UID)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	portforward.ServePortForward(w, r, forwarder{r.Context(), netns}, pod.Name, string(pod.UID), options,
		idle, remotecommand.DefaultStreamCreationTimeout, portforward.SupportedProtocols)
}

// forwarder connects to what listens on a pod's own loopback address, where
// programs also listen that nobody else should reach.
type forwarder struct {
	ctx   context.Context // of the session: the library gives a connection none
	netns string
}

func (f forwarder) PortForward(_ context.Context, _, _ string, port int32, stream io.ReadWriteCloser) error {
	defer stream.Close()
	conn, err := dialIn(f.ctx, f.netns, port)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(f.ctx, func() { conn.Close(); stream.Close() })
	defer stop()

	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(conn, stream)
		// The client is done; the program may still have to answer.
		_ = conn.CloseWrite()
		sent <- err
	}()
	_, err = io.Copy(stream, conn)
	// The program is done; what the client still sends has no reader.
	stream.Close()
	conn.Close()
	return errors.Join(ignoreClosed(<-sent), ignoreClosed(err))
}
