package agent

import (
	"context"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"tutti.dev/tutti/internal/agent/pod"
)

const (
	// statusHold is how long a status that tells of mere progress waits for a
	// better one: a pod that starts at once costs one write, not four.
	statusHold = 100 * time.Millisecond
	// statusRetry doubles up to statusRetryMost while the API does not take it.
	statusRetry, statusRetryMost = 100 * time.Millisecond, 10 * time.Second
)

// statusWriter brings one pod's status to the API: one write at a time, always
// the latest, never one that nobody needs.
type statusWriter struct {
	x *actor

	mu     sync.Mutex
	want   *v1.PodStatus // nil: nothing to write
	active bool
	urgent chan struct{}
}

func (w *statusWriter) init(x *actor) {
	w.x = x
	w.urgent = make(chan struct{}, 1)
}

// put asks for a status to be written and returns at once.
func (w *statusWriter) put(ctx context.Context, s v1.PodStatus) {
	if urgent(&s) {
		select {
		case w.urgent <- struct{}{}:
		default:
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.want = &s
	if !w.active {
		w.active = true
		go w.run(ctx)
	}
}

func (w *statusWriter) run(ctx context.Context) {
	delay := statusRetry
	for {
		select {
		case <-w.urgent:
		case <-time.After(statusHold):
		case <-ctx.Done():
		}
		w.mu.Lock()
		s := w.want
		w.want = nil
		if s == nil || ctx.Err() != nil {
			w.active = false
			w.mu.Unlock()
			return
		}
		w.mu.Unlock()
		if err := w.write(ctx, s); err != nil && ctx.Err() == nil {
			w.x.a.log.Warn("cannot write pod status", "pod", w.x.uid, "err", err)
			select {
			case <-time.After(delay):
			case <-ctx.Done():
			}
			delay = min(2*delay, statusRetryMost)
			w.x.kick() // the status is still not the API's: it will be put again
			continue
		}
		delay = statusRetry
	}
}

// write replaces the status of the version last seen. When another has
// changed the pod since, its version is taken and the actor decides again, so
// that nothing of the other is lost.
func (w *statusWriter) write(ctx context.Context, s *v1.PodStatus) error {
	p := *w.x.pod()
	if kubetypes.IsStaticPod(&p) {
		return w.x.a.writeMirror(ctx, &p, s)
	}
	if equality.Semantic.DeepEqual(p.Status, *s) {
		return nil
	}
	p.Status = *s
	begun := time.Now()
	defer func() { w.x.a.log.Debug("status written", "pod", w.x.uid, "phase", s.Phase, "took", time.Since(begun)) }()
	pods := w.x.a.client.CoreV1().Pods(p.Namespace)
	got, err := pods.UpdateStatus(ctx, &p, metav1.UpdateOptions{})
	switch {
	case err == nil:
		w.x.setPod(got)
		return nil
	case apierrors.IsNotFound(err):
		w.x.setGone()
		return nil
	case apierrors.IsConflict(err):
		got, err := pods.Get(ctx, p.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err), err == nil && got.UID != p.UID:
			w.x.setGone()
			return nil
		case err == nil:
			w.x.setPod(got)
		}
		return err
	}
	return err
}

func (x *actor) setGone() { x.change(func(o *pod.Observed) { o.Gone = true }) }

// urgent says whether somebody may be waiting for the status: it is more than
// a step on the way to Ready.
func urgent(s *v1.PodStatus) bool {
	if s.Phase == v1.PodSucceeded || s.Phase == v1.PodFailed || podutil.IsPodReadyConditionTrue(*s) {
		return true
	}
	for _, list := range [][]v1.ContainerStatus{s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			w := list[i].State.Waiting
			if list[i].State.Terminated != nil || w != nil && w.Reason != pod.ReasonCreating && w.Reason != pod.ReasonInitializing {
				return true
			}
		}
	}
	return false
}
