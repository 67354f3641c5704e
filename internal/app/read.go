package app

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/kustomize/api/krusty"
	"sigs.k8s.io/kustomize/kyaml/filesys"
	sigsyaml "sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/app/compose"
)

// Read reads an application from a compose file, a file of objects, a folder
// (its kustomization, its compose file, or its YAML and JSON files), or stdin
// when path is "-". Its name is name if that is not empty; else the label
// app.kubernetes.io/part-of when all objects that have it agree; else the
// folder's or file's name.
func Read(ctx context.Context, path, name string, stdin io.Reader) (Application, error) {
	if file, err := composeFile(path); err != nil {
		return Application{}, err
	} else if file != "" {
		return readCompose(ctx, file, name)
	}
	var (
		objects []Object
		err     error
	)
	fallback := ""
	if path == "-" {
		objects, err = decode("standard input", stdin)
	} else {
		fallback, err = nameOf(path)
		if err == nil {
			objects, err = readPath(path)
		}
	}
	if err != nil {
		return Application{}, err
	}
	if len(objects) == 0 {
		return Application{}, fmt.Errorf("%s holds no objects; write Kubernetes objects as YAML into it", display(path))
	}
	if name == "" {
		if name, err = partOf(objects); err != nil {
			return Application{}, fmt.Errorf("%s: %w", display(path), err)
		}
	}
	if name == "" {
		name = fallback
	}
	if name = CleanName(name); name == "" {
		return Application{}, fmt.Errorf("%s names no application; pass --name, or label its objects %s", display(path), api.LabelPartOf)
	}
	return Application{Name: name, Objects: objects, Source: display(path)}, distinct(objects)
}

// kustomizations are the names of a kustomization's file.
var kustomizations = []string{"kustomization.yaml", "kustomization.yml", "Kustomization"}

// composeFile is the compose file that path means, "" when it means none.
func composeFile(path string) (string, error) {
	if path == "-" {
		return "", nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", notThere(path, err)
	}
	if info.IsDir() {
		for _, k := range kustomizations {
			if _, err := os.Stat(filepath.Join(path, k)); err == nil {
				return "", nil
			}
		}
		return compose.Find(path), nil
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return "", notThere(path, err)
	}
	var top map[string]any
	if sigsyaml.Unmarshal(text, &top) != nil {
		return "", nil // whoever reads it says what is wrong
	}
	_, services := top["services"]
	_, include := top["include"]
	if (services || include) && top["apiVersion"] == nil && top["kind"] == nil {
		return path, nil
	}
	return "", nil
}

// HasCompose says whether a folder has a compose file.
func HasCompose(dir string) bool { return compose.Find(dir) != "" }

// readCompose reads a compose file with the environment of this process. Its
// project is the namespace too.
func readCompose(ctx context.Context, file, name string) (Application, error) {
	project, err := compose.Load(ctx, file, compose.Options{Name: name, Environment: os.Environ()})
	if err != nil {
		return Application{}, err
	}
	list, err := project.Objects()
	if err != nil {
		return Application{}, err
	}
	a := Application{Name: CleanName(project.Name()), Source: file}
	a.Namespace = a.Name
	for _, u := range list {
		a.Objects = append(a.Objects, Object{Unstructured: u, File: file})
	}
	if len(a.Objects) == 0 {
		return a, fmt.Errorf("%s has no service; add one under services", file)
	}
	return a, distinct(a.Objects)
}

func display(path string) string {
	if path == "-" {
		return "standard input"
	}
	return path
}

// nameOf is the last part of the absolute path without its extension.
func nameOf(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	info, err := os.Stat(abs)
	if err != nil {
		return "", notThere(path, err)
	}
	base := filepath.Base(abs)
	if !info.IsDir() {
		base = strings.TrimSuffix(base, filepath.Ext(base))
	}
	return base, nil
}

func notThere(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not exist; check the path", path)
	}
	return fmt.Errorf("read %s: %w", path, errors.Unwrap(err))
}

func readPath(path string) ([]Object, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, notThere(path, err)
	}
	if !info.IsDir() {
		return readFile(path)
	}
	for _, k := range kustomizations {
		if _, err := os.Stat(filepath.Join(path, k)); err == nil {
			return kustomize(path)
		}
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, notThere(path, err)
	}
	var objects []Object
	for _, e := range entries { // ReadDir sorts by name
		if e.IsDir() || strings.HasPrefix(e.Name(), ".") || !slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(e.Name())) {
			continue
		}
		some, err := readFile(filepath.Join(path, e.Name()))
		if err != nil {
			return nil, err
		}
		objects = append(objects, some...)
	}
	return objects, nil
}

func readFile(path string) ([]Object, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, notThere(path, err)
	}
	defer f.Close()
	return decode(path, f)
}

// unresolved is how kustomize says, in several ways at once, that a file it
// was told of is not there.
var unresolved = regexp.MustCompile(`lstat (.+?): no such file or directory`)

