package controlplane

import (
	"context"
	"errors"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-helpers/storage/volume"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/volumebinding"
)

// slowBinder stands for the scheduler's binder: its BindPodVolumes waits for ended, or for the end of its context.
type slowBinder struct {
	volumebinding.FakeVolumeBinder
	ended   chan error
	result  chan error    // what BindPodVolumes returned
	looked  chan struct{} // after a look at whether the node can reach the volumes
	reasons volumebinding.ConflictReasons
}

func (b *slowBinder) FindPodVolumes(klog.Logger, *corev1.Pod, *volumebinding.PodVolumeClaims, *corev1.Node) (*volumebinding.PodVolumes, volumebinding.ConflictReasons, error) {
	b.looked <- struct{}{}
	return nil, b.reasons, nil
}

func (b *slowBinder) BindPodVolumes(ctx context.Context, _ *corev1.Pod, _ *volumebinding.PodVolumes) (err error) {
	defer func() { b.result <- err }()
	select {
	case err := <-b.ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// boundClaim is a claim as it is when its binding is over.
func boundClaim(name string) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}}
	c.Spec.VolumeName = "pv"
	c.Annotations = map[string]string{volume.AnnBindCompleted: "yes"}
	c.Status.Phase = corev1.ClaimBound
	return c
}

var twoClaims = &corev1.Pod{
	ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
	Spec: corev1.PodSpec{NodeName: "n1", Volumes: []corev1.Volume{
		{Name: "a", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "c"}}},
		{Name: "b", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}},
		{Name: "c", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}},
	}},
}

// binderOf returns an eventBinder and the caches of claims and nodes that it looks at.
func binderOf(slow *slowBinder) (b *eventBinder, claims, nodes cache.Store) {
	core := informers.NewSharedInformerFactory(fake.NewClientset(), 0).Core().V1()
	b = &eventBinder{slow, core.PersistentVolumeClaims().Lister(), core.Nodes().Lister(), newBroadcast()}
	return b, core.PersistentVolumeClaims().Informer().GetStore(), core.Nodes().Informer().GetStore()
}

func TestEventBinder(t *testing.T) {
	failed := errors.New("provisioning failed")
	for name, tt := range map[string]struct {
		reasons volumebinding.ConflictReasons
		act     func(b *slowBinder, bound, cancel func())
		want    error
	}{
		"bound, told by an event":               {act: func(_ *slowBinder, bound, _ func()) { bound() }},
		"bound, told by the scheduler's binder": {act: func(b *slowBinder, _, _ func()) { b.ended <- nil }},
		"bound to what the node cannot reach": {
			reasons: volumebinding.ConflictReasons{volumebinding.ErrReasonNodeConflict},
			act: func(b *slowBinder, bound, _ func()) {
				bound()
				<-b.looked
				b.ended <- failed
			}, want: failed},
		"never bound":           {act: func(b *slowBinder, _, _ func()) { b.ended <- failed }, want: failed},
		"the end of scheduling": {act: func(_ *slowBinder, _, cancel func()) { cancel() }, want: context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			slow := &slowBinder{ended: make(chan error, 1), result: make(chan error, 1), looked: make(chan struct{}, 3), reasons: tt.reasons}
			b, claims, nodes := binderOf(slow)
			nodes.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}})
			got := make(chan error, 1)
			go func() { got <- b.BindPodVolumes(ctx, twoClaims, &volumebinding.PodVolumes{}) }()
			tt.act(slow, func() {
				for _, c := range []string{"c", "p-b"} {
					claims.Add(boundClaim(c))
					b.changed.send()
				}
			}, cancel)
			select {
			case err := <-got:
				if !errors.Is(err, tt.want) {
					t.Errorf("got %v, want %v", err, tt.want)
				}
			case <-time.After(patience):
				t.Fatal("still waits")
			}
			// The scheduler's binder is not cancelled after a success: it would count that as a failure.
			cancel()
			select {
			case slow.ended <- tt.want:
			default:
			}
			if err := <-slow.result; !errors.Is(err, tt.want) {
				t.Errorf("the scheduler's binder ended with %v, want %v", err, tt.want)
			}
		})
	}
}

func TestEventBinderBound(t *testing.T) {
	for name, tt := range map[string]struct {
		change  func(*corev1.PersistentVolumeClaim)
		node    string
		reasons volumebinding.ConflictReasons
		want    bool
	}{
		"all is well":                 {node: "n1", want: true},
		"no volume yet":               {node: "n1", change: func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = "" }},
		"half bound":                  {node: "n1", change: func(c *corev1.PersistentVolumeClaim) { c.Annotations = nil }},
		"status does not tell yet":    {node: "n1", change: func(c *corev1.PersistentVolumeClaim) { c.Status.Phase = corev1.ClaimPending }},
		"claim of another name":       {node: "n1", change: func(c *corev1.PersistentVolumeClaim) { c.Name = "other" }},
		"node is gone":                {node: "n2"},
		"volume is missing or remote": {node: "n1", reasons: volumebinding.ConflictReasons{volumebinding.ErrReasonPVNotExist}},
	} {
		t.Run(name, func(t *testing.T) {
			b, claims, nodes := binderOf(&slowBinder{looked: make(chan struct{}, 1), reasons: tt.reasons})
			nodes.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: tt.node}})
			c := boundClaim("p-b")
			if tt.change != nil {
				tt.change(c)
			}
			claims.Add(boundClaim("c"))
			claims.Add(c)
			if got := b.bound(t.Context(), twoClaims); got != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
}
