package app

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// grace is how long a hopeless problem may stay before a wait gives up: time
// enough for a file or a secret that comes a moment later.
const grace = 20 * time.Second

// Wait waits until every object of a deployment is ready, and reports each
// one's way there. It ends early with an error when one has failed for good.
// ctx bounds it.
func (c *Cluster) Wait(ctx context.Context, d Deployment, report Report) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w, err := c.watch(ctx, d)
	if err != nil {
		return err
	}
	since := map[string]time.Time{} // hopeless problems, by subject
	var again <-chan time.Time
	for {
		state := d.survey(w.objects(), w.pods())
		var broken []string
		waits := false
		again = nil
		for i, s := range state {
			s = c.withLog(ctx, s)
			state[i] = s
			report(s.ref.String(), s.state(), s.text())
			waits = waits || !s.Done
			key := s.ref.String()
			if s.problem == nil || !s.problem.hopeless() {
				delete(since, key)
			} else if _, known := since[key]; !known {
				since[key] = time.Now()
			}
			at, hopeless := since[key]
			if hopeless && again == nil {
				again = time.After(time.Until(at.Add(grace)))
			}
			if s.Failed || hopeless && time.Since(at) >= grace {
				broken = append(broken, s.ref.String()+": "+s.text())
			}
		}
		switch {
		case len(broken) > 0:
			return errors.New(strings.Join(broken, "; "))
		case !waits:
			left := settling(w.pods(), time.Now())
			if left <= 0 {
				return nil
			}
			again = time.After(left)
		}
		select {
		case <-w.changed:
		case <-again:
		case <-ctx.Done():
			c.withWarnings(context.WithoutCancel(ctx), state)
			return notReady(state, context.Cause(ctx))
		}
	}
}

// settle is how long a container that no probe asks must have run to be
// believed: it counts as ready from its first moment, even when it fails in
// the next. Its start is known in whole seconds.
const settle = 2 * time.Second

// settling is how long it takes until every container is to be believed.
func settling(pods []*corev1.Pod, now time.Time) (left time.Duration) {
	for _, p := range pods {
		asked := map[string]bool{}
		for _, c := range p.Spec.Containers {
			asked[c.Name] = c.ReadinessProbe != nil
		}
		for _, cs := range p.Status.ContainerStatuses {
			r := cs.State.Running
			switch {
			case asked[cs.Name] || p.DeletionTimestamp != nil || p.Spec.RestartPolicy != corev1.RestartPolicyAlways:
			case r == nil: // its workload does not know yet
				left = settle
			case !now.Before(r.StartedAt.Time):
				left = max(left, settle-now.Sub(r.StartedAt.Time))
			}
		}
	}
	return left
}

func notReady(state []standing, cause error) error {
	if !errors.Is(cause, context.DeadlineExceeded) {
		return cause
	}
	var late []string
	for _, s := range state {
		if !s.Done {
			late = append(late, s.ref.String()+" ("+s.text()+")")
		}
	}
	return fmt.Errorf("not ready in time: %s; `tutti status` shows how it goes on, --timeout waits longer", strings.Join(late, ", "))
}

// standing is how an object stands, with the first problem of its pods.
type standing struct {
	verdict
	ref     Ref
	problem *Problem
	pod     *corev1.Pod // that has the problem
	log     string      // its last line
	about   []types.UID // the object and its pods, while it is not done
	warning string      // the newest event about them
}

func (s standing) state() State {
	switch {
	case s.Done:
		return Done
	case s.Failed:
		return Failed
	}
	return Working
}

func (s standing) text() string {
	text := s.Message
	if s.problem != nil && !s.Done && !strings.Contains(text, s.problem.Reason) {
		text += ": " + s.problem.String()
	}
	if s.warning != "" {
		text += "; " + s.warning
	}
	if s.log != "" {
		text += fmt.Sprintf("; last log line: %q", s.log)
	}
	return text
}

// survey judges every object that takes time. Objects are keyed by ref with
// an empty version.
func (d Deployment) survey(objects map[Ref]*unstructured.Unstructured, pods []*corev1.Pod) []standing {
	var state []standing
	for _, r := range d.Refs {
		if !takesTime(r) {
			continue
		}
		s := standing{ref: r}
		key := r
		key.Version = ""
		u, ok := objects[key]
		switch {
		case !ok:
			s.verdict = waiting("not there")
		case behind(u, d.applied[r]):
			s.verdict = waiting("starting")
		default:
			s.verdict = ready(u)
			if r.Kind == "PersistentVolumeClaim" && !s.Done && !s.Failed && !used(r, pods) {
				s.verdict = done("bound when it is first used")
			}
		}
		if !s.Done && ok {
			s.about = append(s.about, u.GetUID())
			for _, p := range podsOf(u, pods) {
				s.about = append(s.about, p.UID)
			}
			for _, p := range podsOf(u, pods) {
				if all := Problems(p); len(all) > 0 && p.DeletionTimestamp == nil {
					s.problem, s.pod = &all[0], p
					break
				}
			}
		}
		state = append(state, s)
	}
	return state
}

// behind says that an object as a cache has it is older than as it was applied.
func behind(u, applied *unstructured.Unstructured) bool {
	return applied != nil && (u.GetUID() != applied.GetUID() || u.GetGeneration() < applied.GetGeneration())
}

func used(claim Ref, pods []*corev1.Pod) bool {
	for _, p := range pods {
		for _, v := range p.Spec.Volumes {
			if p.Namespace == claim.Namespace && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == claim.Name {
				return true
			}
		}
	}
	return false
}

