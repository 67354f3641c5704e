// Package importer turns what a machine runs without tutti into manifests of
// Kubernetes: the packages below it read units of systemd and processes that
// run, this one holds what their manifests have in common. It only
// translates: nothing is applied, started or stopped.
package importer

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"
)

// Manifest is objects of Kubernetes with what stands above them.
type Manifest struct {
	// Title says what the objects are made of; Steps what to do before they
	// are applied.
	Title string
	Steps []string
	// Notes are what the objects do not say, or say otherwise.
	Notes Notes
	// Image are the files that an image of the program would need, as far as
	// they are known.
	Image   []string
	Objects []runtime.Object
}

// Note tells what became of a setting that has no equivalent, or not the same.
type Note struct {
	Setting string // as it was found
	Text    string // why, and what to use instead
}

func (n Note) String() string { return n.Setting + ": " + n.Text }

// Notes are in the order in which they came up.
type Notes []Note

// Add adds a note. Settings that have the same to be said of them share one.
func (n *Notes) Add(setting, format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	for i := range *n {
		if (*n)[i].Text != text {
			continue
		}
		if !slices.Contains(strings.Split((*n)[i].Setting, ", "), setting) {
			(*n)[i].Setting += ", " + setting
		}
		return
	}
	*n = append(*n, Note{setting, text})
}

// Write writes the objects as YAML, below comments that say the rest.
func (m Manifest) Write(w io.Writer) error {
	var b strings.Builder
	comment := func(format string, args ...any) {
		for line := range strings.SplitSeq(fmt.Sprintf(format, args...), "\n") {
			b.WriteString(strings.TrimRight("# "+line, " ") + "\n")
		}
	}
	comment("%s", m.Title)
	for _, s := range m.Steps {
		comment("%s", s)
	}
	if len(m.Notes) > 0 {
		comment("Without an equivalent, or with another one:")
		for _, n := range m.Notes {
			comment("- %s", strings.ReplaceAll(n.String(), "\n", " "))
		}
	}
	if len(m.Image) > 0 {
		comment("What an image of it would have to hold:")
		for _, f := range m.Image {
			comment("- %s", f)
		}
	}
	for i, o := range m.Objects {
		if i > 0 {
			b.WriteString("---\n")
		}
		text, err := marshal(o)
		if err != nil {
			return fmt.Errorf("write %T: %w", o, err)
		}
		b.Write(text)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// marshal leaves out what only a server fills in.
func marshal(o runtime.Object) ([]byte, error) {
	fields, err := runtime.DefaultUnstructuredConverter.ToUnstructured(o)
	if err != nil {
		return nil, err
	}
	delete(fields, "status")
	prune(fields)
	return yaml.Marshal(fields)
}

// prune removes fields that are nothing when they are empty, such as a
// template's time of creation. An empty emptyDir is something.
func prune(v any) {
	switch v := v.(type) {
	case map[string]any:
		for name, field := range v {
			prune(field)
			m, isMap := field.(map[string]any)
			if field == nil || isMap && len(m) == 0 && name != "emptyDir" && name != "podSelector" && name != "labelSelector" {
				delete(v, name)
			}
		}
	case []any:
		for _, e := range v {
			prune(e)
		}
	}
}
