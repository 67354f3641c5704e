package progress

import (
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// Screen shows a text and then newer ones in its place; where there is no
// terminal, one after the other.
type Screen struct {
	out      io.Writer
	size     func() (width, height int)
	terminal bool
	shown    bool
}

// NewScreen shows on w.
func NewScreen(w io.Writer) *Screen {
	s := &Screen{out: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		s.terminal = true
		s.size = func() (int, int) {
			if w, h, err := term.GetSize(int(f.Fd())); err == nil && w > 0 && h > 0 {
				return w, h
			}
			return 80, 24
		}
	}
	return s
}

// Show shows a text that ends with a newline.
func (s *Screen) Show(text string) {
	switch {
	case !s.terminal && s.shown:
		text = "\n" + text
	case s.terminal:
		lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
		width, height := s.size()
		if most := height - 1; len(lines) > most && most > 0 {
			lines = lines[:most]
		}
		for i, l := range lines {
			lines[i] = cut(l, width) // one that wraps would move the others
		}
		// Home, each line to its end, then everything below.
		text = strings.Join(lines, "\x1b[K\n") + "\x1b[K\n\x1b[J"
		if !s.shown {
			text = "\x1b[?1049h\x1b[H" + text
		} else {
			text = "\x1b[H" + text
		}
	}
	s.shown = true
	io.WriteString(s.out, text)
}

// Close gives the terminal back as it was.
func (s *Screen) Close() {
	if s.terminal && s.shown {
		io.WriteString(s.out, "\x1b[?1049l")
	}
}

// Redraws says whether newer texts take the place of older ones.
func (s *Screen) Redraws() bool { return s.terminal }
