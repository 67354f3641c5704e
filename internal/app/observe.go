package app

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"tutti.dev/tutti/internal/api"
)

// Snapshot is what a cluster runs at one moment.
type Snapshot struct {
	Nodes        []*corev1.Node // nil if they may not be seen
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
	rest     rest.Interface
	changed  chan struct{}
	stores   map[string]cache.Store // of the kinds that may be seen
	notes    []string               // what may not be seen
	measured *measured              // nil unless asked for
}

// kinds are what is watched.
var kinds = map[string]func(informers.SharedInformerFactory) cache.SharedIndexInformer{
	nodesKind: func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Core().V1().Nodes().Informer()
	},
	podsKind: func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Core().V1().Pods().Informer()
	},
	"services": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Core().V1().Services().Informer()
	},
	"deployments": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Apps().V1().Deployments().Informer()
	},
	"replicasets": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Apps().V1().ReplicaSets().Informer()
	},
	"statefulsets": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Apps().V1().StatefulSets().Informer()
	},
	"daemonsets": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Apps().V1().DaemonSets().Informer()
	},
	"jobs": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Batch().V1().Jobs().Informer()
	},
	"cronjobs": func(f informers.SharedInformerFactory) cache.SharedIndexInformer {
		return f.Batch().V1().CronJobs().Informer()
	},
}

const (
	nodesKind = "nodes" // the only one that is in no namespace
	podsKind  = "pods"  // without which there is nothing to tell
)

// Observe lists what the cluster runs and watches it until ctx ends: what its
// user may see of it. What may not be seen in all namespaces is looked for in
// the one of the kubeconfig, and what is missing is said in the notes. It
// fails when the user may not even see pods there, or when the first list
// does not come within timeout.
func (c *Cluster) Observe(ctx context.Context, timeout time.Duration) (*Observer, error) {
	first, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no answer within %s; check that the cluster runs, and try again", timeout))
	defer cancel()
	o := &Observer{rest: c.clients.Discovery().RESTClient(), changed: make(chan struct{}, 1), stores: map[string]cache.Store{}}
	everywhere := informers.NewSharedInformerFactory(c.clients, 0)
	here := informers.NewSharedInformerFactoryWithOptions(c.clients, 0, informers.WithNamespace(c.namespace))
	var mu sync.Mutex
	var hidden []string
	narrow := false
	g, first := errgroup.WithContext(first)
	for kind, of := range kinds {
		g.Go(func() error {
			i := of(everywhere)
			err := o.follow(ctx, first, i)
			scoped := apierrors.IsForbidden(err) && kind != nodesKind
			if scoped {
				i = of(here)
				err = o.follow(ctx, first, i)
			}
			refused := apierrors.IsForbidden(err)
			switch {
			case refused && kind == podsKind:
				return fmt.Errorf("you may not see what runs (%s); ask the cluster's administrator for the right to view, or make another namespace the kubeconfig's", plain(err))
			case err != nil && !refused:
				return fmt.Errorf("list what runs: %w", err)
			}
			mu.Lock()
			defer mu.Unlock()
			if refused {
				hidden = append(hidden, kind)
				return nil
			}
			o.stores[kind] = i.GetStore()
			narrow = narrow || scoped
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if narrow {
		o.note(fmt.Errorf("only namespace %s is shown; get the right to view others, or make another one the kubeconfig's", c.namespace))
	}
	if len(hidden) > 0 {
		slices.Sort(hidden)
		o.note(fmt.Errorf("%s are not shown: it takes the right to list and watch them; ask the cluster's administrator for it", strings.Join(hidden, ", ")))
	}
	return o, nil
}

// follow keeps an informer up to date until ctx ends. It returns when what
// there is has come, or the first error.
func (o *Observer) follow(ctx, first context.Context, i cache.SharedIndexInformer) error {
	failed := make(chan error, 1)
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
	life, end := context.WithCancel(ctx)
	go i.RunWithContext(life)
	select {
	case <-i.HasSyncedChecker().Done():
		context.AfterFunc(ctx, end)
		return nil
	case err := <-failed:
		end()
		return err
	case <-first.Done():
		end()
		return context.Cause(first)
	}
}

func sameVersion(old, new any) bool {
	type versioned interface{ GetResourceVersion() string }
	a, ok := old.(versioned)
	b, ok2 := new.(versioned)
	return ok && ok2 && a.GetResourceVersion() == b.GetResourceVersion()
}

// note has every snapshot say why something is missing.
func (o *Observer) note(why error) { o.notes = append(o.notes, why.Error()) }

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
		Nodes: list[corev1.Node](o.stores[nodesKind]), Pods: list[corev1.Pod](o.stores[podsKind]), Services: list[corev1.Service](o.stores["services"]),
		Deployments: list[appsv1.Deployment](o.stores["deployments"]), ReplicaSets: list[appsv1.ReplicaSet](o.stores["replicasets"]),
		StatefulSets: list[appsv1.StatefulSet](o.stores["statefulsets"]), DaemonSets: list[appsv1.DaemonSet](o.stores["daemonsets"]),
		Jobs: list[batchv1.Job](o.stores["jobs"]), CronJobs: list[batchv1.CronJob](o.stores["cronjobs"]),
		Notes: slices.Clone(o.notes),
	}
	o.measured.into(&s)
	return s
}

// list is what is in a store, nil if there is none.
func list[T any](s cache.Store) []*T {
	if s == nil {
		return nil
	}
	items := s.List()
	all := make([]*T, 0, len(items))
	for _, i := range items {
		all = append(all, i.(*T))
	}
	return all
}
