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
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	"tutti.dev/tutti/internal/api"
)

// Terms of a deployment.
type Terms struct {
	// Author is who deploys.
	Author string
	// Timeout bounds how long the application may take to get ready, and as
	// long again to come back as it was.
	Timeout time.Duration
	// Stay leaves a release that fails as it is.
	Stay bool
	// returning says that what is there may be broken.
	returning bool
	// DryRun has the server check everything and changes nothing.
	DryRun bool
}

// Outcome is what came of a deployment.
type Outcome struct {
	Release api.Release
	// Unchanged says that the release was there already.
	Unchanged bool
	// Back is the release that is there again because Release failed.
	Back *api.Release
}

// Up makes an application what is given, as its next release, and waits until
// that is ready. What the last release had and this one has not is removed.
// When it fails, the last release that was deployed comes back, unless the
// terms say otherwise, and the error says why it failed. When ctx ends the
// deployment is interrupted: the next Up finishes or replaces it.
func (c *Cluster) Up(ctx context.Context, a Application, namespace string, t Terms, report Report) (Outcome, error) {
	a, err := addressed(a)
	if err != nil {
		return Outcome{}, err
	}
	if t.DryRun {
		p, err := c.plan(ctx, a, namespace)
		if err != nil {
			return Outcome{}, err
		}
		return Outcome{}, p.check(ctx)
	}
	if err := c.defineReleases(ctx); err != nil {
		return Outcome{}, err
	}
	kept, err := c.Releases(ctx, namespace, a.Name)
	if err != nil {
		return Outcome{}, err
	}
	r, secrets, err := newRelease(a, next(kept), t.Author)
	if err != nil {
		return Outcome{}, err
	}
	intent := func() error { return c.writeRelease(ctx, namespace, r, secrets) }
	out := Outcome{Release: r}
	if n := len(kept); n > 0 && kept[n-1].Digest == r.Digest && kept[n-1].State != api.ReleaseFailed {
		// It is there, or was being deployed when its deployer was killed.
		r, intent = kept[n-1], func() error { return nil }
		out = Outcome{Release: r, Unchanged: r.State == api.ReleaseDeployed}
	}
	begun := false
	record := func() error {
		err := intent()
		begun = err == nil
		return err
	}
	d, err := c.bring(ctx, a, namespace, t.Timeout, t.returning, record, report)
	switch {
	case err == nil:
		out.Release.State = api.ReleaseDeployed
		return out, c.settle(ctx, namespace, out.Release, kept, d, report)
	case !begun || out.Unchanged:
		return out, err
	case ctx.Err() != nil:
		return out, fmt.Errorf("interrupted at release %d of %s; `tutti up` finishes it, `tutti rollback %s` undoes it", r.Number, a.Name, a.Name)
	}
	out.Release.State, out.Release.Message = api.ReleaseFailed, err.Error()
	if serr := c.setState(ctx, namespace, out.Release); serr != nil {
		return out, errors.Join(err, serr)
	}
	back := current(kept)
	if back == nil || t.Stay {
		return out, err
	}
	report("release "+fmt.Sprint(back.Number), Working, "coming back")
	old, aerr := c.Application(ctx, namespace, *back)
	if aerr != nil {
		return out, errors.Join(err, aerr)
	}
	d, berr := c.bring(ctx, old, namespace, t.Timeout, true, func() error { return nil }, report)
	if berr == nil {
		berr = c.prune(ctx, d, report)
	}
	if berr != nil {
		return out, notBack(err, back.Number, berr)
	}
	report("release "+fmt.Sprint(back.Number), Done, "is back")
	out.Back = back
	return out, err
}

func notBack(failure error, number int, err error) error {
	return fmt.Errorf("%w; and release %d has not come back: %w", failure, number, err)
}

// next is the number of the next release.
func next(kept []api.Release) int {
	if len(kept) == 0 {
		return 1
	}
	return kept[len(kept)-1].Number + 1
}

// current is the release that is deployed, nil if none is.
func current(kept []api.Release) *api.Release {
	for _, r := range slices.Backward(kept) {
		if r.State == api.ReleaseDeployed {
			return &r
		}
	}
	return nil
}

// bring deploys and waits.
func (c *Cluster) bring(ctx context.Context, a Application, namespace string, timeout time.Duration, back bool, intent func() error, report Report) (Deployment, error) {
	limited, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	d, err := c.deploy(limited, a, namespace, intent, report)
	if err != nil {
		return d, err
	}
	if err := c.unstick(limited, d, back); err != nil {
		return d, err
	}
	return d, c.Wait(limited, d, report)
}

