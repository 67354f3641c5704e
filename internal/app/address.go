package app

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"slices"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"tutti.dev/tutti/internal/api"
)

// addressed names the application's ConfigMaps and Secrets by what they hold,
// and has its pods use those names: a change of configuration is then a new
// object and a new revision of the pods, which rolls out, and back, like a
// change of code. Names stay of those that are immutable already, that carry
// api.AnnotationKeepName, that pods do not use, and that anything but the
// template of a pod mentions: somebody else looks them up.
func addressed(a Application) (Application, error) {
	objects := make([]Object, len(a.Objects))
	for i, o := range a.Objects {
		objects[i] = Object{Unstructured: o.DeepCopy(), File: o.File}
	}
	a.Objects = objects
	for _, o := range objects {
		kind := o.GetKind()
		if o.GroupVersionKind().Group != "" || kind != "ConfigMap" && kind != "Secret" {
			continue
		}
		immutable, _, _ := unstructured.NestedBool(o.Object, "immutable")
		secretType, _, _ := unstructured.NestedString(o.Object, "type")
		if immutable || o.GetAnnotations()[api.AnnotationKeepName] == "true" || secretType != "" && secretType != "Opaque" {
			continue
		}
		uses := usesOf(objects, o, kind == "Secret")
		// A Secret and a ConfigMap may have one name.
		if len(uses) == 0 || mentioned(objects, o) > len(uses)+len(usesOf(objects, o, kind != "Secret")) {
			continue
		}
		content := map[string]any{}
		for _, field := range []string{"data", "binaryData", "stringData"} {
			content[field] = o.Object[field]
		}
		text, err := json.Marshal(content)
		if err != nil {
			return a, err
		}
		sum := sha256.Sum256(text)
		name := o.GetName() + "-" + hex.EncodeToString(sum[:5])
		for _, use := range uses {
			use(name)
		}
		o.SetName(name)
		o.Object["immutable"] = true
	}
	return a, nil
}

// podSpecs says where a kind keeps the specification of the pods it makes. A
// bare pod is not among them: its cannot change.
var podSpecs = map[schema.GroupKind][]string{
	{Group: "apps", Kind: "Deployment"}:  {"spec", "template", "spec"},
	{Group: "apps", Kind: "StatefulSet"}: {"spec", "template", "spec"},
	{Group: "apps", Kind: "DaemonSet"}:   {"spec", "template", "spec"},
	{Group: "apps", Kind: "ReplicaSet"}:  {"spec", "template", "spec"},
	{Group: "batch", Kind: "Job"}:        {"spec", "template", "spec"},
	{Group: "batch", Kind: "CronJob"}:    {"spec", "jobTemplate", "spec", "template", "spec"},
}

// usesOf lists setters of every place at which the template of a pod names a
// ConfigMap, or a Secret, that is called and lives as the one given.
func usesOf(objects []Object, config Object, secret bool) []func(name string) {
	var uses []func(string)
	use := func(holder any, kind bool, field string, path ...string) {
		m, ok := holder.(map[string]any)
		for _, p := range path {
			if m, ok = m[p].(map[string]any); !ok {
				return
			}
		}
		if ok && kind == secret && m[field] == config.GetName() {
			uses = append(uses, func(name string) { m[field] = name })
		}
	}
	for _, o := range objects {
		path, ok := podSpecs[o.groupKind()]
		if !ok || o.GetNamespace() != config.GetNamespace() {
			continue
		}
		found, _, _ := unstructured.NestedFieldNoCopy(o.Object, path...)
		spec, ok := found.(map[string]any)
		if !ok {
			continue
		}
		for _, v := range items(spec["volumes"]) {
			use(v, false, "name", "configMap")
			use(v, true, "secretName", "secret")
			if volume, ok := v.(map[string]any); ok {
				projected, _ := volume["projected"].(map[string]any)
				for _, source := range items(projected["sources"]) {
					use(source, false, "name", "configMap")
					use(source, true, "name", "secret")
				}
			}
		}
		for _, c := range slices.Concat(items(spec["initContainers"]), items(spec["containers"])) {
			container, ok := c.(map[string]any)
			if !ok {
				continue
			}
			for _, env := range items(container["env"]) {
				use(env, false, "name", "valueFrom", "configMapKeyRef")
				use(env, true, "name", "valueFrom", "secretKeyRef")
			}
			for _, from := range items(container["envFrom"]) {
				use(from, false, "name", "configMapRef")
				use(from, true, "name", "secretRef")
			}
		}
	}
	return uses
}

func items(v any) []any {
	l, _ := v.([]any)
	return l
}

// mentioned counts how often the name of a configuration stands anywhere: at
// its uses, in an Ingress, a role, another's own kind.
func mentioned(objects []Object, config Object) int {
	count := 0
	var look func(v any)
	look = func(v any) {
		switch v := v.(type) {
		case string:
			if v == config.GetName() {
				count++
			}
		case []any:
			for _, one := range v {
				look(one)
			}
		case map[string]any:
			_, keyed := v["key"] // what a key of it, or a file, is called does not look it up
			for field, one := range v {
				if !keyed || field != "key" && field != "path" {
					look(one)
				}
			}
		}
	}
	for _, o := range objects {
		if o.Unstructured == config.Unstructured {
			continue
		}
		for field, v := range o.Object {
			if field == "metadata" {
				continue // what is called alike, or labelled so, does not look it up
			}
			if _, ok := podSpecs[o.groupKind()]; !ok {
				look(v)
				continue
			}
			found, _, _ := unstructured.NestedFieldNoCopy(o.Object, podSpecs[o.groupKind()]...)
			if field == "spec" {
				look(withoutNames(found))
			}
		}
	}
	return count
}

// withoutNames leaves out of a pod what is called by names of its own: a
// container or a volume may be called as the configuration is.
func withoutNames(spec any) any {
	m, ok := spec.(map[string]any)
	if !ok {
		return spec
	}
	out := map[string]any{}
	for k, v := range m {
		out[k] = v
	}
	for _, field := range []string{"volumes", "containers", "initContainers"} {
		var kept []any
		for _, item := range items(m[field]) {
			if named, ok := item.(map[string]any); ok {
				copied := map[string]any{}
				for k, v := range named {
					if k != "name" && k != "volumeMounts" && k != "image" && k != "ports" {
						copied[k] = v
					}
				}
				item = copied
			}
			kept = append(kept, item)
		}
		out[field] = kept
	}
	return out
}
