package rules

import (
	"go/ast"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/component-base/featuregate"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	podutil "k8s.io/kubernetes/pkg/api/pod"
	"k8s.io/kubernetes/pkg/apis/core"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	_ "k8s.io/kubernetes/pkg/features"
)

// A row of docs/pod.md: what becomes of a field, and which tests show it.
type fieldRow struct {
	fields []string // Type.field
	here   string
	shown  []string // TestName, TestName/sub
}

// kind is the first word of what becomes of a field.
func (r fieldRow) kind() string {
	return strings.FieldsFunc(r.here, func(c rune) bool { return strings.ContainsRune(" :,;", c) })[0]
}

var quoted = regexp.MustCompile("`([^`]+)`")

// Who settles a field. What others do is otherKinds to show; what this machine
// does or refuses needs a test here.
var (
	ownKinds   = []string{"honoured", "refused", "agent"}
	otherKinds = []string{"scheduler", "API", "controllers", "nobody", "off"}
)

func fieldRows(t *testing.T) []fieldRow {
	t.Helper()
	text, err := os.ReadFile("../../docs/pod.md")
	if err != nil {
		t.Fatal(err)
	}
	var rows []fieldRow
	for _, m := range regexp.MustCompile("(?m)^\\| (`.+?`) \\| (.+?) \\| (.*?) ?\\|$").FindAllStringSubmatch(string(text), -1) {
		row := fieldRow{here: m[2]}
		for _, f := range quoted.FindAllStringSubmatch(m[1], -1) {
			row.fields = append(row.fields, f[1])
		}
		for _, s := range quoted.FindAllStringSubmatch(m[3], -1) {
			row.shown = append(row.shown, s[1])
		}
		rows = append(rows, row)
	}
	return rows
}

// walk goes through the fields of a type of the core API and below them. has
// says whether a field has a row. One that only holds others needs none if
// they have theirs, and one that has a row needs none for what it holds.
func walk(at reflect.Type, seen map[reflect.Type]bool, has func(field string) bool, missing func(field string)) {
	for at.Kind() == reflect.Pointer || at.Kind() == reflect.Slice {
		at = at.Elem()
	}
	if seen[at] {
		return
	}
	seen[at] = true
	for i := range at.NumField() {
		f := at.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		of := f.Type
		for of.Kind() == reflect.Pointer || of.Kind() == reflect.Slice {
			of = of.Elem()
		}
		field := at.Name() + "." + name
		settled, holds := name != "" && has(field), of.Kind() == reflect.Struct && of.PkgPath() == at.PkgPath()
		if !settled && !holds {
			missing(field)
		}
		if holds && (!settled || anyField(of, has)) {
			walk(of, seen, has, missing)
		}
	}
}

func anyField(of reflect.Type, has func(string) bool) bool {
	for i := range of.NumField() {
		name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
		if name != "" && has(of.Name()+"."+name) {
			return true
		}
	}
	return false
}

// Every field of a pod, of its status and of a node has a row in docs/pod.md,
// and every row a field.
func TestEveryFieldOfAPodIsSettled(t *testing.T) {
	rows := map[string]bool{}
	for _, r := range fieldRows(t) {
		for _, f := range r.fields {
			if _, twice := rows[f]; twice {
				t.Errorf("docs/pod.md has two rows for %s", f)
			}
			rows[f] = false
		}
	}
	seen := map[reflect.Type]bool{}
	for _, at := range []reflect.Type{
		reflect.TypeFor[corev1.PodSpec](), reflect.TypeFor[corev1.PodStatus](),
		reflect.TypeFor[corev1.NodeSpec](), reflect.TypeFor[corev1.NodeStatus](),
	} {
		walk(at, seen, func(field string) bool {
			_, ok := rows[field]
			if ok {
				rows[field] = true
			}
			return ok
		}, func(field string) { t.Errorf("docs/pod.md has no row for %s", field) })
	}
	for f, reached := range rows {
		if !reached {
			t.Errorf("docs/pod.md has a row for %s, which is no field, or one that another row settles", f)
		}
	}
}

// What is said to be honoured or refused is shown by tests, and a refusal is
// told in the words of the table.
func TestEveryFieldOfAPodIsShown(t *testing.T) {
	for _, r := range fieldRows(t) {
		f := r.fields[0]
		if !slices.Contains(append(ownKinds, otherKinds...), r.kind()) {
			t.Errorf("docs/pod.md says of %s %q: begin with one of %s", f, r.here, append(ownKinds, otherKinds...))
		}
		if slices.Contains(ownKinds, r.kind()) && len(r.shown) == 0 {
			t.Errorf("docs/pod.md names no test for %s", f)
		}
		var said []string
		for _, name := range r.shown {
			strings, ok := inTest(t, name)
			if !ok {
				t.Errorf("docs/pod.md names %s for %s, and there is no such test", name, f)
			}
			said = append(said, strings...)
		}
		if r.kind() != "refused" {
			continue
		}
		message := quoted.FindStringSubmatch(r.here)
		if message == nil || !slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, message[1]) }) {
			t.Errorf("docs/pod.md says that %s is %s, and no test that it names says so", f, r.here)
		}
	}
}

