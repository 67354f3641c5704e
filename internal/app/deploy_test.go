package app

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/api"
)

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatal(err)
	}
	// As the server gives it: numbers are int64.
	json, err := u.MarshalJSON()
	if err != nil {
		t.Fatal(err)
	}
	if err := u.UnmarshalJSON(json); err != nil {
		t.Fatal(err)
	}
	return u
}

func TestOrder(t *testing.T) {
	var objects []Object
	for _, kind := range []string{"Ingress", "Deployment", "Widget", "Service", "Job", "ConfigMap", "CustomResourceDefinition", "Namespace", "StatefulSet"} {
		objects = append(objects, Object{Unstructured: object(t, "{apiVersion: v1, kind: "+kind+", metadata: {name: x}}")})
	}
	var got []string
	var refs []Ref
	sorted, err := inOrder(objects)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range sorted {
		got = append(got, o.GetKind())
		refs = append(refs, refOf(o))
	}
	const want = "Namespace CustomResourceDefinition ConfigMap Service Widget StatefulSet Deployment Job Ingress"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got %s", s)
	}
	if first := forRemoval(refs)[0].Kind; first != "Ingress" {
		t.Errorf("removal begins with %s", first)
	}
}

// Who waits for another comes after it, though its kind comes before.
func TestOrderOfPreconditions(t *testing.T) {
	workload := func(kind, name, after string) Object {
		return Object{File: "a.yaml", Unstructured: object(t, fmt.Sprintf("{kind: %s, apiVersion: v1, metadata: {name: %s, annotations: {%s: %q}}}", kind, name, api.AnnotationAfter, after))}
	}
	for _, c := range []struct {
		name, want string
		objects    []Object
	}{
		{"a chain", "Job/seed Deployment/db Deployment/web", []Object{workload("Deployment", "web", "Deployment/db=ready,Job/seed=started"), workload("Job", "seed", ""), workload("Deployment", "db", "Job/seed")}},
		{"a circle", "a.yaml: Deployment a: waits for itself; break the circle of app.tutti.dev/after", []Object{workload("Deployment", "a", "Deployment/b"), workload("Deployment", "b", "Deployment/a")}},
		{"nobody", "a.yaml: Deployment a: waits for Job b, which the application does not have; add it, or take it out of app.tutti.dev/after", []Object{workload("Deployment", "a", "Job/b")}},
		{"no words", `a.yaml: Deployment a: annotation app.tutti.dev/after has "b"; write KIND/NAME=ready or KIND/NAME=started`, []Object{workload("Deployment", "a", "b")}},
		{"no such state", `a.yaml: Deployment a: annotation app.tutti.dev/after has "Job/b=done"; write KIND/NAME=ready or KIND/NAME=started`, []Object{workload("Deployment", "a", "Job/b=done")}},
	} {
		t.Run(c.name, func(t *testing.T) {
			sorted, err := inOrder(c.objects)
			var got []string
			for _, o := range sorted {
				got = append(got, o.GetKind()+"/"+o.GetName())
			}
			if err != nil {
				got = []string{err.Error()}
			}
			if text := strings.Join(got, " "); text != c.want {
				t.Errorf("got %s", text)
			}
		})
	}
}

