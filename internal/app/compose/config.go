package compose

import (
	"crypto/sha256"
	"encoding/hex"
	"maps"
	"os"
	"slices"
	"unicode/utf8"

	"github.com/compose-spec/compose-go/v2/types"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// configs makes configurations and secrets. The name of each has a digest of
// its content: another content is another object, which rolls out with the
// pods that use it, and comes back with them.
func (t *translation) configs() error {
	for _, name := range slices.Sorted(maps.Keys(t.project.Configs)) {
		c := types.FileObjectConfig(t.project.Configs[name])
		content, err := t.content("configs", name, c)
		if err != nil {
			return err
		}
		if c.External {
			t.files["configs."+name] = c.Name
			continue
		}
		o := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: addressed(name, content), Annotations: annotationsOf(c.Labels)}, Immutable: ptr.To(true)}
		if utf8.Valid(content) {
			o.Data = map[string]string{fileKey: string(content)}
		} else {
			o.BinaryData = map[string][]byte{fileKey: content}
		}
		t.files["configs."+name] = o.Name
		if err := t.add(o); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.project.Secrets)) {
		c := types.FileObjectConfig(t.project.Secrets[name])
		content, err := t.content("secrets", name, c)
		if err != nil {
			return err
		}
		if c.External {
			t.files["secrets."+name] = c.Name
			continue
		}
		o := &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: addressed(name, content), Annotations: annotationsOf(c.Labels)},
			Immutable:  ptr.To(true), Data: map[string][]byte{fileKey: content},
		}
		t.files["secrets."+name] = o.Name
		if err := t.add(o); err != nil {
			return err
		}
	}
	return nil
}

// fileKey is under what a configuration's content is kept.
const fileKey = "content"

// keyOf is under what the content of a configuration or secret is found.
func keyOf(c types.FileObjectConfig) string {
	if c.External {
		return c.Name
	}
	return fileKey
}

// addressed names an object by what it holds.
func addressed(name string, content []byte) string {
	sum := sha256.Sum256(content)
	return objectName(name) + "-" + hex.EncodeToString(sum[:5])
}

func (t *translation) content(section, name string, c types.FileObjectConfig) ([]byte, error) {
	switch {
	case bool(c.External):
		return nil, nil
	case c.File != "":
		content, err := os.ReadFile(c.File)
		if err != nil {
			return nil, t.refuse(c.File+" cannot be read; check the path", section, name, "file")
		}
		return content, nil
	case c.Environment != "":
		value, ok := t.project.Environment[c.Environment]
		if !ok {
			return nil, t.refuse("the variable "+c.Environment+" is not set; set it, or write it into .env", section, name, "environment")
		}
		return []byte(value), nil
	}
	return []byte(c.Content), nil
}
