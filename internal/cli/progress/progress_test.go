package progress

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

func story(d *Display) {
	d.Update("checks", Working, "")
	d.Update("checks", Done, "3 ms")
	d.Update("web", Working, "0 of 2 ready")
	d.Update("web", Working, "0 of 2 ready") // no news
	d.Update("db", Working, "starting")
	d.Update("web", Done, "2 of 2 ready")
	d.Update("db", Failed, "exit code 1")
}

func TestPlainLines(t *testing.T) {
	var out bytes.Buffer
	story(New(&out))
	want := `checks …
checks: 3 ms
web: 0 of 2 ready
db: starting
web: 2 of 2 ready
db: failed: exit code 1
`
	if out.String() != want {
		t.Errorf("got:\n%swant:\n%s", out.String(), want)
	}
}

// screen is what a terminal would show.
type screen struct {
	lines []string
	row   int
}

func (s *screen) Write(p []byte) (int, error) {
	text := string(p)
	var up int
	if n, _ := fmt.Sscanf(text, "\x1b[%dA", &up); n == 1 {
		s.row -= up
		text = text[strings.Index(text, "A")+1:]
	}
	rest := strings.HasSuffix(text, "\x1b[J")
	text = strings.TrimSuffix(text, "\x1b[J")
	for _, l := range strings.SplitAfter(text, "\n") {
		if l == "" {
			continue
		}
		if s.row == len(s.lines) {
			s.lines = append(s.lines, "")
		}
		s.lines[s.row] = strings.TrimSuffix(strings.TrimPrefix(l, "\r\x1b[K"), "\n")
		s.row++
	}
	if rest {
		s.lines = s.lines[:s.row]
	}
	return len(p), nil
}

func TestRedrawsInPlace(t *testing.T) {
	for _, c := range []struct {
		name          string
		width, height int
		want          []string
	}{
		{"room for all", 80, 24, []string{"✓ checks  3 ms", "✓ web     2 of 2 ready", "✗ db      exit code 1"}},
		{"narrow", 16, 24, []string{"✓ checks  3 ms", "✓ web     2 of…", "✗ db      exit…"}},
		{"low: what is done gives way", 80, 3, []string{"✗ db      exit code 1", "✓ and 2 more"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := &screen{lines: []string{"$ tutti up"}, row: 1}
			story(&Display{out: s, size: func() (int, int) { return c.width, c.height }})
			want := append([]string{"$ tutti up"}, c.want...)
			if strings.Join(s.lines, "\n") != strings.Join(want, "\n") {
				t.Errorf("got:\n%s\nwant:\n%s", strings.Join(s.lines, "\n"), strings.Join(want, "\n"))
			}
		})
	}
}

func TestCloseLeavesTheScreen(t *testing.T) {
	s := &screen{}
	d := &Display{out: s, size: func() (int, int) { return 80, 24 }}
	d.Update("a", Done, "")
	d.Close()
	d.Update("b", Done, "")
	if got := strings.Join(s.lines, "|"); got != "✓ a|✓ b" {
		t.Errorf("got %s", got)
	}
}

func TestOnlyWhatDiffersIsWritten(t *testing.T) {
	for _, c := range []struct {
		name     string
		old, new []string
		want     string
	}{
		{"nothing", []string{"a", "b"}, []string{"a", "b"}, ""},
		{"at first", nil, []string{"a", "b"}, "\x1b[H\x1b[J\x1b[1Ha\x1b[K\x1b[2Hb\x1b[K"},
		{"one line", []string{"a", "b", "c"}, []string{"a", "x", "c"}, "\x1b[2Hx\x1b[K"},
		{"one line more", []string{"a"}, []string{"a", "b"}, "\x1b[2Hb\x1b[K"},
		{"one line less", []string{"a", "b"}, []string{"a"}, "\x1b[2H\x1b[J"},
	} {
		want := c.want
		if want != "" {
			want = "\x1b[?2026h" + want + "\x1b[?2026l"
		}
		if got := change(c.old, c.new); got != want {
			t.Errorf("%s: got %q, want %q", c.name, got, want)
		}
	}
}
