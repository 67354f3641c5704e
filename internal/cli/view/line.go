package view

import (
	"strings"
	"unicode"

	"golang.org/x/text/width"
)

// style is how a piece of text looks where there are colours.
type style string

const (
	plain  style = ""
	bold   style = "1"
	dim    style = "2"
	red    style = "31"
	green  style = "32"
	yellow style = "33"
)

// line is one line of the picture, in pieces.
type line []piece

type piece struct {
	text  string
	style style
}

// clean takes from a text what would move a terminal's cursor or do worse:
// messages come from programs that nobody here knows.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, s)
}

// columns is how many columns of a terminal a text takes.
func columns(s string) int {
	n := 0
	for _, r := range s {
		n += columnsOf(r)
	}
	return n
}

func columnsOf(r rune) int {
	if unicode.In(r, unicode.Mn, unicode.Me) {
		return 0
	}
	switch width.LookupRune(r).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// cut shortens a text to so many columns, and shows that it did.
func cut(s string, most int) string {
	if columns(s) <= most {
		return s
	}
	n := 0
	for i, r := range s {
		if n += columnsOf(r); n >= most && most > 0 {
			return s[:i] + "…"
		}
	}
	return "" // nothing fits
}

// wrap breaks a text between words into at most so many lines of so many
// columns; the last is cut.
func wrap(s string, most, lines int) []string {
	var out []string
	for lines > len(out)+1 && columns(s) > most {
		n, at := 0, 0
		for i, r := range s {
			if r == ' ' {
				at = i
			}
			if n += columnsOf(r); n > most {
				break
			}
		}
		if at == 0 {
			break
		}
		out = append(out, s[:at])
		s = s[at+1:]
	}
	return append(out, cut(s, most))
}

// render makes a line of at most so many columns (any number if that is 0)
// for a terminal.
func (l line) render(most int, colour bool) string {
	var b strings.Builder
	left := most
	for _, p := range l {
		text := p.text
		if most > 0 {
			text = cut(text, left)
			left -= columns(text)
		}
		switch {
		case text == "":
		case colour && p.style != plain:
			b.WriteString("\x1b[" + string(p.style) + "m" + text + "\x1b[0m")
		default:
			b.WriteString(text)
		}
	}
	return strings.TrimRight(b.String(), " ")
}
