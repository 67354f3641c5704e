// Package metrics serves metrics.k8s.io in the API server's own process: what nodes and pods use of processors and
// memory, for kubectl top and the HorizontalPodAutoscaler.
//
// The figures come from the endpoint of each node's agent for them, /metrics/resource. Samples are taken when somebody
// asks, at most one in ten seconds, so a cluster in which nobody does pays nothing; whoever asks first in a while waits
// two seconds, between two samples. The window that a figure is an average of, and its end, are as they were.
package metrics

import (
	"context"
	"fmt"
	"log/slog"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/errors"
	metainternal "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/informers"
	listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/kubernetes/pkg/kubelet/client"
	metricsapi "k8s.io/metrics/pkg/apis/metrics"
	"k8s.io/metrics/pkg/apis/metrics/install"
	"k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// Group and Version are what is served.
const (
	Group   = metricsapi.GroupName
	Version = "v1beta1"
)

// Scheme knows the kinds of the group.
var Scheme = newScheme()

func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	install.Install(s)
	metav1.AddToGroupVersion(s, schema.GroupVersion{Version: "v1"})
	return s
}

// Install adds the group to server, which is not running yet. The nodes and pods are those of shared, and nodes' agents
// are called as kubelet says. The server's OpenAPI configuration must know [Scheme].
func Install(server *genericapiserver.GenericAPIServer, shared informers.SharedInformerFactory, kubelet client.KubeletClientConfig, log *slog.Logger) error {
	nodes, pods := shared.Core().V1().Nodes().Lister(), shared.Core().V1().Pods().Lister()
	find := client.NodeGetterFunc(func(_ context.Context, name string, _ metav1.GetOptions) (*v1.Node, error) { return nodes.Get(name) })
	connections, err := client.NewNodeConnectionInfoGetter(find, kubelet)
	if err != nil {
		return fmt.Errorf("make the client of nodes' metrics: %w", err)
	}
	s := newSampler(log, scraper(connections))
	group := genericapiserver.NewDefaultAPIGroupInfo(Group, Scheme, metav1.ParameterCodec, serializer.NewCodecFactory(Scheme))
	group.VersionedResourcesStorageMap[Version] = map[string]rest.Storage{
		"nodes": &nodeMetrics{rest.NewDefaultTableConvertor(v1beta1.Resource("nodes")), nodes, s},
		"pods":  &podMetrics{rest.NewDefaultTableConvertor(v1beta1.Resource("pods")), pods, s},
	}
	if err := server.InstallAPIGroup(&group); err != nil {
		return fmt.Errorf("serve %s: %w", Group, err)
	}
	return nil
}

// matches says whether an object is among those that options choose.
func matches(options *metainternal.ListOptions, o metav1.Object) bool {
	if options == nil {
		return true
	}
	chosen := fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace()}
	return (options.LabelSelector == nil || options.LabelSelector.Matches(labels.Set(o.GetLabels()))) &&
		(options.FieldSelector == nil || options.FieldSelector.Matches(chosen))
}

// nodeMetrics is the resource nodes.
type nodeMetrics struct {
	rest.TableConvertor
	nodes   listers.NodeLister
	sampler *sampler
}

var (
	_ rest.Getter               = (*nodeMetrics)(nil)
	_ rest.Lister               = (*nodeMetrics)(nil)
	_ rest.Scoper               = (*nodeMetrics)(nil)
	_ rest.KindProvider         = (*nodeMetrics)(nil)
	_ rest.SingularNameProvider = (*nodeMetrics)(nil)
)

// New implements [rest.Storage].
func (*nodeMetrics) New() runtime.Object { return &metricsapi.NodeMetrics{} }

// NewList implements [rest.Lister].
func (*nodeMetrics) NewList() runtime.Object { return &metricsapi.NodeMetricsList{} }

// Destroy implements [rest.Storage].
func (*nodeMetrics) Destroy() {}

// Kind implements [rest.KindProvider].
func (*nodeMetrics) Kind() string { return "NodeMetrics" }

// NamespaceScoped implements [rest.Scoper].
func (*nodeMetrics) NamespaceScoped() bool { return false }

// GetSingularName implements [rest.SingularNameProvider].
func (*nodeMetrics) GetSingularName() string { return "node" }

// Get implements [rest.Getter]. A node without figures is not found.
func (m *nodeMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	notFound := errors.NewNotFound(v1beta1.Resource("nodes"), name)
	node, err := m.nodes.Get(name)
	if err != nil {
		return nil, notFound
	}
	found, err := m.of(ctx, []*v1.Node{node})
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, notFound
	}
	return &found[0], nil
}

