package compose

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// source finds the lines of keys in the files as people wrote them.
type source []file

type file struct {
	path string
	root *yaml.Node
}

// readSource leaves out what cannot be read: it serves only messages.
func readSource(paths []string) source {
	var s source
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		doc := &yaml.Node{}
		if yaml.Unmarshal(text, doc) == nil && len(doc.Content) == 1 {
			s = append(s, file{path, doc.Content[0]})
		}
	}
	return s
}

// at is where the key stands: "compose.yaml:12: services.web.gpus". Of a key
// that was not written there, such as one that came by extends, it is the
// nearest that was. The last file wins, as its value does.
func (s source) at(path ...string) string {
	where, depth := "", -1
	for _, f := range s {
		line, n := f.line(path)
		if n >= depth {
			where, depth = fmt.Sprintf("%s:%d: ", f.path, line), n
		}
	}
	return where + strings.Join(path, ".")
}

// line is where the path leads and how far it could be followed.
func (f file) line(path []string) (line, depth int) {
	node := f.root
	line = node.Line
	for i, key := range path {
		for node.Kind == yaml.AliasNode {
			node = node.Alias
		}
		var next *yaml.Node
		switch node.Kind {
		case yaml.MappingNode:
			for j := 0; j+1 < len(node.Content); j += 2 {
				if node.Content[j].Value == key {
					next, line = node.Content[j+1], node.Content[j].Line
				}
			}
		case yaml.SequenceNode:
			if n, err := strconv.Atoi(key); err == nil && n < len(node.Content) {
				next = node.Content[n]
				line = next.Line
			}
		}
		if next == nil {
			return line, i
		}
		node = next
	}
	return line, len(path)
}
