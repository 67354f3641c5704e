package controlplane

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/component-helpers/storage/volume"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/scheduler"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/volumebinding"
)

// bindVolumesByEvents makes a scheduler that does not run yet see at once that a pod's claims are bound. By itself it
// looks once a second, and never before the first second is over.
func bindVolumesByEvents(s *scheduler.Scheduler, factory informers.SharedInformerFactory) error {
	core := factory.Core().V1()
	changed := newBroadcast()
	for _, informer := range []cache.SharedIndexInformer{core.PersistentVolumeClaims().Informer(), core.PersistentVolumes().Informer()} {
		if err := changed.onChange(informer); err != nil {
			return fmt.Errorf("watch volumes for the scheduler: %w", err)
		}
	}
	found := false
	for _, profile := range s.Profiles {
		for _, plugin := range profile.EnqueueExtensions() {
			if p, ok := plugin.(*volumebinding.VolumeBinding); ok {
				p.Binder = &eventBinder{p.Binder, p.PVCLister, core.Nodes().Lister(), changed}
				found = true
			}
		}
	}
	if !found {
		return errors.New("the scheduler has no plugin that binds volumes")
	}
	return nil
}

// eventBinder is the scheduler's own binder, which makes the changes, judges failures and has the last word, except that
// a pod need not wait for it to look when an event has already told that everything is well.
type eventBinder struct {
	volumebinding.SchedulerVolumeBinder
	claims  corelisters.PersistentVolumeClaimLister
	nodes   corelisters.NodeLister
	changed *broadcast // after each change of a claim or a volume
}

// BindPodVolumes implements [volumebinding.SchedulerVolumeBinder].
func (b *eventBinder) BindPodVolumes(ctx context.Context, pod *corev1.Pod, volumes *volumebinding.PodVolumes) error {
	// The scheduler's binder may go on for a moment after the answer, until it looks again: to cancel it then would count
	// as a failure in its metrics. So it gets a context and bindings of its own.
	binding, cancel := context.WithCancel(context.WithoutCancel(ctx))
	uncancel := context.AfterFunc(ctx, cancel)
	defer uncancel()
	own := copyOf(volumes)
	ended := make(chan error, 1)
	go func() {
		defer cancel()
		ended <- b.SchedulerVolumeBinder.BindPodVolumes(binding, pod, own)
	}()
	for {
		changed := b.changed.next()
		if b.bound(ctx, pod) {
			return nil
		}
		select {
		case err := <-ended:
			return err
		case <-changed:
		}
	}
}

// bound reports whether all claims of pod are bound to volumes that its node can reach. More than upstream asks, it wants
// that also said in their status, which comes last and without which the node would not mount them.
func (b *eventBinder) bound(ctx context.Context, pod *corev1.Pod) bool {
	for i := range pod.Spec.Volumes {
		v, name := &pod.Spec.Volumes[i], ""
		switch {
		case v.PersistentVolumeClaim != nil:
			name = v.PersistentVolumeClaim.ClaimName
		case v.Ephemeral != nil:
			name = ephemeral.VolumeClaimName(pod, v)
		default:
			continue
		}
		claim, err := b.claims.PersistentVolumeClaims(pod.Namespace).Get(name)
		if err != nil || claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName == "" || !metav1.HasAnnotation(claim.ObjectMeta, volume.AnnBindCompleted) {
			return false
		}
	}
	node, err := b.nodes.Get(pod.Spec.NodeName)
	if err != nil {
		return false
	}
	log := klog.FromContext(ctx)
	claims, err := b.GetPodVolumeClaims(log, pod)
	if err != nil {
		return false
	}
	_, reasons, err := b.FindPodVolumes(log, pod, claims, node)
	return err == nil && len(reasons) == 0
}

// copyOf copies what the scheduler's binder writes to.
func copyOf(v *volumebinding.PodVolumes) *volumebinding.PodVolumes {
	c := *v
	if v.StaticBindings != nil {
		c.StaticBindings = make([]*volumebinding.BindingInfo, len(v.StaticBindings))
	}
	for i, b := range v.StaticBindings {
		info := *b
		c.StaticBindings[i] = &info
	}
	return &c
}
