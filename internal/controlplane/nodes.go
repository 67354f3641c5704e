package controlplane

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
)

const (
	// nodeController is the name under which controllers patch nodes: the one that divides the pod network, and the
	// one that taints.
	nodeController = "node-controller"
	// nodeSeen is how long a controller waits at most to see its own patch of a node.
	nodeSeen = time.Second
)

// nodeClient is a client for controllers that read nodes from a cache: a patch of a node returns when the cache has it.
// Otherwise the controller that divides the pod network, woken meanwhile by another's change of a new node, would see
// the node without its part and give it a second one, which the API refuses with an event for everyone to see.
type nodeClient struct {
	kubernetes.Interface
	lister  corelisters.NodeLister
	changed *broadcast // after each change of a node in the cache
}

func newNodeClient(client kubernetes.Interface, nodes coreinformers.NodeInformer) (kubernetes.Interface, error) {
	c := nodeClient{client, nodes.Lister(), newBroadcast()}
	if err := c.changed.onChange(nodes.Informer()); err != nil {
		return nil, fmt.Errorf("watch nodes for the controllers: %w", err)
	}
	return c, nil
}

// CoreV1 implements [kubernetes.Interface].
func (c nodeClient) CoreV1() typedcorev1.CoreV1Interface {
	return nodeCore{c.Interface.CoreV1(), c}
}

type nodeCore struct {
	typedcorev1.CoreV1Interface
	client nodeClient
}

func (c nodeCore) Nodes() typedcorev1.NodeInterface {
	return patchedNodes{c.CoreV1Interface.Nodes(), c.client}
}

type patchedNodes struct {
	typedcorev1.NodeInterface
	client nodeClient
}

func (n patchedNodes) Patch(ctx context.Context, name string, kind types.PatchType, data []byte, opts metav1.PatchOptions, sub ...string) (*corev1.Node, error) {
	node, err := n.NodeInterface.Patch(ctx, name, kind, data, opts, sub...)
	if err == nil {
		n.client.wait(ctx, node)
	}
	return node, err
}

// wait returns when the cache has the node as written or a newer one, or after nodeSeen.
func (c nodeClient) wait(ctx context.Context, written *corev1.Node) {
	ctx, cancel := context.WithTimeout(ctx, nodeSeen)
	defer cancel()
	for {
		changed := c.changed.next()
		seen, err := c.lister.Get(written.Name)
		if err != nil || seen.UID != written.UID {
			return // it is gone
		}
		if order, err := resourceversion.CompareResourceVersion(seen.ResourceVersion, written.ResourceVersion); err != nil || order >= 0 {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}
