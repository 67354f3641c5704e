package app

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"tutti.dev/tutti/internal/api"
)

// Snapshot is what a cluster runs at one moment.
type Snapshot struct {
	Nodes        []*corev1.Node
	Pods         []*corev1.Pod
	Services     []*corev1.Service
	Deployments  []*appsv1.Deployment
	ReplicaSets  []*appsv1.ReplicaSet
	StatefulSets []*appsv1.StatefulSet
	DaemonSets   []*appsv1.DaemonSet
	Jobs         []*batchv1.Job
	CronJobs     []*batchv1.CronJob

	// What was measured, if the observer was told to: nil while not known.
	PodUsage  map[types.NamespacedName]Usage
	NodeUsage map[string]Usage
	Flows     map[string][]api.Flow // by the node that tells
	Notes     []string              // what cannot be told, and why
	Silent    time.Time             // since when the API does not answer; zero while it does
}

// Observer keeps a snapshot up to date by watching.
type Observer struct {
	rest                                                        rest.Interface
	changed                                                     chan struct{}
	measured                                                    *measured // nil unless asked for
	nodes, pods, services, deploys, sets, sts, dss, jobs, crons cache.Store
}

// Observe lists what the cluster runs and watches it until ctx ends. It fails
// when the first list does not come within timeout.
func (c *Cluster) Observe(ctx context.Context, timeout time.Duration) (*Observer, error) {
	f := informers.NewSharedInformerFactory(c.clients, 0)
	o := &Observer{rest: c.clients.Discovery().RESTClient(), changed: make(chan struct{}, 1)}
	failed := make(chan error, 1)
	store := func(i cache.SharedIndexInformer) cache.Store {
		// Neither can fail on an informer that was not started.
		_ = i.SetWatchErrorHandler(func(_ *cache.Reflector, err error) {
			select {
			case failed <- err:
			default:
			}
		})
		_, _ = i.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { o.wake() }, DeleteFunc: func(any) { o.wake() },
			UpdateFunc: func(old, new any) {
				if !sameVersion(old, new) {
					o.wake()
				}
			},
		})
		return i.GetStore()
	}
	o.nodes = store(f.Core().V1().Nodes().Informer())
	o.pods = store(f.Core().V1().Pods().Informer())
	o.services = store(f.Core().V1().Services().Informer())
	o.deploys = store(f.Apps().V1().Deployments().Informer())
	o.sets = store(f.Apps().V1().ReplicaSets().Informer())
	o.sts = store(f.Apps().V1().StatefulSets().Informer())
	o.dss = store(f.Apps().V1().DaemonSets().Informer())
	o.jobs = store(f.Batch().V1().Jobs().Informer())
	o.crons = store(f.Batch().V1().CronJobs().Informer())
	f.StartWithContext(ctx)

	first, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	synced := make(chan bool, 1)
	go func() {
		all := true
		for _, ok := range f.WaitForCacheSync(first.Done()) {
			all = all && ok
		}
		synced <- all
	}()
	select {
	case err := <-failed:
		return nil, fmt.Errorf("list what runs: %w", err)
	case ok := <-synced:
		if !ok {
			return nil, fmt.Errorf("list what runs: no answer within %s; check that the cluster runs, and try again", timeout)
		}
	}
	return o, nil
}

func sameVersion(old, new any) bool {
	type versioned interface{ GetResourceVersion() string }
	a, ok := old.(versioned)
	b, ok2 := new.(versioned)
	return ok && ok2 && a.GetResourceVersion() == b.GetResourceVersion()
}

func (o *Observer) wake() {
	select {
	case o.changed <- struct{}{}:
	default: // it is to wake already
	}
}

// Changed receives after anything changed; several changes may be told once.
func (o *Observer) Changed() <-chan struct{} { return o.changed }

// Snapshot is what runs now. Its objects are shared: do not change them.
func (o *Observer) Snapshot() Snapshot {
	s := Snapshot{
		Nodes: list[corev1.Node](o.nodes), Pods: list[corev1.Pod](o.pods), Services: list[corev1.Service](o.services),
		Deployments: list[appsv1.Deployment](o.deploys), ReplicaSets: list[appsv1.ReplicaSet](o.sets),
		StatefulSets: list[appsv1.StatefulSet](o.sts), DaemonSets: list[appsv1.DaemonSet](o.dss),
		Jobs: list[batchv1.Job](o.jobs), CronJobs: list[batchv1.CronJob](o.crons),
	}
	o.measured.into(&s)
	return s
}

func list[T any](s cache.Store) []*T {
	items := s.List()
	all := make([]*T, 0, len(items))
	for _, i := range items {
		all = append(all, i.(*T))
	}
	return all
}
