package app

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"

	"tutti.dev/tutti/internal/api"
)

const (
	inventoryPrefix = "tutti-app-"
	inventoryKey    = "objects"
)

// Ref names an object that was applied.
type Ref struct {
	Group     string `json:"group,omitempty"`
	Version   string `json:"version"`
	Kind      string `json:"kind"`
	Namespace string `json:"namespace,omitempty"`
	Name      string `json:"name"`
}

// String names the object as a person would.
func (r Ref) String() string { return r.Kind + " " + r.Name }

func (r Ref) gvk() schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: r.Group, Version: r.Version, Kind: r.Kind}
}

// same says whether two refs name one object; the version does not count.
func (r Ref) same(o Ref) bool {
	r.Version = o.Version
	return r == o
}

func refOf(o Object) Ref {
	gvk := o.GroupVersionKind()
	return Ref{gvk.Group, gvk.Version, gvk.Kind, o.GetNamespace(), o.GetName()}
}

// without is every ref of a that b has not.
func without(a, b []Ref) []Ref {
	return slices.DeleteFunc(slices.Clone(a), func(r Ref) bool { return slices.ContainsFunc(b, r.same) })
}

// forRemoval sorts against the order of applying.
func forRemoval(refs []Ref) []Ref {
	sorted := slices.Clone(refs)
	slices.SortStableFunc(sorted, func(a, b Ref) int { return cmp.Compare(rank(b.Kind), rank(a.Kind)) })
	return sorted
}

// inventory reads what an application consists of; found is false when there
// is no such application in the namespace.
func (c *Cluster) inventory(ctx context.Context, namespace, name string) (refs []Ref, found bool, err error) {
	cm, err := c.clients.CoreV1().ConfigMaps(namespace).Get(ctx, inventoryPrefix+name, metav1.GetOptions{})
	if notFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("read the inventory of %s: %w", name, err)
	}
	refs, err = decodeInventory(cm)
	return refs, err == nil, err
}

func decodeInventory(cm *corev1.ConfigMap) ([]Ref, error) {
	var refs []Ref
	if err := json.Unmarshal([]byte(cm.Data[inventoryKey]), &refs); err != nil {
		return nil, fmt.Errorf("read the inventory %s/%s: %w", cm.Namespace, cm.Name, err)
	}
	return refs, nil
}

func (c *Cluster) writeInventory(ctx context.Context, namespace, name string, refs []Ref) error {
	text, err := json.Marshal(refs)
	if err != nil {
		return err
	}
	cm := applycorev1.ConfigMap(inventoryPrefix+name, namespace).
		WithLabels(map[string]string{api.LabelApp: name, api.LabelInventory: "true"}).
		WithData(map[string]string{inventoryKey: string(text)})
	_, err = c.clients.CoreV1().ConfigMaps(namespace).Apply(ctx, cm, metav1.ApplyOptions{FieldManager: api.FieldManager, Force: true})
	if err != nil {
		return fmt.Errorf("write the inventory of %s: %w", name, err)
	}
	return nil
}
