package e2e

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/console"
)

// session is a program that a test talks to while it runs.
type session struct {
	t        *testing.T
	name     string
	cmd      *exec.Cmd
	keyboard io.Writer
	terminal console.Console // nil if it has none
	done     chan struct{}   // closed when all that it said was read and it has ended
	err      error           // of its end, valid then

	mu      sync.Mutex
	said    bytes.Buffer
	changed chan struct{}
}

// talk starts cmd, which ends with the test at the latest, with pipes or, if
// size is not zero, at a terminal of that size.
func talk(t *testing.T, cmd *exec.Cmd, size console.WinSize) *session {
	t.Helper()
	s := &session{t: t, name: strings.Join(cmd.Args, " "), cmd: cmd, done: make(chan struct{}), changed: make(chan struct{}, 1)}
	var sources []io.Reader
	if size == (console.WinSize{}) {
		keyboard, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		s.keyboard = keyboard
		cmd.Stdout, cmd.Stderr = s, s
	} else {
		sources = append(sources, s.openTerminal(size))
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if f, ok := cmd.Stdin.(*os.File); ok && s.terminal != nil {
		f.Close()
	}
	go func() {
		for _, r := range sources {
			_, _ = io.Copy(s, r) // of a terminal that nobody has open any more: EIO
		}
		s.err = cmd.Wait()
		close(s.done)
	}()
	t.Cleanup(func() { s.kill(); s.closeTerminal() })
	return s
}

func (s *session) openTerminal(size console.WinSize) io.Reader {
	s.t.Helper()
	ours, path, err := console.NewPty()
	if err != nil {
		s.t.Fatal(err)
	}
	s.terminal, s.keyboard = ours, ours
	theirs, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := ours.Resize(size); err != nil {
		s.t.Fatal(err)
	}
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = theirs, theirs, theirs
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	return ours
}

func (s *session) closeTerminal() {
	if s.terminal != nil {
		s.terminal.Close()
	}
}

// Write takes what the program says.
func (s *session) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case s.changed <- struct{}{}:
	default:
	}
	return s.said.Write(p)
}

func (s *session) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.said.String()
}

// enter types a line.
func (s *session) enter(line string) {
	s.t.Helper()
	if _, err := io.WriteString(s.keyboard, line+"\n"); err != nil {
		s.t.Fatalf("%s: type %q: %v\n%s", s.name, line, err, s.text())
	}
}

// press types one key, such as control-C.
func (s *session) press(key byte) {
	s.t.Helper()
	if _, err := s.keyboard.Write([]byte{key}); err != nil {
		s.t.Fatalf("%s: press key %d: %v\n%s", s.name, key, err, s.text())
	}
}

// await waits until what the program said since the last await matches, and
// returns what the first group matched.
func (s *session) await(pattern string) string {
	s.t.Helper()
	re := regexp.MustCompile(pattern)
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	for last := false; ; {
		s.mu.Lock()
		m := re.FindSubmatch(s.said.Bytes())
		if m != nil {
			s.said.Next(re.FindIndex(s.said.Bytes())[1])
		}
		s.mu.Unlock()
		switch {
		case m != nil:
			return string(m[len(m)-1])
		case last:
			s.t.Fatalf("%s: ended (%v) without %q:\n%s", s.name, s.err, pattern, s.text())
		}
		select {
		case <-s.changed:
		case <-s.done:
			last = true
		case <-deadline.C:
			s.t.Fatalf("%s: did not say %q:\n%s", s.name, pattern, s.text())
		}
	}
}

// end waits for the program to end by itself and returns its exit status.
func (s *session) end() int {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(patience):
		s.t.Fatalf("%s: does not end:\n%s", s.name, s.text())
	}
	return s.cmd.ProcessState.ExitCode()
}

// kill ends the program and whom it started.
func (s *session) kill() {
	select {
	case <-s.done: // its number may be another's by now
	default:
		_ = syscall.Kill(-s.cmd.Process.Pid, syscall.SIGKILL)
		<-s.done
	}
}

// background is a context for a program that runs as long as its test, but
// not for ever.
func background(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	t.Cleanup(cancel)
	return ctx
}
