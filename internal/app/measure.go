package app

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	metricsapi "k8s.io/metrics/pkg/apis/metrics/v1beta1"

	"tutti.dev/tutti/internal/api"
)

// Usage is what is used now, or what there is to use.
type Usage struct {
	CPU    float64 `json:"cpu"`    // processors
	Memory int64   `json:"memory"` // bytes; of what is used, the working set
}

func (u *Usage) add(l corev1.ResourceList) {
	u.CPU += l.Cpu().AsApproximateFloat64()
	u.Memory += l.Memory().Value()
}

// questions are what is asked as long as somebody looks: how often, and how
// long the answer may take.
var questions = []struct {
	ask           func(*Observer, context.Context)
	every, within time.Duration
}{
	{(*Observer).askAPI, 2 * time.Second, 5 * time.Second},
	{(*Observer).askUsage, 10 * time.Second, 15 * time.Second},
	{(*Observer).askFlows, 5 * time.Second, 10 * time.Second},
}

// measured is what the cluster was asked besides its objects. What cannot be
// asked any more stays as it was, and is explained.
type measured struct {
	mu    sync.Mutex
	pods  map[types.NamespacedName]Usage
	nodes map[string]Usage
	flows map[string][]api.Flow // by node
	wrong map[string]string     // why something cannot be told, by what it is
	// silent is since when the API does not answer, zero while it does.
	silent time.Time
}

// Measure asks from now on, until ctx ends, what pods and nodes use and who
// talks to whom; what comes is in the snapshots. It returns at once; first is
// closed when each was asked.
func (o *Observer) Measure(ctx context.Context) (first <-chan struct{}) {
	o.measured = &measured{wrong: map[string]string{}}
	var asked sync.WaitGroup
	for _, q := range questions {
		ask := func() {
			within, cancel := context.WithTimeout(ctx, q.within)
			defer cancel()
			q.ask(o, within)
			o.wake()
		}
		asked.Add(1)
		go func() {
			tick := time.NewTicker(q.every)
			defer tick.Stop()
			ask()
			asked.Done()
			for {
				select {
				case <-ctx.Done():
					return
				case <-tick.C:
					ask()
				}
			}
		}()
	}
	done := make(chan struct{})
	go func() {
		asked.Wait()
		close(done)
	}()
	return done
}

// askAPI asks whether the API is there: watches that are cut try again in
// silence.
func (o *Observer) askAPI(ctx context.Context) {
	var version any
	err := o.get(ctx, "/version", &version)
	m := o.measured
	m.mu.Lock()
	defer m.mu.Unlock()
	var status apierrors.APIStatus
	switch {
	case err == nil || errors.As(err, &status):
		m.silent = time.Time{}
	case m.silent.IsZero():
		m.silent = time.Now()
	}
}

func (o *Observer) askUsage(ctx context.Context) {
	var pods metricsapi.PodMetricsList
	var nodes metricsapi.NodeMetricsList
	err := o.get(ctx, "/apis/metrics.k8s.io/v1beta1/pods", &pods)
	if err == nil {
		err = o.get(ctx, "/apis/metrics.k8s.io/v1beta1/nodes", &nodes)
	}
	if apierrors.IsNotFound(err) {
		err = errors.New("this cluster has no metrics API; install a metrics server")
	}
	o.learn("CPU and memory are not shown", err, func(m *measured) {
		if err != nil {
			return
		}
		m.pods, m.nodes = map[types.NamespacedName]Usage{}, map[string]Usage{}
		for _, p := range pods.Items {
			var u Usage
			for _, c := range p.Containers {
				u.add(c.Usage)
			}
			m.pods[types.NamespacedName{Namespace: p.Namespace, Name: p.Name}] = u
		}
		for _, n := range nodes.Items {
			var u Usage
			u.add(n.Usage)
			m.nodes[n.Name] = u
		}
	})
}

// askFlows asks every node by way of the API.
func (o *Observer) askFlows(ctx context.Context) {
	nodes := list[corev1.Node](o.stores[nodesKind])
	flows := make([][]api.Flow, len(nodes))
	errs := make([]error, len(nodes))
	var asked sync.WaitGroup
	for i, n := range nodes {
		asked.Go(func() {
			errs[i] = o.get(ctx, "/api/v1/nodes/"+n.Name+"/proxy"+api.PathFlows, &flows[i])
			switch {
			case apierrors.IsNotFound(errs[i]):
				errs[i] = fmt.Errorf("the agent of node %s, which is not tutti's: %w", n.Name, errs[i])
			case apierrors.IsForbidden(errs[i]):
				errs[i] = errors.New("it takes the right to get nodes/proxy; ask the cluster's administrator for it")
			}
		})
	}
	asked.Wait()
	var err error // one of them will do
	if i := slices.IndexFunc(errs, func(err error) bool { return err != nil }); i >= 0 {
		err = errs[i]
	}
	o.learn("who talks to whom is not all shown", err, func(m *measured) {
		old := m.flows
		m.flows = map[string][]api.Flow{}
		for i, n := range nodes {
			m.flows[n.Name] = flows[i]
			if errs[i] != nil {
				m.flows[n.Name] = old[n.Name]
			}
		}
	})
}

// get reads what the API answers at a path.
func (o *Observer) get(ctx context.Context, path string, into any) error {
	data, err := o.rest.Get().AbsPath(path).Do(ctx).Raw() // DoRaw would lose what an error says
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return apierrors.NewInternalError(fmt.Errorf("read the answer of %s: %w", path, err))
	}
	return nil
}

// learn takes what was answered and notes why something was not.
func (o *Observer) learn(without string, err error, take func(*measured)) {
	m := o.measured
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.wrong, without)
	if err != nil {
		m.wrong[without] = without + ": " + oneLine(plain(err))
	}
	take(m)
}

// into adds to a snapshot what is known.
func (m *measured) into(s *Snapshot) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	s.PodUsage, s.NodeUsage, s.Flows, s.Silent = m.pods, m.nodes, m.flows, m.silent
	if !m.silent.IsZero() {
		return // which explains all that is wrong
	}
	for _, what := range slices.Sorted(maps.Keys(m.wrong)) {
		s.Notes = append(s.Notes, m.wrong[what])
	}
}
