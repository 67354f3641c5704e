package controlplane

import (
	"errors"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// TestNodeClient patches a node of which the API has version 7 then, while the cache of the controllers is behind.
func TestNodeClient(t *testing.T) {
	node := func(uid types.UID, version string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: uid, ResourceVersion: version}}
	}
	refused := errors.New("refused")
	for name, tt := range map[string]struct {
		patchErr error
		cached   *corev1.Node
		later    *corev1.Node // when set, the patch returns when this is in the cache and not before
	}{
		"the cache is behind":     {cached: node("a", "6"), later: node("a", "7")},
		"the cache skips a beat":  {cached: node("a", "6"), later: node("a", "10")},
		"the cache has it":        {cached: node("a", "7")},
		"the cache is ahead":      {cached: node("a", "10")},
		"the node is gone":        {},
		"the node is another one": {cached: node("b", "6")},
		"the patch is refused":    {cached: node("a", "6"), patchErr: refused},
	} {
		t.Run(name, func(t *testing.T) {
			client := fake.NewClientset()
			client.PrependReactor("patch", "nodes", func(clienttesting.Action) (bool, runtime.Object, error) {
				return true, node("a", "7"), tt.patchErr
			})
			nodes := informers.NewSharedInformerFactory(client, 0).Core().V1().Nodes()
			store := nodes.Informer().GetStore()
			if tt.cached != nil {
				store.Add(tt.cached)
			}
			c := nodeClient{client, nodes.Lister(), newBroadcast()}
			got := make(chan error, 1)
			go func() {
				_, err := c.CoreV1().Nodes().Patch(t.Context(), "n1", types.MergePatchType, []byte("{}"), metav1.PatchOptions{})
				got <- err
			}()
			if tt.later != nil {
				c.changed.send() // of something else
				select {
				case <-got:
					t.Error("did not wait for the cache")
				case <-time.After(20 * time.Millisecond):
				}
				store.Update(tt.later)
				c.changed.send()
			}
			select {
			case err := <-got:
				if !errors.Is(err, tt.patchErr) {
					t.Errorf("got %v, want %v", err, tt.patchErr)
				}
			case <-time.After(patience):
				t.Fatal("still waits")
			}
		})
	}
}