func TestOwnKindsGoFirst(t *testing.T) {
	crd := Ref{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition", Name: "widgets.own.example"}
	widget := Ref{Group: "own.example", Kind: "Widget", Name: "w"}
	other := Ref{Group: "other.example", Kind: "Widget", Name: "w"}
	program := Ref{Group: "apps", Kind: "Deployment", Name: "widgets.own.example"}
	own, rest := ownKinds([]Ref{program, widget, other, crd})
	if !slices.Equal(own, []Ref{widget}) || !slices.Equal(rest, []Ref{program, other, crd}) {
		t.Errorf("own %v, rest %v", own, rest)
	}
	if own, rest := ownKinds([]Ref{program, widget}); own != nil || len(rest) != 2 {
		t.Errorf("a kind that stays: own %v, rest %v", own, rest)
	}
}

func TestMark(t *testing.T) {
	for _, c := range []struct {
		text string
		path []string // of the pods' label, nil for none
	}{
		{"{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {template: {metadata: {labels: {a: b}}}}}", []string{"spec", "template", "metadata", "labels"}},
		{"{apiVersion: batch/v1, kind: CronJob, metadata: {name: x, labels: {a: b}}, spec: {}}", []string{"spec", "jobTemplate", "spec", "template", "metadata", "labels"}},
		{"{apiVersion: v1, kind: ConfigMap, metadata: {name: x}}", nil},
		{"{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: wrong}", nil},
	} {
		before := object(t, c.text)
		o := mark(Object{Unstructured: before}, "shop")
		if o.GetLabels()[api.LabelApp] != "shop" {
			t.Errorf("%s: not marked: %v", c.text, o.Object)
		}
		if before.GetLabels()[api.LabelApp] != "" {
			t.Errorf("%s: what was read has changed", c.text)
		}
		if c.path != nil {
			if l, _, _ := unstructured.NestedStringMap(o.Object, c.path...); l[api.LabelApp] != "shop" {
				t.Errorf("%s: pods are not marked: %v", c.text, o.Object)
			}
		}
	}
}

func TestPlain(t *testing.T) {
	for in, want := range map[string]string{
		"failed to create typed patch object (default/x; apps/v1, Kind=Deployment): .spec.replcas: field not declared in schema":                                               `unknown field "spec.replcas"`,
		`Deployment in version "v1" cannot be handled as a Deployment: strict decoding error: unknown field "spec.replcas"`:                                                    `unknown field "spec.replcas"`,
		`Pod "x" is invalid: spec.containers[0].ports[0].containerPort: Invalid value: 99999999: must be between 1 and 65535, inclusive`:                                       `spec.containers[0].ports[0].containerPort: Invalid value: 99999999: must be between 1 and 65535, inclusive`,
		"failed to create typed patch object (default/x; apps/v1, Kind=Deployment): errors:\n  .spec.a: field not declared in schema\n  .spec.b: field not declared in schema": `errors: unknown field "spec.a" unknown field "spec.b"`,
	} {
		status := &apierrors.StatusError{ErrStatus: metav1.Status{Message: in}}
		if got := plain(status); got != want {
			t.Errorf("%s:\n got %s\nwant %s", in, got, want)
		}
	}
	if got := plain(errors.New("two\nlines")); got != "two lines" {
		t.Errorf("got %q", got)
	}
}

func TestWithout(t *testing.T) {
	a := []Ref{{Version: "v1", Kind: "Pod", Namespace: "n", Name: "x"}, {Group: "apps", Version: "v1beta1", Kind: "Deployment", Namespace: "n", Name: "x"}}
	b := []Ref{{Group: "apps", Version: "v1", Kind: "Deployment", Namespace: "n", Name: "x"}}
	if got := without(a, b); len(got) != 1 || got[0].Kind != "Pod" {
		t.Errorf("got %v", got)
	}
}

func TestKeep(t *testing.T) {
	claim := Ref{Version: "v1", Kind: "PersistentVolumeClaim", Namespace: "shop", Name: "data"}
	refs := []Ref{
		{Version: "v1", Kind: "Namespace", Name: "shop"}, {Version: "v1", Kind: "Namespace", Name: "other"},
		claim, {Version: "v1", Kind: "Pod", Namespace: "shop", Name: "x"},
	}
	gone, kept := keep(refs, []Ref{claim})
	if len(gone) != 2 || gone[0].Name != "other" || gone[1].Kind != "Pod" {
		t.Errorf("gone: %v", gone)
	}
	if len(kept) != 2 || kept[0].Name != "shop" || kept[1] != claim {
		t.Errorf("kept: %v", kept)
	}
}

func TestClaimsOf(t *testing.T) {
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db"}}
	set.Spec.VolumeClaimTemplates = []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}}}
	var all []corev1.PersistentVolumeClaim
	for _, n := range []string{"data-db-0", "data-db-12", "data-db-old-0", "data-db-", "logs-db-0"} {
		all = append(all, corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: n}})
	}
	if got := claimsOf(set, all); len(got) != 2 || got[1].Name != "data-db-12" {
		t.Errorf("got %v", got)
	}
}