func kustomize(dir string) ([]Object, error) {
	made, err := krusty.MakeKustomizer(krusty.MakeDefaultOptions()).Run(filesys.MakeFsOnDisk(), dir)
	if err != nil {
		if missing := unresolved.FindStringSubmatch(err.Error()); missing != nil {
			return nil, fmt.Errorf("%s does not exist, but a kustomization below %s names it; make it, or take it out", missing[1], dir)
		}
		return nil, fmt.Errorf("%s: %s", dir, oneLine(err.Error()))
	}
	text, err := made.AsYaml()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return decode(dir, bytes.NewReader(text))
}

// decode reads a stream of documents. A key that appears twice is an error.
func decode(file string, r io.Reader) ([]Object, error) {
	var objects []Object
	docs := yaml.NewYAMLReader(bufio.NewReader(r))
	for n := 1; ; n++ {
		doc, err := docs.Read()
		if err == io.EOF {
			return objects, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		some, err := decodeOne(file, doc)
		if err != nil {
			return nil, fmt.Errorf("%s: document %d: %w", file, n, err)
		}
		objects = append(objects, some...)
	}
}

func decodeOne(file string, doc []byte) ([]Object, error) {
	json, err := sigsyaml.YAMLToJSONStrict(doc)
	if err != nil {
		return nil, yamlError(err)
	}
	if bytes.Equal(bytes.TrimSpace(json), []byte("null")) {
		return nil, nil // only comments
	}
	if json[0] != '{' {
		return nil, errors.New("is not an object; it needs apiVersion, kind and metadata")
	}
	u := &unstructured.Unstructured{}
	if err := u.UnmarshalJSON(json); err != nil {
		return nil, wrongObject(json)
	}
	if u.IsList() {
		list, err := u.ToList()
		if err != nil {
			return nil, err
		}
		// Of a ConfigMapList every item is a ConfigMap, said or not.
		kind := strings.TrimSuffix(u.GetKind(), "List")
		for i := range list.Items {
			if item := &list.Items[i]; kind != "" && item.GetKind() == "" && item.GetAPIVersion() == "" {
				item.SetAPIVersion(u.GetAPIVersion())
				item.SetKind(kind)
			}
		}
		var objects []Object
		for i := range list.Items {
			some, err := check(file, &list.Items[i])
			if err != nil {
				return nil, err
			}
			objects = append(objects, some)
		}
		return objects, nil
	}
	o, err := check(file, u)
	return []Object{o}, err
}

func check(file string, u *unstructured.Unstructured) (Object, error) {
	switch {
	case u.GetAPIVersion() == "":
		return Object{}, errors.New("has no apiVersion; `tutti kubectl explain KIND` tells it")
	case u.GetKind() == "":
		return Object{}, errors.New("has no kind; every object needs one, such as Deployment")
	case u.GetName() == "":
		return Object{}, fmt.Errorf("%s has no metadata.name; give it one", u.GetKind())
	}
	return Object{Unstructured: u, File: file}, nil
}

// wrongObject says in a person's words what UnmarshalJSON disliked.
func wrongObject(json []byte) error {
	var m map[string]any
	if err := sigsyaml.Unmarshal(json, &m); err != nil {
		return yamlError(err)
	}
	if _, compose := m["services"]; compose && m["kind"] == nil {
		return errors.New("is a compose file, which cannot stand among objects; give it alone")
	}
	if m["apiVersion"] == nil {
		return errors.New("has no apiVersion; `tutti kubectl explain KIND` tells it")
	}
	return errors.New("has no kind; every object needs one, such as Deployment")
}

// yamlError strips what the libraries put in front of the useful part.
func yamlError(err error) error {
	text := strings.TrimPrefix(err.Error(), "error converting YAML to JSON: ")
	text = strings.TrimPrefix(text, "yaml: unmarshal errors:\n")
	return errors.New(strings.Join(strings.Fields(text), " "))
}

// partOf is the application's name by the objects' own labels, "" when none
// has one, an error when they disagree.
func partOf(objects []Object) (string, error) {
	name := ""
	for _, o := range objects {
		switch l := o.GetLabels()[api.LabelPartOf]; {
		case l == "" || l == name:
		case name == "":
			name = l
		default:
			return "", fmt.Errorf("objects are part of two applications, %s and %s; deploy them apart or pass --name", name, l)
		}
	}
	return name, nil
}

// distinct refuses an object that is given twice: the last would win silently.
func distinct(objects []Object) error {
	seen := map[string]string{}
	for _, o := range objects {
		key := o.groupKind().String() + "/" + o.GetNamespace() + "/" + o.GetName()
		if first, twice := seen[key]; twice {
			return o.errorf("is given twice, first in %s; remove one", first)
		}
		seen[key] = o.File
	}
	return nil
}