// inTest returns every string of the files with a test, given as TestName,
// TestName/sub or package.TestName, and whether there is such a test.
func inTest(t *testing.T, test string) (said []string, found bool) {
	t.Helper()
	files, err := source()
	if err != nil {
		t.Fatal(err)
	}
	test, sub, _ := strings.Cut(test, "/")
	pkg, name, ok := strings.Cut(test, ".")
	if !ok {
		pkg, name = "", test
	}
	for path, f := range files {
		if !strings.HasSuffix(path, "_test.go") || pkg != "" && f.Name.Name != pkg || !slices.ContainsFunc(f.Decls, func(d ast.Decl) bool {
			fn, ok := d.(*ast.FuncDecl)
			return ok && fn.Name.Name == name && fn.Recv == nil
		}) {
			continue
		}
		var here []string
		ast.Inspect(f, func(n ast.Node) bool {
			if e, ok := n.(ast.Expr); ok {
				if text := literal(e); text != "%v" {
					here = append(here, text)
				}
			}
			return true
		})
		_, err := os.Stat(filepath.Join(filepath.Dir(path), "testdata", sub))
		if sub == "" || err == nil || slices.Contains(here, sub) {
			said, found = append(said, here...), true
		}
	}
	return said, found
}

// What is off is behind a gate that is off, and the API server forgets it.
func TestFieldsThatAreOff(t *testing.T) {
	off := map[string]bool{}
	for _, r := range fieldRows(t) {
		if r.kind() != "off" {
			continue
		}
		gate := featuregate.Feature(quoted.FindStringSubmatch(r.here)[1])
		if _, known := utilfeature.DefaultMutableFeatureGate.GetAll()[gate]; !known || utilfeature.DefaultFeatureGate.Enabled(gate) {
			t.Errorf("docs/pod.md says that %s is %s: there is no such gate, or it is on", r.fields[0], r.here)
		}
		for _, f := range r.fields {
			off[f] = true
		}
	}
	p := corev1.Pod{}
	if n := fill(reflect.ValueOf(&p.Spec).Elem(), off); n == 0 {
		t.Fatal("docs/pod.md has no field of a pod that is off")
	}
	var inner core.Pod
	if err := legacyscheme.Scheme.Convert(&p, &inner, nil); err != nil {
		t.Fatal(err)
	}
	podutil.DropDisabledPodFields(&inner, nil)
	var kept corev1.Pod
	if err := legacyscheme.Scheme.Convert(&inner, &kept, nil); err != nil {
		t.Fatal(err)
	}
	for _, f := range filled(reflect.ValueOf(kept.Spec), off) {
		t.Errorf("docs/pod.md says that %s is off, and the API server keeps it", f)
	}
}

// fill sets the named fields of a value, and what is on the way to them, and
// returns how many it has set.
func fill(v reflect.Value, names map[string]bool) (n int) {
	switch v.Kind() {
	case reflect.Pointer:
		made := reflect.New(v.Type().Elem())
		if n = fill(made.Elem(), names); n > 0 {
			v.Set(made)
		}
	case reflect.Slice:
		made := reflect.MakeSlice(v.Type(), 1, 1)
		if n = fill(made.Index(0), names); n > 0 {
			v.Set(made)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			f := v.Type().Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case names[v.Type().Name()+"."+name]:
				v.Field(i).Set(reflect.New(f.Type.Elem()))
				n++
			case f.Type.PkgPath() == v.Type().PkgPath() || f.Type.Kind() == reflect.Pointer || f.Type.Kind() == reflect.Slice:
				n += fill(v.Field(i), names)
			}
		}
	}
	return n
}

// filled are the named fields that are set in a value.
func filled(v reflect.Value, names map[string]bool) (set []string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			set = filled(v.Elem(), names)
		}
	case reflect.Slice:
		for i := range v.Len() {
			set = append(set, filled(v.Index(i), names)...)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("json"), ",")
			if field := v.Type().Name() + "." + name; names[field] && !v.Field(i).IsZero() {
				set = append(set, field)
			}
			set = append(set, filled(v.Field(i), names)...)
		}
	}
	return set
}
