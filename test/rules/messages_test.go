package rules

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// speaking are the rooms whose errors, refusals and events reach people: at
// the terminal, in the log, in `kubectl describe`.
var speaking = []string{"agent", "api", "app", "cli", "controlplane", "daemon", "image", "importer", "network", "proxy", "runtime", "volume"}

// speakers make messages: of the strings they are given, the first that is
// more than a word.
var speakers = regexp.MustCompile(`^(errors\.New|fmt\.Errorf|http\.Error|\w*\.?(misusef|errorf|failed|damaged|[eE]vent|Eventf))$`)

// A message is what is told to a person. What only says what was being done
// and passes on an error ("load image %s: %w") is none: the error in it is.
type message struct {
	room string
	at   string // file:line
	text string // with its verbs
}

var (
	words   = regexp.MustCompile(`[a-z] [a-z]`)
	context = regexp.MustCompile(`: %[wsv]$`)
	verb    = regexp.MustCompile(`%(\[\d+\])?[-+# 0]*[\d.]*[a-zA-Z]`)
)

// pattern finds the message wherever it is told, whatever it is told of.
func (m message) pattern() *regexp.Regexp {
	parts := verb.Split(m.text, -1)
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return regexp.MustCompile(strings.Join(parts, ".*"))
}

// cures tells whether the message goes on, after a semicolon, to say what to
// do.
func (m message) cures() bool { return strings.Contains(m.text, "; ") }

// source parses every Go file of our own once.
var source = sync.OnceValues(func() (map[string]*ast.File, error) {
	all := map[string]*ast.File{}
	for _, dir := range []string{"../../internal", "../e2e"} {
		err := filepath.WalkDir(dir, func(name string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(name, ".go") {
				all[name], err = parser.ParseFile(positions, name, nil, parser.SkipObjectResolution)
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return all, nil
})

var positions = token.NewFileSet()

func messages(t *testing.T) []message {
	t.Helper()
	files, err := source()
	if err != nil {
		t.Fatal(err)
	}
	var all []message
	for name, f := range files {
		room, _, _ := strings.Cut(strings.TrimPrefix(name, "../../internal/"), "/")
		if strings.HasSuffix(name, "_test.go") || !slices.Contains(speaking, room) {
			continue
		}
		ast.Inspect(f, func(n ast.Node) bool {
			if m := (message{text: said(n)}); m.cures() || words.MatchString(m.text) && !context.MatchString(m.text) {
				at := positions.Position(n.Pos())
				m.room, m.at = room, fmt.Sprintf("%s:%d", strings.TrimPrefix(at.Filename, "../../"), at.Line)
				all = append(all, m)
			}
			return true
		})
	}
	slices.SortFunc(all, func(a, b message) int { return strings.Compare(a.at, b.at) })
	return all
}

// said is the text of the message that a node makes, "" if it makes none.
func said(n ast.Node) string {
	switch n := n.(type) {
	case *ast.CallExpr:
		if speakers.MatchString(name(n.Fun)) {
			for _, a := range n.Args {
				if text := literal(a); strings.Contains(text, " ") {
					return text
				}
			}
		}
	case *ast.KeyValueExpr: // of a refusal, a condition
		if name(n.Key) == "Message" {
			return literal(n.Value)
		}
	case *ast.ReturnStmt: // of what another makes a message
		for _, r := range n.Results {
			if text := literal(r); strings.Contains(text, "; ") {
				return text
			}
		}
	}
	return ""
}

// name is a function's or field's name with what it is of: "fmt.Errorf".
func name(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		if of := name(e.X); of != "" {
			return of[strings.LastIndex(of, ".")+1:] + "." + e.Sel.Name
		}
		return e.Sel.Name
	}
	return ""
}

// literal is a string as it is written, with %v for what comes from elsewhere.
func literal(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
			return text
		}
	case *ast.BinaryExpr:
		if e.Op == token.ADD {
			return literal(e.X) + literal(e.Y)
		}
	case *ast.CallExpr:
		if name(e.Fun) == "fmt.Sprintf" {
			return literal(e.Args[0])
		}
	}
	return "%v"
}

// expected is every string that stands in a test or a golden file.
func expected(t *testing.T) string {
	t.Helper()
	files, err := source()
	if err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for name, f := range files {
		if strings.HasSuffix(name, "_test.go") {
			ast.Inspect(f, func(n ast.Node) bool {
				if e, ok := n.(ast.Expr); ok {
					if text := literal(e); strings.Trim(text, "%v") != "" {
						all.WriteString(text + "\n")
						return false
					}
				}
				return true
			})
		}
	}
	golden, err := filepath.Glob("../../internal/*/testdata/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range golden {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all.Write(text)
	}
	return all.String()
}

// What the rooms at the terminal say is the last word: it tells what to do.
func TestMessagesNameTheCure(t *testing.T) {
	for _, m := range messages(t) {
		if slices.Contains([]string{"api", "app", "cli", "daemon", "importer"}, m.room) && !m.cures() {
			t.Errorf("%s says %q: go on after a semicolon and say what to do", m.at, m.text)
		}
	}
}

// Every message that names a cure stands in a test, to its last word.
func TestMessagesAreTested(t *testing.T) {
	tests := expected(t)
	for _, m := range messages(t) {
		if m.cures() && !m.pattern().MatchString(tests) {
			t.Errorf("%s says %q, and no test expects it", m.at, m.text)
		}
	}
}

// docs/errors.md has an example of each message that names a cure, and no
// example of what is not told any more.
func TestMessagesAreExplained(t *testing.T) {
	text, err := os.ReadFile("../../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	var examples []string
	for _, m := range regexp.MustCompile("(?m)^- (`+) ?(.+?) ?(`+)$").FindAllStringSubmatch(string(text), -1) {
		examples = append(examples, m[2])
	}
	told := map[string]bool{}
	for _, m := range messages(t) {
		if !m.cures() {
			continue
		}
		i := slices.IndexFunc(examples, m.pattern().MatchString)
		if i < 0 {
			t.Errorf("%s says %q, and docs/errors.md has no example of it", m.at, m.text)
			continue
		}
		for _, e := range examples {
			told[e] = told[e] || m.pattern().MatchString(e)
		}
	}
	for _, e := range examples {
		if !told[e] {
			t.Errorf("docs/errors.md explains %q, which is not told any more", e)
		}
	}
}
