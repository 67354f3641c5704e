package app

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"tutti.dev/tutti/internal/api"
)

// State is where something that is being done is.
type State int

const (
	Working State = iota
	Done
	Failed
)

// Report hears how far each subject is ("Deployment web", Working, "1 of 2
// ready"). The same news may come more than once.
type Report func(subject string, state State, message string)

// Deployment is an application as it was deployed.
type Deployment struct {
	Name      string
	Namespace string // of the inventory, and of objects that named none
	Refs      []Ref
	Removed   []Ref // what the last deployment had and this one has not

	// applied is each object as the server answered; a cache that shows an
	// older one is behind.
	applied map[Ref]*unstructured.Unstructured
}

// deploy makes the cluster hold the application's objects: those that it held
// for the application before and are not given now are deleted, but for
// configurations, which pods that run may still need: prune deletes them. The
// server checks every object first; when one is wrong nothing is changed.
// Objects that name no namespace go to the one given. intent is called before
// the first change. Idempotent.
func (c *Cluster) deploy(ctx context.Context, a Application, namespace string, intent func() error, report Report) (Deployment, error) {
	p, err := c.plan(ctx, a, namespace)
	if err != nil {
		return Deployment{}, err
	}
	if err := p.check(ctx); err != nil {
		return Deployment{}, err
	}
	d := Deployment{Name: a.Name, Namespace: namespace, Refs: p.refs(), applied: map[Ref]*unstructured.Unstructured{}}
	old, _, err := c.inventory(ctx, namespace, a.Name)
	if err != nil {
		return d, err
	}
	d.Removed = without(old, d.Refs)

	// The namespace that holds the inventory is the one thing that may have
	// to come before it.
	written := false
	write := func() error {
		written = true
		if err := intent(); err != nil {
			return err
		}
		return c.writeInventory(ctx, namespace, a.Name, slices.Concat(d.Refs, d.Removed))
	}
	if !p.creates[namespace] {
		if err := write(); err != nil {
			return d, err
		}
	}
	for _, o := range p.objects {
		if !written && o.GetKind() != "Namespace" {
			if err := write(); err != nil {
				return d, err
			}
		}
		if err := c.preconditions(ctx, p, d.applied, o, report); err != nil {
			return d, err
		}
		report(o.String(), Working, "applying")
		if d.applied[refOf(o)], err = c.apply(ctx, p, o); err != nil {
			report(o.String(), Failed, plain(err))
			return d, err
		}
		if v := p.versions[refOf(o)]; v != "" && v == d.applied[refOf(o)].GetResourceVersion() {
			report(o.String(), Done, "unchanged")
		} else {
			report(o.String(), Done, "applied")
		}
	}
	return d, c.remove(ctx, d.Removed, func(r Ref) bool { return !configures(r) }, report)
}

// prune deletes the configurations that the application no longer has.
func (c *Cluster) prune(ctx context.Context, d Deployment, report Report) error {
	if len(d.Removed) == 0 {
		return nil
	}
	if err := c.remove(ctx, d.Removed, configures, report); err != nil {
		return err
	}
	return c.writeInventory(ctx, d.Namespace, d.Name, d.Refs)
}

// configures says whether an object is of use to pods only, when they start.
func configures(r Ref) bool {
	return r.Group == "" && (r.Kind == "ConfigMap" || r.Kind == "Secret")
}

func (c *Cluster) remove(ctx context.Context, refs []Ref, which func(Ref) bool, report Report) error {
	for _, r := range forRemoval(refs) {
		if !which(r) {
			continue
		}
		report(r.String(), Working, "removing")
		if err := c.delete(ctx, r); err != nil {
			return err
		}
		report(r.String(), Done, "removed")
	}
	return nil
}

// plan is what will be applied, in order, with namespaces filled in.
type plan struct {
	cluster   *Cluster
	namespace string
	objects   []Object
	// creates has the namespaces that are not there yet.
	creates map[string]bool
	// defines has the kinds that the application itself defines and the
	// cluster does not know yet, by whether they live in namespaces.
	defines map[schema.GroupKind]bool
	// versions has the resource versions that the check found.
	versions map[Ref]string
}

