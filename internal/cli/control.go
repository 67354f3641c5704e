package cli

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
)

// control speaks to a server through its control socket.
type control struct {
	dir  api.DataDir
	http *http.Client
}

// controlBase is the URL of every server: the socket tells them apart.
const controlBase = "http://tutti"

func (c *command) control() *control {
	dir := c.dir()
	return &control{dir, &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", dir.Socket())
		},
	}}}
}

// errNotRunning says that no server answers.
var errNotRunning = errors.New("this machine is not running; start it with `tutti up`")

// ask sends a request and returns the answer's body.
func (c *control) ask(ctx context.Context, method, path string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, method, controlBase+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ENOTDIR),
		errors.Is(err, syscall.EINVAL): // a path too long for a socket: none is there
		return nil, errNotRunning
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%s is for root only; use sudo", c.dir.Socket())
	case err != nil:
		return nil, fmt.Errorf("ask the server at %s: %w", c.dir.Socket(), err)
	case resp.StatusCode != http.StatusOK:
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		resp.Body.Close()
		return nil, fmt.Errorf("the server at %s refused: %s", c.dir.Socket(), strings.TrimSpace(string(text)))
	}
	return resp.Body, nil
}

// status asks the server for its own.
func (c *control) status(ctx context.Context) (api.ServerStatus, error) {
	var s api.ServerStatus
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	body, err := c.ask(ctx, http.MethodGet, api.PathStatus)
	if err != nil {
		return s, err
	}
	defer body.Close()
	if err := json.NewDecoder(body).Decode(&s); err != nil {
		return s, fmt.Errorf("read the server's answer: %w", err)
	}
	return s, nil
}

// errEnded says that steps ended before one said that all is done.
var errEnded = errors.New("the server ended; its log says why")

// follow shows steps until the one named last is done or any fails; each, if
// not nil, is called with every step.
func follow(steps io.Reader, d *progress.Display, last string, each func(api.Step)) error {
	lines := bufio.NewScanner(steps)
	for lines.Scan() {
		var s api.Step
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return fmt.Errorf("read the server's steps: %w", err)
		}
		if each != nil {
			each(s)
		}
		switch {
		case s.State == api.StepFailed:
			d.Update(s.Name, progress.Failed, s.Message)
			return errors.New(s.Message)
		case s.Name == last && s.State == api.StepDone:
			return nil
		case s.State == api.StepDone:
			d.Update(s.Name, progress.Done, short(s.Took))
		default:
			d.Update(s.Name, progress.Working, "")
		}
	}
	if err := lines.Err(); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("read the server's steps: %w", err)
	}
	return errEnded
}

// short is a duration as a person says it.
func short(d time.Duration) string {
	if d < time.Second {
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// hold takes the lock of a file or directory, waiting until whoever has it
// lets go or ctx ends.
func hold(ctx context.Context, path string) (release func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	go func() {
		for {
			err := unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err != unix.EINTR {
				got <- err
				return
			}
		}
	}()
	select {
	case err := <-got:
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		go func() { <-got; f.Close() }()
		return nil, fmt.Errorf("wait for the lock %s: %w", path, context.Cause(ctx))
	}
}
