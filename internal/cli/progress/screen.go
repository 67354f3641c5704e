package progress

import (
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// Screen has a whole terminal to itself and shows picture after picture in
// place. It writes only the lines that differ, each time all at once, so that
// nothing flickers; and it leaves the terminal as it was.
type Screen struct {
	out    *os.File
	in     *os.File // nil when no keys can be read
	before unix.Termios
	keys   chan byte
	news   chan os.Signal
	shown  []string // nil: nothing that may stay
	active bool
}

// NewScreen takes over the terminal that out is, and nil if it is none or
// cannot do what is needed. Keys are those of in, if that is a terminal too.
// Close gives it back.
func NewScreen(in io.Reader, out io.Writer) *Screen {
	f, ok := out.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) || os.Getenv("TERM") == "dumb" || os.Getenv("TERM") == "" {
		return nil
	}
	s := &Screen{out: f, keys: make(chan byte), news: make(chan os.Signal, 8)}
	if i, ok := in.(*os.File); ok {
		if t, err := unix.IoctlGetTermios(int(i.Fd()), unix.TCGETS); err == nil {
			s.in, s.before = i, *t
			go s.read()
		}
	}
	signal.Notify(s.news, syscall.SIGWINCH, syscall.SIGTSTP)
	s.enter()
	return s
}

// enter takes over: another screen, no cursor, keys as they are pressed.
// Ctrl-C stays a signal.
func (s *Screen) enter() {
	if s.in != nil {
		t := s.before
		t.Lflag &^= unix.ICANON | unix.ECHO
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		_ = unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETS, &t)
	}
	io.WriteString(s.out, "\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J")
	s.shown, s.active = nil, true
}

func (s *Screen) leave() {
	if !s.active {
		return
	}
	s.active = false
	io.WriteString(s.out, "\x1b[?25h\x1b[?1049l")
	if s.in != nil {
		_ = unix.IoctlSetTermios(int(s.in.Fd()), unix.TCSETS, &s.before)
	}
}

// read ends with the program: nobody can be told to stop waiting for a key.
func (s *Screen) read() {
	for b := make([]byte, 1); ; {
		if n, err := s.in.Read(b); n == 0 || err != nil {
			return
		}
		s.keys <- b[0]
	}
}

// Typed says whether keys can be read.
func (s *Screen) Typed() bool { return s.in != nil }

// Keys receives what is typed.
func (s *Screen) Keys() <-chan byte { return s.keys }

// News receives what Handle has to know.
func (s *Screen) News() <-chan os.Signal { return s.news }

// Handle does what a piece of news asks for: after another size, everything
// is drawn anew; Ctrl-Z gives the terminal back until the program goes on.
func (s *Screen) Handle(news os.Signal) {
	if news == syscall.SIGTSTP {
		s.leave()
		// Some thread may run on for a moment: it must not draw meanwhile.
		again := make(chan os.Signal, 1)
		signal.Notify(again, syscall.SIGCONT)
		_ = syscall.Kill(os.Getpid(), syscall.SIGSTOP)
		<-again
		signal.Stop(again)
		s.enter()
	}
	s.shown = nil
}

// Size is how much fits. The last column stays free: what a terminal does
// after writing there differs.
func (s *Screen) Size() (width, height int) {
	if w, h, err := term.GetSize(int(s.out.Fd())); err == nil && w > 1 && h > 0 {
		return w - 1, h
	}
	return 79, 24
}

// Show shows lines, each of which fits.
func (s *Screen) Show(lines []string) {
	io.WriteString(s.out, change(s.shown, lines))
	s.shown = lines
}

// change is what makes a terminal that shows old show new. Terminals that
// know synchronized updates show it at once.
func change(old, new []string) string {
	var b strings.Builder
	if old == nil {
		b.WriteString("\x1b[H\x1b[J")
	}
	for i, l := range new {
		if i >= len(old) || old[i] != l {
			fmt.Fprintf(&b, "\x1b[%dH%s\x1b[K", i+1, l)
		}
	}
	if len(new) < len(old) {
		fmt.Fprintf(&b, "\x1b[%dH\x1b[J", len(new)+1)
	}
	if b.Len() == 0 {
		return ""
	}
	return "\x1b[?2026h" + b.String() + "\x1b[?2026l"
}

// Close gives the terminal back as it was.
func (s *Screen) Close() {
	signal.Stop(s.news)
	s.leave()
}
