package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
)

// Cluster is a Kubernetes cluster to deploy to.
type Cluster struct {
	host      string // URL of its API
	namespace string // the kubeconfig's, to look in when not all may be seen
	dynamic   dynamic.Interface
	clients   kubernetes.Interface
	mapper    *restmapper.DeferredDiscoveryRESTMapper
}

// Connect makes the clients for a cluster. It does not talk to it yet.
func Connect(config *rest.Config) (*Cluster, error) {
	config = rest.CopyConfig(config)
	config.QPS = -1 // the server knows best when to slow us down
	config.UserAgent = "tutti"
	config.WarningHandler = rest.NoWarnings{}
	http, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	dyn, err := dynamic.NewForConfigAndClient(config, http)
	if err != nil {
		return nil, err
	}
	clients, err := kubernetes.NewForConfigAndClient(config, http)
	if err != nil {
		return nil, err
	}
	disco, err := discovery.NewDiscoveryClientForConfigAndClient(config, http)
	if err != nil {
		return nil, err
	}
	return &Cluster{
		host: config.Host, dynamic: dyn, clients: clients,
		mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(disco)),
	}, nil
}

// Load connects to the cluster of a kubeconfig's current context; kubeconfig
// may be a list of files as in the variable KUBECONFIG. The context's
// namespace is returned, "default" when it has none.
func Load(kubeconfig string) (c *Cluster, namespace string, err error) {
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: strings.Split(kubeconfig, ":")}
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil)
	config, err := loader.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, "", fmt.Errorf("%s is no kubeconfig, or an empty one; set KUBECONFIG to another, or unset it for this machine's", kubeconfig)
	}
	if err != nil {
		var file *fs.PathError
		if errors.As(err, &file) || !strings.Contains(err.Error(), "couldn't get version/kind") {
			return nil, "", fmt.Errorf("read kubeconfig: %w", err)
		}
		return nil, "", fmt.Errorf("%s is no kubeconfig; set KUBECONFIG to another, or unset it for this machine's", kubeconfig)
	}
	namespace, _, err = loader.Namespace()
	if err != nil {
		return nil, "", fmt.Errorf("read kubeconfig: %w", err)
	}
	if c, err = Connect(config); err == nil {
		c.namespace = namespace
	}
	return c, namespace, err
}

// errUnknownKind says that the cluster does not serve a kind.
var errUnknownKind = errors.New("this cluster does not know the kind; install its definition first")

// resource finds how a kind is called and whether it lives in namespaces.
func (c *Cluster) resource(gvk schema.GroupVersionKind) (*meta.RESTMapping, error) {
	m, err := c.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if meta.IsNoMatchError(err) {
		return nil, fmt.Errorf("%w (%s)", errUnknownKind, gvk.GroupVersion())
	}
	return m, err
}

// client is for the objects of one kind; namespace is for those that live in one.
func (c *Cluster) client(m *meta.RESTMapping, namespace string) dynamic.ResourceInterface {
	r := c.dynamic.Resource(m.Resource)
	if m.Scope.Name() == meta.RESTScopeNameNamespace {
		return r.Namespace(namespace)
	}
	return r
}

// hasNamespace says whether a namespace is there, and whether this
// application made it.
func (c *Cluster) hasNamespace(ctx context.Context, name string) (labels map[string]string, there bool, err error) {
	ns, err := c.clients.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if notFound(err) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("look up namespace %s: %w", name, err)
	}
	return ns.Labels, ns.DeletionTimestamp == nil, nil
}
