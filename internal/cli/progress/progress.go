// Package progress shows how several things come along: a block of lines
// that is redrawn in place on a terminal, and elsewhere one plain line for
// each change. It never mixes the two.
package progress

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/term"
)

// State is where one thing is.
type State int

const (
	Working State = iota
	Done
	Failed
)

// Display shows one line for each subject, in the order of their first news.
// It is safe for concurrent use.
type Display struct {
	mu    sync.Mutex
	out   io.Writer
	size  func() (width, height int) // nil: plain lines
	color bool
	lines []line
	drawn int // lines on the screen that are ours
}

type line struct {
	subject, message string
	state            State
}

// New shows on w; it redraws when w is a terminal that can.
func New(w io.Writer) *Display {
	d := &Display{out: w}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb" {
		d.size = func() (int, int) {
			w, h, err := term.GetSize(int(f.Fd()))
			if err != nil || w <= 0 || h <= 0 {
				return 80, 24
			}
			return w, h
		}
		d.color = os.Getenv("NO_COLOR") == ""
	}
	return d
}

// Update tells how far a subject is. What is known already shows nothing.
func (d *Display) Update(subject string, state State, message string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := line{subject, message, state}
	for i, l := range d.lines {
		if l.subject == subject {
			if l == now {
				return
			}
			d.lines[i] = now
			d.show(now)
			return
		}
	}
	d.lines = append(d.lines, now)
	d.show(now)
}

// Close leaves what is on the screen there: later output comes below it.
func (d *Display) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.lines, d.drawn = nil, 0
}

func (d *Display) show(changed line) {
	if d.size == nil {
		fmt.Fprintln(d.out, changed.text())
		return
	}
	d.redraw()
}

// text is a line where nothing is redrawn.
func (l line) text() string {
	switch {
	case l.message == "" && l.state == Done:
		return l.subject + ": done"
	case l.message == "":
		return l.subject + " …"
	case l.state == Failed:
		return l.subject + ": failed: " + l.message
	}
	return l.subject + ": " + l.message
}

// redraw writes the whole block at once, so that it does not flicker.
func (d *Display) redraw() {
	width, height := d.size()
	var b strings.Builder
	if d.drawn > 0 {
		fmt.Fprintf(&b, "\x1b[%dA", d.drawn)
	}
	rows := d.rows(height - 1)
	for _, r := range rows {
		b.WriteString("\r\x1b[K")
		b.WriteString(d.row(r, width))
		b.WriteByte('\n')
	}
	b.WriteString("\x1b[J") // what a longer block has left below
	d.drawn = len(rows)
	io.WriteString(d.out, b.String())
}

// rows picks what fits: when there is too much, what is done gives way first.
func (d *Display) rows(limit int) []line {
	if limit < 1 {
		limit = 1
	}
	over := len(d.lines) - limit
	if over <= 0 {
		return d.lines
	}
	var rows []line
	left := 0
	for _, l := range d.lines {
		if l.state == Done && left <= over {
			left++
			continue
		}
		rows = append(rows, l)
	}
	if len(rows) > limit-1 {
		left += len(rows) - (limit - 1)
		rows = rows[:limit-1]
	}
	return append(rows, line{subject: fmt.Sprintf("and %d more", left), state: Done})
}

func (d *Display) row(l line, width int) string {
	mark, color := "…", "33"
	switch l.state {
	case Done:
		mark, color = "✓", "32"
	case Failed:
		mark, color = "✗", "31"
	}
	text := fmt.Sprintf("%-*s  %s", d.column(), l.subject, l.message)
	text = cut(strings.TrimRight(text, " "), width-3)
	if d.color {
		mark = "\x1b[" + color + "m" + mark + "\x1b[0m"
	}
	return mark + " " + text
}

// column is how wide subjects are, within reason.
func (d *Display) column() int {
	w := 0
	for _, l := range d.lines {
		w = max(w, len([]rune(l.subject)))
	}
	return min(w, 40)
}

func cut(s string, width int) string {
	r := []rune(s)
	if width < 1 || len(r) <= width {
		return s
	}
	return string(r[:width-1]) + "…"
}

// Redraws says whether the display is a terminal's.
func (d *Display) Redraws() bool { return d.size != nil }