func (p *plan) refs() []Ref {
	refs := make([]Ref, len(p.objects))
	for i, o := range p.objects {
		refs[i] = refOf(o)
	}
	return refs
}

func (c *Cluster) plan(ctx context.Context, a Application, namespace string) (*plan, error) {
	p := &plan{cluster: c, namespace: namespace, creates: map[string]bool{}, defines: definitions(a.Objects), versions: map[Ref]string{}}
	named := map[string]bool{namespace: true}
	given := map[string]bool{}
	for _, o := range a.Objects {
		if o.groupKind() == (schema.GroupKind{Kind: "Namespace"}) {
			given[o.GetName()] = true
		}
		o = mark(o, a.Name)
		inNamespace, ok := p.defines[o.groupKind()]
		m, err := c.resource(o.GroupVersionKind())
		switch {
		case err == nil:
			inNamespace = m.Scope.Name() == meta.RESTScopeNameNamespace
		case !ok:
			return nil, o.errorf("%w", err)
		}
		switch {
		case !inNamespace:
			o.SetNamespace("")
		case o.GetNamespace() == "":
			o.SetNamespace(namespace)
		default:
			named[o.GetNamespace()] = true
		}
		p.objects = append(p.objects, o)
	}
	for ns := range named {
		labels, there, err := c.hasNamespace(ctx, ns)
		if err != nil {
			return nil, err
		}
		p.creates[ns] = !there
		// What nobody wrote down but this application needs, it makes; and it
		// goes on owning what it made.
		if !given[ns] && (!there || labels[api.LabelApp] == a.Name) {
			p.objects = append(p.objects, mark(newNamespace(ns), a.Name))
		}
	}
	for ns := range given {
		if _, known := p.creates[ns]; !known {
			_, there, err := c.hasNamespace(ctx, ns)
			if err != nil {
				return nil, err
			}
			p.creates[ns] = !there
		}
	}
	var err error
	p.objects, err = inOrder(p.objects)
	return p, err
}

func newNamespace(name string) Object {
	u := &unstructured.Unstructured{}
	u.SetAPIVersion("v1")
	u.SetKind("Namespace")
	u.SetName(name)
	return Object{Unstructured: u, File: "namespace " + name}
}

// definitions finds the kinds that the objects themselves define.
func definitions(objects []Object) map[schema.GroupKind]bool {
	kinds := map[schema.GroupKind]bool{}
	for _, o := range objects {
		if o.GetKind() != "CustomResourceDefinition" {
			continue
		}
		group, _, _ := unstructured.NestedString(o.Object, "spec", "group")
		kind, _, _ := unstructured.NestedString(o.Object, "spec", "names", "kind")
		scope, _, _ := unstructured.NestedString(o.Object, "spec", "scope")
		kinds[schema.GroupKind{Group: group, Kind: kind}] = scope == "Namespaced"
	}
	return kinds
}

// check has the server validate every object and change nothing.
func (p *plan) check(ctx context.Context) error {
	for _, o := range p.objects {
		m, err := p.cluster.resource(o.GroupVersionKind())
		if err != nil {
			continue // a kind that the application defines: nobody can check it yet
		}
		if p.creates[o.GetNamespace()] {
			err = p.checkElsewhere(ctx, m, o)
		} else {
			var now *unstructured.Unstructured
			if now, err = p.cluster.patch(ctx, m, o, metav1.DryRunAll); err == nil {
				p.versions[refOf(o)] = now.GetResourceVersion()
			}
		}
		if err != nil && !p.comesLater(o, err) && !replaceable(o, err) {
			return explain(o, err)
		}
	}
	return nil
}

