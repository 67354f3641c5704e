package app

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// tree writes files into a new directory called name.
func tree(t *testing.T, name string, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), name)
	for f, text := range files {
		f = filepath.Join(dir, f)
		if err := os.MkdirAll(filepath.Dir(f), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const (
	configMap = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n"
	secret    = "apiVersion: v1\nkind: Secret\nmetadata: {name: b}\n"
	ofShop    = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: c, labels: {app.kubernetes.io/part-of: shop}}\n"
	ofBlog    = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: d, labels: {app.kubernetes.io/part-of: blog}}\n"
)

func TestRead(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		path  string // below the folder "My App"; "-" reads configMap
		call  string // --name
		app   string
		want  string // objects, or the error
	}{
		{"folder", map[string]string{"2.yaml": secret, "1.yml": configMap, "x.txt": "no", ".h.yaml": "[", "sub/3.yaml": "["}, "", "", "my-app", "ConfigMap a, Secret b"},
		{"file of several", map[string]string{"web.yaml": "# nothing\n---\n" + configMap + "---\n" + secret + "---\n"}, "web.yaml", "", "web", "ConfigMap a, Secret b"},
		{"JSON", map[string]string{"web.json": `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"j"}}`}, "web.json", "", "web", "ConfigMap j"},
		{"list", map[string]string{"l.yaml": "apiVersion: v1\nkind: List\nitems:\n- " + strings.ReplaceAll(strings.TrimSpace(configMap), "\n", "\n  ")}, "l.yaml", "", "l", "ConfigMap a"},
		{"list of one kind", map[string]string{"l.yaml": "apiVersion: v1\nkind: ConfigMapList\nitems:\n- metadata: {name: a}\n"}, "l.yaml", "", "l", "ConfigMap a"},
		{"line ends of Windows", map[string]string{"w.yaml": strings.ReplaceAll(configMap+"---\n---\n"+secret, "\n", "\r\n")}, "w.yaml", "", "w", "ConfigMap a, Secret b"},
		{"label names it", map[string]string{"1.yaml": configMap, "2.yaml": ofShop}, "", "", "shop", "ConfigMap a, ConfigMap c"},
		{"the caller names it", map[string]string{"1.yaml": ofBlog, "2.yaml": ofShop}, "", "Both Of Them", "both-of-them", "ConfigMap d, ConfigMap c"},
		{"kustomization", map[string]string{"kustomization.yaml": "namePrefix: x-\nresources: [a.yaml]\n", "a.yaml": configMap, "b.yaml": secret}, "", "", "my-app", "ConfigMap x-a"},
		{"stdin with a name", nil, "-", "it", "it", "ConfigMap a"},
		{"stdin without", nil, "-", "", "", "standard input names no application; pass --name, or label its objects app.kubernetes.io/part-of"},
		{"two labels", map[string]string{"1.yaml": ofBlog, "2.yaml": ofShop}, "", "", "", "objects are part of two applications, blog and shop; deploy them apart or pass --name"},
		{"nothing there", nil, "no", "", "", "no does not exist; check the path"},
		{"nothing in it", map[string]string{"readme": "x"}, "", "", "", " holds no objects; write Kubernetes objects as YAML into it"},
		{"no YAML", map[string]string{"a.yaml": "a: [b\n"}, "", "", "", "a.yaml: document 1: yaml: line 1"},
		{"a key twice", map[string]string{"a.yaml": configMap + "kind: Secret\n"}, "", "", "", `a.yaml: document 1: line 4: key "kind" already set in map`},
		{"no kind", map[string]string{"a.yaml": "apiVersion: v1\nmetadata: {name: a}\n"}, "", "", "", "a.yaml: document 1: has no kind; every object needs one, such as Deployment"},
		{"no apiVersion", map[string]string{"a.yaml": "kind: Pod\nmetadata: {name: a}\n"}, "", "", "", "has no apiVersion; `tutti kubectl explain KIND` tells it"},
		{"no name", map[string]string{"a.yaml": configMap + "---\napiVersion: v1\nkind: Pod\n"}, "", "", "", "document 2: Pod has no metadata.name; give it one"},
		{"compose", map[string]string{"compose.yaml": "services: {web: {image: x}}\n"}, "", "", "myapp", "Deployment web, Service web"},
		{"compose of nothing", map[string]string{"compose.yaml": "services: {}\n"}, "", "", "", "/compose.yaml has no service; add one under services"},
		{"compose among objects", map[string]string{"a.yaml": "services: {web: {image: x}}\n"}, "", "", "", "is a compose file, which cannot stand among objects; give it alone"},
		{"compose of another name", map[string]string{"a.yaml": "services: {web: {image: x}}\n"}, "a.yaml", "it", "it", "Deployment web, Service web"},
		{"only text", map[string]string{"a.yaml": "hello\n"}, "", "", "", "is not an object; it needs apiVersion, kind and metadata"},
		{"an object twice", map[string]string{"1.yaml": configMap, "2.yaml": configMap}, "", "", "", "2.yaml: ConfigMap a: is given twice, first in %s/1.yaml; remove one"},
		{"a kustomization of nothing", map[string]string{"kustomization.yaml": "resources: [a.yaml]\n"}, "", "", "", "%s/a.yaml does not exist, but a kustomization below %s names it; make it, or take it out"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := c.path
			if path != "-" {
				path = filepath.Join(tree(t, "My App", c.files), c.path)
			}
			a, err := Read(t.Context(), path, c.call, strings.NewReader(configMap))
			if err != nil {
				if want := strings.ReplaceAll(c.want, "%s", path); c.app != "" || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
					t.Errorf("error %q", err)
				}
				return
			}
			var got []string
			for _, o := range a.Objects {
				got = append(got, o.String())
			}
			if a.Name != c.app || strings.Join(got, ", ") != c.want {
				t.Errorf("got %s: %v", a.Name, got)
			}
		})
	}
}

func TestCleanName(t *testing.T) {
	for in, want := range map[string]string{
		"shop": "shop", "My Shop_2": "my-shop-2", "--": "", "ö": "", "a.b": "a-b", "-x-": "x",
		strings.Repeat("a", 70): strings.Repeat("a", 53),
	} {
		if got := CleanName(in); got != want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
}