// settle records a release as deployed, the ones before it as replaced, and
// forgets what need not be kept.
func (c *Cluster) settle(ctx context.Context, namespace string, r api.Release, kept []api.Release, d Deployment, report Report) error {
	if err := c.prune(ctx, d, report); err != nil {
		return err
	}
	var err error
	if r.Images, err = c.imagesOf(ctx, d); err != nil {
		return err
	}
	if err := c.setState(ctx, namespace, r); err != nil {
		return err
	}
	for _, old := range kept {
		if old.Number == r.Number || old.State != api.ReleaseDeployed && old.State != api.ReleaseDeploying {
			continue
		}
		if old.State == api.ReleaseDeploying {
			old.State, old.Message = api.ReleaseFailed, "interrupted"
		} else {
			old.State = api.ReleaseReplaced
		}
		if err := c.setState(ctx, namespace, old); err != nil {
			return err
		}
	}
	for len(kept) >= keptReleases {
		err := c.releases(namespace).Delete(ctx, releaseName(r.App, kept[0].Number), metav1.DeleteOptions{})
		if err != nil && !notFound(err) {
			return fmt.Errorf("forget release %d of %s: %w", kept[0].Number, r.App, err)
		}
		kept = kept[1:]
	}
	return nil
}

// imagesOf are the digests of the images that the application's pods run.
func (c *Cluster) imagesOf(ctx context.Context, d Deployment) (map[string]string, error) {
	images := map[string]string{}
	for _, ns := range namespacesOf(d) {
		pods, err := c.clients.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: labels.Set{api.LabelApp: d.Name}.String()})
		if err != nil {
			return nil, fmt.Errorf("look up the images of %s: %w", d.Name, err)
		}
		for _, p := range pods.Items {
			for _, cs := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
				if _, digest, ok := strings.Cut(cs.ImageID, "@"); ok && p.DeletionTimestamp == nil {
					images[cs.Image] = digest
				}
			}
		}
	}
	return images, nil
}

func namespacesOf(d Deployment) []string {
	list := []string{d.Namespace}
	for _, r := range d.Refs {
		if r.Namespace != "" {
			list = append(list, r.Namespace)
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// unstick deletes members of StatefulSets that are of another revision than the
// one wanted and will not get ready: their controller waits for them for ever
// (kubernetes/kubernetes#67250). On the way back a member need not be hopeless
// for that, only not ready.
func (c *Cluster) unstick(ctx context.Context, d Deployment, back bool) error {
	for _, r := range d.Refs {
		if r.Kind != "StatefulSet" || r.Group != "apps" {
			continue
		}
		var set appsv1.StatefulSet
		err := c.await(ctx, r, func(u *unstructured.Unstructured) bool {
			set = appsv1.StatefulSet{}
			err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &set)
			return err == nil && set.Status.ObservedGeneration >= set.Generation
		})
		if err != nil {
			return err
		}
		selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
		if err != nil {
			return fmt.Errorf("look up the members of %s: %w", r, err)
		}
		pods, err := c.clients.CoreV1().Pods(r.Namespace).List(ctx, metav1.ListOptions{LabelSelector: selector.String()})
		if err != nil {
			return fmt.Errorf("look up the members of %s: %w", r, err)
		}
		for _, p := range pods.Items {
			stuck := slices.ContainsFunc(Problems(&p), Problem.hopeless) || slices.ContainsFunc(Problems(&p), func(p Problem) bool { return p.Reason == "CrashLoopBackOff" })
			ready := slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
			})
			if p.Labels[appsv1.ControllerRevisionHashLabelKey] == set.Status.UpdateRevision || ready || !back && !stuck {
				continue
			}
			err := c.clients.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &p.UID}})
			if err != nil && !notFound(err) {
				return fmt.Errorf("delete the stuck Pod %s: %w", p.Name, err)
			}
		}
	}
	return nil
}

// Rollback deploys once more what an application was as release number, as its
// next release; 0 is the one before what is there now, or, of a deployment that
// failed or was interrupted, the one that was there.
func (c *Cluster) Rollback(ctx context.Context, namespace, name string, number int, t Terms, report Report) (Outcome, error) {
	kept, err := c.Releases(ctx, namespace, name)
	if err != nil {
		return Outcome{}, err
	}
	r, err := target(kept, name, number)
	if err != nil {
		return Outcome{}, err
	}
	a, err := c.Application(ctx, namespace, r)
	if err != nil {
		return Outcome{}, err
	}
	a.Source, t.returning = fmt.Sprintf("release %d", r.Number), true
	return c.Up(ctx, a, namespace, t, report)
}

// target is the release that a number means.
func target(kept []api.Release, name string, number int) (api.Release, error) {
	if number != 0 {
		for _, r := range kept {
			if r.Number == number {
				return r, nil
			}
		}
		return api.Release{}, fmt.Errorf("%s has no release %d; `tutti history %s` lists those it has", name, number, name)
	}
	now := current(kept)
	if now != nil && kept[len(kept)-1].State == api.ReleaseDeploying {
		return *now, nil
	}
	for _, r := range slices.Backward(kept) {
		if r.State == api.ReleaseReplaced && (now == nil || r.Number < now.Number) {
			return r, nil
		}
	}
	return api.Release{}, fmt.Errorf("%s has no earlier release; `tutti history %s` lists those it has", name, name)
}