// checkElsewhere checks an object whose namespace does not exist yet as if it
// were made in "default". That it may be there already is no error: the
// server asks that last.
func (p *plan) checkElsewhere(ctx context.Context, m *meta.RESTMapping, o Object) error {
	c := Object{Unstructured: o.DeepCopy(), File: o.File}
	c.SetNamespace(metav1.NamespaceDefault)
	_, err := p.cluster.client(m, metav1.NamespaceDefault).Create(ctx, c.Unstructured, metav1.CreateOptions{
		DryRun: []string{metav1.DryRunAll}, FieldManager: api.FieldManager, FieldValidation: metav1.FieldValidationStrict,
	})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

// comesLater says that the server refused a pod for the want of something
// that this very application brings: its service account, its class.
func (p *plan) comesLater(o Object, err error) bool {
	if o.GetKind() != "Pod" || !apierrors.IsForbidden(err) {
		return false
	}
	if strings.Contains(err.Error(), "error looking up service account") && p.creates[o.GetNamespace()] {
		return true
	}
	for _, other := range p.objects {
		switch other.GetKind() {
		case "ServiceAccount", "PriorityClass", "RuntimeClass":
			if strings.Contains(err.Error(), other.GetName()) {
				return true
			}
		}
	}
	return false
}

// replaceable says that the object cannot be changed but can be made anew
// without losing anything: a Job, whose template is fixed for life.
func replaceable(o Object, err error) bool {
	return o.groupKind() == schema.GroupKind{Group: "batch", Kind: "Job"} &&
		apierrors.IsInvalid(err) && strings.Contains(err.Error(), "field is immutable")
}

func (c *Cluster) patch(ctx context.Context, m *meta.RESTMapping, o Object, dryRun ...string) (*unstructured.Unstructured, error) {
	body, err := o.MarshalJSON()
	if err != nil {
		return nil, err
	}
	force := true
	return c.client(m, o.GetNamespace()).Patch(ctx, o.GetName(), types.ApplyPatchType, body, metav1.PatchOptions{
		FieldManager: api.FieldManager, Force: &force, FieldValidation: metav1.FieldValidationStrict, DryRun: dryRun,
	})
}

// apply makes one object as it shall be, and waits where others build on it.
func (c *Cluster) apply(ctx context.Context, p *plan, o Object) (*unstructured.Unstructured, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	m, err := c.resource(o.GroupVersionKind())
	if errors.Is(err, errUnknownKind) {
		c.mapper.Reset() // defined a moment ago
		m, err = c.resource(o.GroupVersionKind())
	}
	if err != nil {
		return nil, o.errorf("%w", err)
	}
	if o.GetKind() == "Pod" && p.creates[o.GetNamespace()] {
		// A pod is refused until its new namespace has its service account.
		accounts := Ref{Version: "v1", Kind: "ServiceAccount", Namespace: o.GetNamespace(), Name: "default"}
		if err := c.await(ctx, accounts, func(u *unstructured.Unstructured) bool { return true }); err != nil {
			return nil, o.errorf("%w", err)
		}
	}
	got, err := c.patch(ctx, m, o)
	if replaceable(o, err) || err == nil && o.GetKind() == "Job" && ready(got).Failed { // whoever deploys it again wants it tried again
		if err := c.delete(ctx, refOf(o)); err != nil {
			return nil, err
		}
		if err := c.awaitGone(ctx, refOf(o)); err != nil {
			return nil, o.errorf("%w", err)
		}
		got, err = c.patch(ctx, m, o)
	}
	if err != nil {
		return nil, explain(o, err)
	}
	if o.GetKind() == "CustomResourceDefinition" {
		established := func(u *unstructured.Unstructured) bool { return ready(u).Done }
		if err := c.await(ctx, refOf(o), established); err != nil {
			return nil, o.errorf("%w", err)
		}
	}
	return got, nil
}

// preconditions waits until what an object comes after is as far as it says.
func (c *Cluster) preconditions(ctx context.Context, p *plan, applied map[Ref]*unstructured.Unstructured, o Object, report Report) error {
	list, err := after(o)
	if err != nil {
		return err
	}
	for _, before := range list {
		i := slices.IndexFunc(p.objects, func(other Object) bool {
			return other.GetKind() == before.kind && other.GetName() == before.name && other.GetNamespace() == o.GetNamespace()
		})
		r := refOf(p.objects[i])
		report(o.String(), Working, "waits for "+r.String())
		if before.state == api.AfterStarted {
			if err := c.awaitStart(ctx, r); err != nil {
				return o.errorf("%w", err)
			}
			continue
		}
		var failure error
		err := c.await(ctx, r, func(u *unstructured.Unstructured) bool {
			if applied[r] != nil && u.GetGeneration() < applied[r].GetGeneration() {
				return false
			}
			v := ready(u)
			if v.Failed {
				failure = o.errorf("waits for %s, which has failed (%s); `tutti status` says why", r, v.Message)
			}
			return v.Done || v.Failed
		})
		if err = errors.Join(failure, err); err != nil {
			return err
		}
	}
	return nil
}

// patience bounds the applying of one object, with what it must wait for.
const patience = time.Minute

// await waits until an object exists and satisfies.
func (c *Cluster) await(ctx context.Context, r Ref, satisfied func(*unstructured.Unstructured) bool) error {
	return c.follow(ctx, r, func(u *unstructured.Unstructured, deleted bool) bool {
		return !deleted && u != nil && satisfied(u)
	})
}

// awaitGone waits until an object does not exist.
// An object whose kind is gone is gone too.
func (c *Cluster) awaitGone(ctx context.Context, r Ref) error {
	if _, err := c.resource(r.gvk()); errors.Is(err, errUnknownKind) {
		return nil
	}
	return c.follow(ctx, r, func(u *unstructured.Unstructured, deleted bool) bool { return deleted || u == nil })
}

// awaitStart waits until a pod of a workload has been started, ready or not.
func (c *Cluster) awaitStart(ctx context.Context, r Ref) error {
	m, err := c.resource(r.gvk())
	if err != nil {
		return err
	}
	u, err := c.client(m, r.Namespace).Get(ctx, r.Name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look up %s: %w", r, err)
	}
	selector, _, _ := unstructured.NestedStringMap(u.Object, "spec", "selector", "matchLabels")
	if len(selector) == 0 {
		return nil // it makes no pods
	}
	pods := c.clients.CoreV1().Pods(r.Namespace)
	list := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.LabelSelector = labels.Set(selector).String()
			return pods.List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.LabelSelector = labels.Set(selector).String()
			return pods.Watch(ctx, o)
		},
	}
	_, err = watchtools.UntilWithSync(ctx, list, &corev1.Pod{}, nil, func(e watch.Event) (bool, error) {
		p, ok := e.Object.(*corev1.Pod)
		return ok && e.Type != watch.Deleted && p.Status.Phase != corev1.PodPending && p.Status.Phase != "", nil
	})
	if err != nil {
		return fmt.Errorf("wait for the start of %s: %w", r, err)
	}
	return nil
}

// follow watches one object until done; done is called with nil when the
// object does not exist at the start.
func (c *Cluster) follow(ctx context.Context, r Ref, done func(u *unstructured.Unstructured, deleted bool) bool) error {
	m, err := c.resource(r.gvk())
	if err != nil {
		return err
	}
	client := c.client(m, r.Namespace)
	only := func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("metadata.name", r.Name).String()
	}
	list := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			only(&o)
			l, err := client.List(ctx, o)
			if notFound(err) { // its kind has been removed, and it with it
				return &unstructured.UnstructuredList{}, nil
			}
			return l, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			only(&o)
			return client.Watch(ctx, o)
		},
	}
	absent := func(store cache.Store) (bool, error) { return len(store.List()) == 0 && done(nil, false), nil }
	_, err = watchtools.UntilWithSync(ctx, list, &unstructured.Unstructured{}, absent, func(e watch.Event) (bool, error) {
		u, ok := e.Object.(*unstructured.Unstructured)
		return ok && done(u, e.Type == watch.Deleted), nil
	})
	if err != nil {
		return fmt.Errorf("wait for %s: %w", r, err)
	}
	return nil
}
