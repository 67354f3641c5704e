package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	v1qos "k8s.io/kubernetes/pkg/apis/core/v1/helper/qos"
	"k8s.io/kubernetes/pkg/kubelet/config"
	kubecontainer "k8s.io/kubernetes/pkg/kubelet/container"
	kubepod "k8s.io/kubernetes/pkg/kubelet/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"
)

// Static pods come from files of this machine and run whatever the API says.
// What the API has of each is a mirror: one reads the pod's status and logs
// there, and deleting it ends nothing. The actor of a static pod is as any
// other; only its status goes to the mirror.

const (
	// manifestInterval is how often the directory is read though no change was
	// seen: one made while the watch began would be missed.
	manifestInterval = 20 * time.Second
	mirrorRetry      = time.Second
)

// Manifests is the directory that static pods come from.
func Manifests(dataDir string) string { return filepath.Join(dataDir, "manifests") }

// unobserved stands in for the kubelet's measurement of how long starts take.
type unobserved struct{}

func (unobserved) ObservedPodOnWatch(*v1.Pod, time.Time) {}

// nodes is the one node that owns the mirrors here.
type nodes struct{ a *Agent }

func (n nodes) Get(string) (*v1.Node, error) { return n.a.node.Node(), nil }

// watchManifests begins the static pods that there are and returns what will
// change.
func (a *Agent) watchManifests(ctx context.Context, recorder record.EventRecorderLogger) (<-chan kubetypes.PodUpdate, error) {
	dir := Manifests(a.DataDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the directory of static pods: %w", err)
	}
	all := config.NewPodConfig(recorder, unobserved{})
	config.NewSourceFile(klog.FromContext(ctx), dir, types.NodeName(a.NodeName), manifestInterval, all.Channel(ctx, kubetypes.FileSource))
	select {
	case u := <-all.Updates():
		a.setManifests(ctx, u)
	case <-ctx.Done():
	}
	return all.Updates(), nil
}

// followManifests takes changes until ctx ends.
func (a *Agent) followManifests(ctx context.Context, updates <-chan kubetypes.PodUpdate) {
	for {
		select {
		case u := <-updates:
			a.setManifests(ctx, u)
		case <-ctx.Done():
			return
		}
	}
}

func (a *Agent) setManifests(ctx context.Context, u kubetypes.PodUpdate) {
	for _, p := range u.Pods {
		p = p.DeepCopy()
		p.Generation, p.Status.QOSClass = 1, v1qos.GetPodQOS(p)
		wanted := u.Op == kubetypes.ADD || u.Op == kubetypes.UPDATE
		a.mu.Lock()
		a.static[p.UID] = wanted
		if !wanted {
			delete(a.static, p.UID)
		}
		a.mu.Unlock()
		if !wanted {
			a.deletePod(p)
			continue
		}
		if before := a.before(p); before != nil {
			go a.succeed(ctx, before, p)
			continue
		}
		a.setPod(p)
		go a.mirror(ctx, p)
	}
}

// before is the actor that must end before a static pod can begin, nil if there
// is none: a manifest that changes is another pod of the same name.
func (a *Agent) before(p *v1.Pod) *actor {
	if x := a.staticOf(p); x != nil && (x.uid != string(p.UID) || x.gone()) {
		return x
	}
	return nil
}

// succeed begins a static pod once the one before it has ended, if it is still
// wanted then.
func (a *Agent) succeed(ctx context.Context, before *actor, p *v1.Pod) {
	for ; before != nil; before = a.before(p) {
		select {
		case <-before.done:
		case <-ctx.Done():
			return
		}
	}
	a.mu.Lock()
	wanted := a.static[p.UID]
	a.mu.Unlock()
	if wanted {
		a.setPod(p)
	}
	a.mirror(ctx, p)
}

// staticOf is the actor of the static pod with a pod's name, nil if there is
// none.
func (a *Agent) staticOf(p *v1.Pod) *actor {
	for _, x := range a.all() {
		if own := x.pod(); kubetypes.IsStaticPod(own) && own.Namespace == p.Namespace && own.Name == p.Name {
			return x
		}
	}
	return nil
}

// setMirror takes what the API has of a static pod, nil for nothing.
func (a *Agent) setMirror(p, mirror *v1.Pod) {
	name := kubecontainer.GetPodFullName(p)
	a.mu.Lock()
	if mirror == nil {
		delete(a.mirrors, name)
	} else {
		a.mirrors[name] = mirror
	}
	ctx := a.ctx
	a.mu.Unlock()
	if x := a.staticOf(p); x != nil {
		x.kick()
	}
	go a.mirror(ctx, p)
}

func (a *Agent) mirrorOf(p *v1.Pod) *v1.Pod {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.mirrors[kubecontainer.GetPodFullName(p)]
}

// mirror makes the mirror of the static pod with p's name if there is none and
// removes one that mirrors nothing or another; it tries until ctx ends.
func (a *Agent) mirror(ctx context.Context, p *v1.Pod) {
	client := kubepod.NewBasicMirrorClient(a.client, a.NodeName, nodes{a})
	for ; ctx.Err() == nil; pause(ctx, mirrorRetry) {
		have := a.mirrorOf(p)
		x := a.staticOf(p)
		var err error
		switch {
		case have == nil && x == nil:
			return
		case have == nil:
			if err = client.CreateMirrorPod(ctx, x.pod()); apierrors.IsAlreadyExists(err) {
				err = nil // the informer will tell of it
			}
		case x == nil || have.DeletionTimestamp != nil || have.Annotations[kubetypes.ConfigMirrorAnnotationKey] != x.pod().Annotations[kubetypes.ConfigHashAnnotationKey]:
			err = a.client.CoreV1().Pods(have.Namespace).Delete(ctx, have.Name, metav1.DeleteOptions{
				GracePeriodSeconds: new(int64), Preconditions: &metav1.Preconditions{UID: &have.UID},
			})
			if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
				err = nil
			}
		}
		if err == nil {
			return
		}
		a.log.Warn("cannot mirror a static pod; trying again", "pod", p.UID, "namespace", p.Namespace, "name", p.Name, "err", err)
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// writeMirror tells a static pod's status to its mirror, if it has one.
func (a *Agent) writeMirror(ctx context.Context, p *v1.Pod, s *v1.PodStatus) error {
	mirror := a.mirrorOf(p)
	if mirror == nil || equality.Semantic.DeepEqual(mirror.Status, *s) {
		return nil
	}
	mirror = mirror.DeepCopy()
	mirror.Status = *s
	got, err := a.client.CoreV1().Pods(mirror.Namespace).UpdateStatus(ctx, mirror, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // the informer tells what there is now
	}
	if err != nil {
		return fmt.Errorf("write the status of mirror pod %s/%s: %w", mirror.Namespace, mirror.Name, err)
	}
	a.mu.Lock()
	if now := a.mirrors[kubecontainer.GetPodFullName(p)]; now != nil && now.UID == got.UID && newer(got, now) {
		a.mirrors[kubecontainer.GetPodFullName(p)] = got
	}
	a.mu.Unlock()
	return nil
}
