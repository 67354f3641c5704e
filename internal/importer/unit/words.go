package unit

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// split takes a value apart as systemd does: at white space, with quotes of
// both kinds and the escapes of C (systemd.service(5), systemd.syntax(7)).
// closed says that every quote is.
func split(s string) (all []string, closed bool) {
	var (
		word  strings.Builder
		began bool
		quote byte
	)
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c == '\\' && i+1 < len(s):
			text, n := unescape(s[i+1:])
			word.WriteString(text)
			i, began = i+n, true
		case quote != 0:
			if c == quote {
				quote = 0
			} else {
				word.WriteByte(c)
			}
		case c == '"' || c == '\'':
			quote, began = c, true
		case strings.IndexByte(" \t\n\r", c) >= 0:
			if began {
				all = append(all, word.String())
				word.Reset()
			}
			began = false
		default:
			word.WriteByte(c)
			began = true
		}
	}
	if began {
		all = append(all, word.String())
	}
	return all, quote == 0
}

var simple = map[byte]string{'a': "\a", 'b': "\b", 'f': "\f", 'n': "\n", 'r': "\r", 't': "\t", 'v': "\v", 's': " "}

// unescape reads what follows a backslash, and how much of it that was. What
// is no escape stays as it is.
func unescape(s string) (text string, length int) {
	number := func(from, digits, base, bits int) (string, int) {
		if len(s) < from+digits {
			return "\\" + s[:1], 1
		}
		n, err := strconv.ParseUint(s[from:from+digits], base, bits)
		if err != nil {
			return "\\" + s[:1], 1
		}
		if digits > 3 {
			return string(utf8.AppendRune(nil, rune(n))), from + digits
		}
		return string([]byte{byte(n)}), from + digits
	}
	switch c := s[0]; {
	case simple[c] != "":
		return simple[c], 1
	case strings.IndexByte("\\\"' ", c) >= 0:
		return string(c), 1
	case c == 'x':
		return number(1, 2, 16, 8)
	case c == 'u':
		return number(1, 4, 16, 32)
	case c == 'U':
		return number(1, 8, 16, 32)
	case c >= '0' && c <= '3':
		return number(0, 3, 8, 8)
	}
	return "\\" + s[:1], 1
}

// assignments reads a file of variables (EnvironmentFile of systemd.exec(5)):
// like a shell's, but nothing is expanded. closed says that every quote is.
func assignments(text string) (all [][2]string, closed bool) {
	text = strings.ReplaceAll(text, "\\\n", "")
	for len(text) > 0 {
		var line string
		line, text, _ = strings.Cut(text, "\n")
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			continue // systemd does not look at it either
		}
		value = strings.TrimSpace(value)
		plain, closed := unquoted(value)
		for !closed && text != "" { // a quoted value may have several lines
			var more string
			more, text, _ = strings.Cut(text, "\n")
			value += "\n" + more
			plain, closed = unquoted(value)
		}
		if !closed {
			return nil, false
		}
		all = append(all, [2]string{strings.TrimSpace(name), plain})
	}
	return all, true
}

// unquoted takes the quotes off a value. In single quotes everything is
// itself; elsewhere a backslash makes the next character itself.
func unquoted(value string) (plain string, closed bool) {
	var b strings.Builder
	var quote byte
	for i := 0; i < len(value); i++ {
		c := value[i]
		switch {
		case c == '\\' && quote != '\'' && i+1 < len(value):
			i++
			if quote == '"' && strings.IndexByte("\"\\`$", value[i]) < 0 {
				b.WriteByte('\\')
			}
			b.WriteByte(value[i])
		case quote != 0 && c == quote:
			quote = 0
		case quote == 0 && (c == '"' || c == '\''):
			quote = c
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), quote == 0
}
