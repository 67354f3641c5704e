package compose

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/schema"
)

var update = flag.Bool("update", false, "write golden files and docs/compose.md")

// Every key that the specification has stands in the table, and every key of
// the table is one that the specification or the library has.
func TestEveryKeyIsInATable(t *testing.T) {
	var root map[string]any
	if err := json.Unmarshal([]byte(schema.Schema), &root); err != nil {
		t.Fatal(err)
	}
	paths := map[string]bool{}
	walkSchema(root, root, nil, paths)
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		if _, ok, deeper := lookup(path); !ok && !deeper && !ruled(path) {
			t.Errorf("%s stands in no table", path)
		}
	}
	if len(paths) < 200 {
		t.Fatalf("only %d keys were found in the schema", len(paths))
	}
}

// ruled says whether a key above decides for this one.
func ruled(path string) bool {
	for i := strings.LastIndex(path, "."); i > 0; i = strings.LastIndex(path, ".") {
		path = path[:i]
		if _, ok := keys[path]; ok {
			return true
		}
	}
	return false
}

// walkSchema lists the keys of a JSON schema, "*" for names and positions.
func walkSchema(root, node map[string]any, path []string, found map[string]bool) {
	if len(path) > 8 {
		return
	}
	if ref, ok := node["$ref"].(string); ok {
		defs := root["$defs"].(map[string]any)
		walkSchema(root, defs[strings.TrimPrefix(ref, "#/$defs/")].(map[string]any), path, found)
	}
	for _, several := range []string{"oneOf", "anyOf", "allOf"} {
		list, _ := node[several].([]any)
		for _, one := range list {
			walkSchema(root, one.(map[string]any), path, found)
		}
	}
	visit := func(name string, child any) {
		below := append(slices.Clip(path), name)
		if name != "*" {
			found[strings.Join(below, ".")] = true
		}
		if child, ok := child.(map[string]any); ok && !ruled(strings.Join(below, ".")) {
			walkSchema(root, child, below, found)
		}
	}
	properties, _ := node["properties"].(map[string]any)
	for name, child := range properties {
		visit(name, child)
	}
	patterns, _ := node["patternProperties"].(map[string]any)
	for pattern, child := range patterns {
		if pattern != "^x-" {
			visit("*", child)
		}
	}
	if items, ok := node["items"].(map[string]any); ok {
		visit("*", items)
	}
}

// docs/compose.md shows the tables.
func TestDocs(t *testing.T) {
	const page = "../../../docs/compose.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	const begin, end = "<!-- The tables are written by `go test ./internal/app/compose -update`. -->\n", "<!-- End of the tables. -->\n"
	before, rest, ok := strings.Cut(string(text), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatal("docs/compose.md has lost the place of its tables")
	}
	want := before + begin + tables() + end + after
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	} else if want != string(text) {
		t.Error("docs/compose.md is not what the table says; run `go test ./internal/app/compose -update`")
	}
}

func tables() string {
	var b strings.Builder
	for _, part := range []struct {
		standing
		title, column string
	}{{same, "Does what Compose does", ""}, {better, "Does it better", "how"}, {refused, "Refused", "why, and what to do instead"}} {
		fmt.Fprintf(&b, "\n## %s\n| key | %s |\n|---|---|\n", part.title, part.column)
		for _, name := range slices.Sorted(maps.Keys(keys)) {
			if k := keys[name]; k.standing == part.standing {
				fmt.Fprintf(&b, "| `%s` | %s |\n", name, k.text)
			}
		}
	}
	b.WriteString("\n")
	return b.String()
}
