package app

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"tutti.dev/tutti/internal/api"
)

// ownKindsTime is how long objects of an application's own kinds may take to
// go while the rest of it still runs.
const ownKindsTime = 20 * time.Second

// NotDeployedError says that no application of that name is there.
type NotDeployedError struct{ Name string }

func (e NotDeployedError) Error() string {
	return fmt.Sprintf("no application %s is deployed; `tutti status` lists what is", e.Name)
}

// Find returns where an application is deployed. With an empty namespace it
// looks in all, and more than one place is an error.
func (c *Cluster) Find(ctx context.Context, namespace, name string) (string, error) {
	list, err := c.clients.CoreV1().ConfigMaps(namespace).List(ctx, metav1.ListOptions{
		LabelSelector: labels.Set{api.LabelInventory: "true", api.LabelApp: name}.String(),
	})
	if err != nil {
		return "", fmt.Errorf("look for application %s: %w", name, err)
	}
	var in []string
	for _, cm := range list.Items {
		in = append(in, cm.Namespace)
	}
	switch len(in) {
	case 0:
		return "", NotDeployedError{name}
	case 1:
		return in[0], nil
	}
	return "", fmt.Errorf("application %s is deployed in several namespaces (%s); choose one with --namespace", name, strings.Join(in, ", "))
}

// Names are those of the applications that are deployed, in order.
func (c *Cluster) Names(ctx context.Context) ([]string, error) {
	list, err := c.clients.CoreV1().ConfigMaps(metav1.NamespaceAll).List(ctx, metav1.ListOptions{
		LabelSelector: labels.Set{api.LabelInventory: "true"}.String(),
	})
	if err != nil {
		return nil, fmt.Errorf("list applications: %w", err)
	}
	var names []string
	for _, cm := range list.Items {
		names = append(names, cm.Labels[api.LabelApp])
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Remove deletes an application's objects and waits until they are gone.
// Volume claims, and namespaces that hold any, are kept and returned unless
// volumes is set.
func (c *Cluster) Remove(ctx context.Context, namespace, name string, volumes bool, report Report) (kept []Ref, err error) {
	refs, found, err := c.inventory(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, NotDeployedError{name}
	}
	claims, err := c.claims(ctx, refs)
	if err != nil {
		return nil, err
	}
	if volumes {
		refs = slices.Concat(refs, without(claims, refs))
	} else {
		refs, kept = keep(refs, claims)
	}
	own, rest := ownKinds(forRemoval(refs))
	remove := func(refs []Ref) error {
		for _, r := range refs {
			report(r.String(), Working, "removing")
			if err := c.delete(ctx, r); err != nil {
				report(r.String(), Failed, plain(err))
				return err
			}
		}
		return nil
	}
	if err := remove(own); err != nil {
		return kept, err
	}
	patient, cancel := context.WithTimeout(ctx, ownKindsTime)
	defer cancel()
	for _, r := range own {
		if c.awaitGone(patient, r) != nil {
			break // it is waited for again below, with the program gone
		}
	}
	if err := remove(rest); err != nil {
		return kept, err
	}
	for _, r := range slices.Concat(own, rest) {
		if err := c.awaitGone(ctx, r); err != nil {
			report(r.String(), Failed, "not gone yet")
			return kept, err
		}
		report(r.String(), Done, "removed")
	}
	err = c.releases(namespace).DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: labels.Set{api.LabelApp: name}.String()})
	if err != nil && !notFound(err) {
		return kept, fmt.Errorf("remove the releases of %s: %w", name, err)
	}
	err = c.clients.CoreV1().ConfigMaps(namespace).Delete(ctx, inventoryPrefix+name, metav1.DeleteOptions{})
	if err != nil && !notFound(err) {
		return kept, fmt.Errorf("remove the inventory of %s: %w", name, err)
	}
	return kept, nil
}

// ownKinds splits refs into the objects of kinds that go too, and the rest.
// They are removed first: their program still runs, and may have to let them
// go; and once a kind itself is being removed, the API server looks only every
// 5 s whether its last object has gone.
func ownKinds(refs []Ref) (own, rest []Ref) {
	groups := map[string]bool{}
	for _, r := range refs {
		if _, group, ok := strings.Cut(r.Name, "."); ok && r.Kind == "CustomResourceDefinition" && r.Group == "apiextensions.k8s.io" {
			groups[group] = true
		}
	}
	for _, r := range refs {
		if groups[r.Group] {
			own = append(own, r)
		} else {
			rest = append(rest, r)
		}
	}
	return own, rest
}

// keep splits refs into what may go and what must stay so that the claims do.
func keep(refs, claims []Ref) (gone, kept []Ref) {
	holds := map[string]bool{}
	for _, c := range claims {
		holds[c.Namespace] = true
	}
	for _, r := range refs {
		if r.Kind == "Namespace" && r.Group == "" && holds[r.Name] {
			kept = append(kept, r)
		} else if !slices.ContainsFunc(claims, r.same) {
			gone = append(gone, r)
		}
	}
	return gone, append(kept, claims...)
}

// claims finds the volume claims of an application: those it names, and
// those that its StatefulSets made for their members.
func (c *Cluster) claims(ctx context.Context, refs []Ref) ([]Ref, error) {
	var claims []Ref
	for _, r := range refs {
		switch {
		case r.Kind == "PersistentVolumeClaim" && r.Group == "":
			_, err := c.clients.CoreV1().PersistentVolumeClaims(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
			if notFound(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look up %s: %w", r, err)
			}
			claims = append(claims, r)
		case r.Kind == "StatefulSet" && r.Group == "apps":
			set, err := c.clients.AppsV1().StatefulSets(r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
			if notFound(err) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("look up %s: %w", r, err)
			}
			list, err := c.clients.CoreV1().PersistentVolumeClaims(r.Namespace).List(ctx, metav1.ListOptions{})
			if err != nil {
				return nil, fmt.Errorf("look up the volumes of %s: %w", r, err)
			}
			claims = append(claims, claimsOf(set, list.Items)...)
		}
	}
	return claims, nil
}

// claimsOf picks the claims made from a StatefulSet's templates; they are
// named template-set-ordinal.
func claimsOf(set *appsv1.StatefulSet, all []corev1.PersistentVolumeClaim) []Ref {
	var claims []Ref
	for _, t := range set.Spec.VolumeClaimTemplates {
		prefix := t.Name + "-" + set.Name + "-"
		for _, c := range all {
			ordinal, ok := strings.CutPrefix(c.Name, prefix)
			if ok && ordinal != "" && strings.Trim(ordinal, "0123456789") == "" {
				claims = append(claims, Ref{Version: "v1", Kind: "PersistentVolumeClaim", Namespace: c.Namespace, Name: c.Name})
			}
		}
	}
	return claims
}

// delete starts the removal of one object and what it owns. An object that is
// not there, or whose kind is gone, is no error.
func (c *Cluster) delete(ctx context.Context, r Ref) error {
	m, err := c.resource(r.gvk())
	if errors.Is(err, errUnknownKind) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove %s: %w", r, err)
	}
	policy := metav1.DeletePropagationForeground
	err = c.client(m, r.Namespace).Delete(ctx, r.Name, metav1.DeleteOptions{PropagationPolicy: &policy})
	if err != nil && !notFound(err) {
		return fmt.Errorf("remove %s: %s", r, plain(err))
	}
	return nil
}
