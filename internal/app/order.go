package app

import (
	"slices"
	"strings"

	"tutti.dev/tutti/internal/api"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// order is in which kinds are applied: what others refer to comes first.
// Kinds not named come where "" is. Removal goes the other way.
var order = []string{
	"Namespace", "CustomResourceDefinition",
	"PriorityClass", "RuntimeClass", "StorageClass", "PersistentVolume",
	"ResourceQuota", "LimitRange", "NetworkPolicy", "PodDisruptionBudget",
	"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding",
	"ConfigMap", "Secret", "PersistentVolumeClaim", "Service",
	"",
	"DaemonSet", "StatefulSet", "Deployment", "ReplicaSet", "Pod", "Job", "CronJob",
	"HorizontalPodAutoscaler", "Ingress",
	"MutatingWebhookConfiguration", "ValidatingWebhookConfiguration", "APIService",
}

func rank(kind string) int {
	if i := slices.Index(order, kind); i >= 0 {
		return i
	}
	return slices.Index(order, "")
}

// inOrder sorts for applying: by kind, then by who waits for whom
// (api.AnnotationAfter); else what is of one kind stays as it was given.
func inOrder(objects []Object) ([]Object, error) {
	sorted := slices.Clone(objects)
	slices.SortStableFunc(sorted, func(a, b Object) int { return rank(a.GetKind()) - rank(b.GetKind()) })

	placed, open := map[Ref]bool{}, map[Ref]bool{}
	out := make([]Object, 0, len(sorted))
	var place func(o Object) error
	place = func(o Object) error {
		r := refOf(o)
		switch {
		case placed[r]:
			return nil
		case open[r]:
			return o.errorf("waits for itself; break the circle of %s", api.AnnotationAfter)
		}
		open[r] = true
		list, err := after(o)
		if err != nil {
			return err
		}
		for _, p := range list {
			i := slices.IndexFunc(sorted, func(other Object) bool {
				return other.GetKind() == p.kind && other.GetName() == p.name && other.GetNamespace() == o.GetNamespace()
			})
			if i < 0 {
				return o.errorf("waits for %s %s, which the application does not have; add it, or take it out of %s", p.kind, p.name, api.AnnotationAfter)
			}
			if err := place(sorted[i]); err != nil {
				return err
			}
		}
		placed[r] = true
		out = append(out, o)
		return nil
	}
	for _, o := range sorted {
		if err := place(o); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// precondition is one object that another waits for, and how far it must be.
type precondition struct{ kind, name, state string }

// after reads api.AnnotationAfter of an object.
func after(o Object) ([]precondition, error) {
	text := o.GetAnnotations()[api.AnnotationAfter]
	if text == "" {
		return nil, nil
	}
	var list []precondition
	for _, one := range strings.Split(text, ",") {
		what, state, _ := strings.Cut(strings.TrimSpace(one), "=")
		kind, name, ok := strings.Cut(what, "/")
		if state == "" {
			state = api.AfterReady
		}
		if !ok || state != api.AfterReady && state != api.AfterStarted {
			return nil, o.errorf("annotation %s has %q; write KIND/NAME=ready or KIND/NAME=started", api.AnnotationAfter, one)
		}
		list = append(list, precondition{kind, name, state})
	}
	return list, nil
}

// templates says where a kind keeps the metadata of the pods it makes.
var templates = map[string][]string{
	"Deployment.apps":  {"spec", "template", "metadata", "labels"},
	"StatefulSet.apps": {"spec", "template", "metadata", "labels"},
	"DaemonSet.apps":   {"spec", "template", "metadata", "labels"},
	"ReplicaSet.apps":  {"spec", "template", "metadata", "labels"},
	"Job.batch":        {"spec", "template", "metadata", "labels"},
	"CronJob.batch":    {"spec", "jobTemplate", "spec", "template", "metadata", "labels"},
}

// mark returns a copy of the object that carries the application's name, as
// do the pods it makes.
func mark(o Object, name string) Object {
	c := Object{Unstructured: o.DeepCopy(), File: o.File}
	setLabel(c.Unstructured, name, "metadata", "labels")
	if path, ok := templates[o.groupKind().String()]; ok {
		setLabel(c.Unstructured, name, path...)
	}
	return c
}

// setLabel leaves an object of the wrong shape alone: the server names the
// wrong field better than we could.
func setLabel(u *unstructured.Unstructured, name string, path ...string) {
	_ = unstructured.SetNestedField(u.Object, name, append(slices.Clone(path), api.LabelApp)...)
}
