package app

import (
	"slices"

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

// inOrder sorts for applying; what is of one kind stays as it was given.
func inOrder(objects []Object) []Object {
	sorted := slices.Clone(objects)
	slices.SortStableFunc(sorted, func(a, b Object) int { return rank(a.GetKind()) - rank(b.GetKind()) })
	return sorted
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