// podsOf picks the pods that a workload's selector selects; a pod is its own.
func podsOf(u *unstructured.Unstructured, pods []*corev1.Pod) []*corev1.Pod {
	if u.GetKind() == "Pod" {
		return slices.DeleteFunc(slices.Clone(pods), func(p *corev1.Pod) bool { return p.UID != u.GetUID() })
	}
	raw, ok, _ := unstructured.NestedMap(u.Object, "spec", "selector")
	if !ok || u.GetKind() == "PersistentVolumeClaim" {
		return nil
	}
	var sel metav1.LabelSelector
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(raw, &sel); err != nil {
		return nil
	}
	match, err := metav1.LabelSelectorAsSelector(&sel)
	if err != nil {
		return nil
	}
	var of []*corev1.Pod
	for _, p := range pods {
		if p.Namespace == u.GetNamespace() && match.Matches(labels.Set(p.Labels)) {
			of = append(of, p)
		}
	}
	return of
}

// withLog adds the last line that a crashing container wrote.
func (c *Cluster) withLog(ctx context.Context, s standing) standing {
	if s.problem == nil || s.problem.Reason != "CrashLoopBackOff" && s.problem.Reason != "Error" {
		return s
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	text, err := c.clients.CoreV1().Pods(s.pod.Namespace).GetLogs(s.pod.Name, &corev1.PodLogOptions{
		Container: s.problem.Container, Previous: s.problem.Reason == "CrashLoopBackOff",
		TailLines: ptr.To[int64](1), LimitBytes: ptr.To[int64](512),
	}).DoRaw(ctx)
	if err == nil { // else it is told without
		s.log = strings.TrimSpace(string(text))
	}
	return s
}

// withWarnings adds to what is late for no known reason the newest event that
// warns: an unready probe, a volume that does not come.
func (c *Cluster) withWarnings(ctx context.Context, state []standing) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	for i, s := range state {
		if s.Done || s.problem != nil {
			continue
		}
		all, err := c.clients.CoreV1().Events(s.ref.Namespace).List(ctx, metav1.ListOptions{FieldSelector: "type=" + corev1.EventTypeWarning})
		if err == nil { // else it is told without
			state[i].warning = newestWarning(all.Items, s.about)
		}
	}
}

func newestWarning(events []corev1.Event, about []types.UID) string {
	at := func(e corev1.Event) time.Time {
		if e.Series != nil {
			return e.Series.LastObservedTime.Time
		}
		if e.LastTimestamp.IsZero() {
			return e.EventTime.Time
		}
		return e.LastTimestamp.Time
	}
	var newest *corev1.Event
	for i, e := range events {
		if slices.Contains(about, e.InvolvedObject.UID) && (newest == nil || at(e).After(at(*newest))) {
			newest = &events[i]
		}
	}
	if newest == nil {
		return ""
	}
	return Problem{Reason: newest.Reason, Message: oneLine(newest.Message)}.String()
}

// watcher keeps an application's objects and pods in memory and says when
// anything changes.
type watcher struct {
	changed   chan struct{}
	informers []cache.SharedIndexInformer
	podsOnly  []cache.SharedIndexInformer
}

var podResource = schema.GroupVersionResource{Version: "v1", Resource: "pods"}

func (c *Cluster) watch(ctx context.Context, d Deployment) (*watcher, error) {
	w := &watcher{changed: make(chan struct{}, 1)}
	type place struct {
		resource  schema.GroupVersionResource
		namespace string
	}
	places := map[place]bool{}
	for _, r := range d.Refs {
		if !takesTime(r) {
			continue
		}
		m, err := c.resource(r.gvk())
		if err != nil {
			return nil, fmt.Errorf("watch %s: %w", r, err)
		}
		places[place{m.Resource, r.Namespace}] = true
		if r.Namespace != "" {
			places[place{podResource, r.Namespace}] = true
		}
	}
	wake := func() {
		select {
		case w.changed <- struct{}{}:
		default: // it is to wake already
		}
	}
	synced := make([]cache.InformerSynced, 0, len(places))
	for _, p := range slices.SortedFunc(maps.Keys(places), func(a, b place) int {
		return cmp.Or(cmp.Compare(a.resource.String(), b.resource.String()), cmp.Compare(a.namespace, b.namespace))
	}) {
		i := dynamicinformer.NewFilteredDynamicInformer(c.dynamic, p.resource, p.namespace, 0, cache.Indexers{}, func(o *metav1.ListOptions) {
			o.LabelSelector = labels.Set{api.LabelApp: d.Name}.String()
		}).Informer()
		_, err := i.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { wake() }, UpdateFunc: func(any, any) { wake() }, DeleteFunc: func(any) { wake() },
		})
		if err != nil {
			return nil, err
		}
		w.informers = append(w.informers, i)
		if p.resource == podResource {
			w.podsOnly = append(w.podsOnly, i)
		}
		synced = append(synced, i.HasSynced)
		go i.RunWithContext(ctx)
	}
	if !cache.WaitForCacheSync(ctx.Done(), synced...) {
		return nil, fmt.Errorf("watch %s: %w", d.Name, context.Cause(ctx))
	}
	return w, nil
}

func (w *watcher) objects() map[Ref]*unstructured.Unstructured {
	all := map[Ref]*unstructured.Unstructured{}
	for _, i := range w.informers {
		for _, o := range i.GetStore().List() {
			u := o.(*unstructured.Unstructured)
			r := refOf(Object{Unstructured: u})
			r.Version = ""
			all[r] = u
		}
	}
	return all
}

func (w *watcher) pods() []*corev1.Pod {
	var pods []*corev1.Pod
	for _, i := range w.podsOnly {
		for _, o := range i.GetStore().List() {
			p := &corev1.Pod{}
			if runtime.DefaultUnstructuredConverter.FromUnstructured(o.(*unstructured.Unstructured).Object, p) == nil {
				pods = append(pods, p)
			}
		}
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return cmp.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name) })
	return pods
}