// List implements [rest.Lister]. Nodes without figures are left out.
func (m *nodeMetrics) List(ctx context.Context, options *metainternal.ListOptions) (runtime.Object, error) {
	all, err := m.nodes.List(labels.Everything())
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	m.sampler.forget(func(name string) bool {
		_, err := m.nodes.Get(name)
		return err != nil
	})
	var nodes []*v1.Node
	for _, n := range all {
		if matches(options, n) {
			nodes = append(nodes, n)
		}
	}
	items, err := m.of(ctx, nodes)
	if err != nil {
		return nil, err
	}
	return &metricsapi.NodeMetricsList{Items: items}, nil
}

func (m *nodeMetrics) of(ctx context.Context, nodes []*v1.Node) ([]metricsapi.NodeMetrics, error) {
	var names []string
	for _, n := range nodes {
		names = append(names, n.Name)
	}
	histories, err := m.sampler.histories(ctx, names)
	if err != nil {
		return nil, err
	}
	items := []metricsapi.NodeMetrics{}
	for _, n := range nodes {
		if h, ok := histories[n.Name]; ok {
			if f := ofNode(n, h.older, h.newer); f != nil {
				items = append(items, *f)
			}
		}
	}
	return items, nil
}

// podMetrics is the resource pods.
type podMetrics struct {
	rest.TableConvertor
	pods    listers.PodLister
	sampler *sampler
}

var (
	_ rest.Getter               = (*podMetrics)(nil)
	_ rest.Lister               = (*podMetrics)(nil)
	_ rest.Scoper               = (*podMetrics)(nil)
	_ rest.KindProvider         = (*podMetrics)(nil)
	_ rest.SingularNameProvider = (*podMetrics)(nil)
)

// New implements [rest.Storage].
func (*podMetrics) New() runtime.Object { return &metricsapi.PodMetrics{} }

// NewList implements [rest.Lister].
func (*podMetrics) NewList() runtime.Object { return &metricsapi.PodMetricsList{} }

// Destroy implements [rest.Storage].
func (*podMetrics) Destroy() {}

// Kind implements [rest.KindProvider].
func (*podMetrics) Kind() string { return "PodMetrics" }

// NamespaceScoped implements [rest.Scoper].
func (*podMetrics) NamespaceScoped() bool { return true }

// GetSingularName implements [rest.SingularNameProvider].
func (*podMetrics) GetSingularName() string { return "pod" }

// Get implements [rest.Getter]. A pod without figures is not found.
func (m *podMetrics) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	notFound := errors.NewNotFound(v1beta1.Resource("pods"), name)
	pod, err := m.pods.Pods(request.NamespaceValue(ctx)).Get(name)
	if err != nil {
		return nil, notFound
	}
	found, err := m.of(ctx, []*v1.Pod{pod})
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, notFound
	}
	return &found[0], nil
}

// List implements [rest.Lister]. Pods without figures are left out.
func (m *podMetrics) List(ctx context.Context, options *metainternal.ListOptions) (runtime.Object, error) {
	all, err := m.pods.Pods(request.NamespaceValue(ctx)).List(labels.Everything())
	if err != nil {
		return nil, fmt.Errorf("list pods: %w", err)
	}
	var pods []*v1.Pod
	for _, p := range all {
		if matches(options, p) {
			pods = append(pods, p)
		}
	}
	items, err := m.of(ctx, pods)
	if err != nil {
		return nil, err
	}
	return &metricsapi.PodMetricsList{Items: items}, nil
}

// of asks only the nodes that pods are on.
func (m *podMetrics) of(ctx context.Context, pods []*v1.Pod) ([]metricsapi.PodMetrics, error) {
	asked := map[string]bool{}
	var names []string
	for _, p := range pods {
		if n := p.Spec.NodeName; n != "" && p.Status.Phase == v1.PodRunning && !asked[n] {
			asked[n] = true
			names = append(names, n)
		}
	}
	histories, err := m.sampler.histories(ctx, names)
	if err != nil {
		return nil, err
	}
	items := []metricsapi.PodMetrics{}
	for _, p := range pods {
		if h, ok := histories[p.Spec.NodeName]; ok && p.Status.Phase == v1.PodRunning {
			if f := ofPod(p, h.older, h.newer); f != nil {
				items = append(items, *f)
			}
		}
	}
	return items, nil
}
