package app

import (
	"errors"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
)

// Who may not see everything is shown what they may, and told what is missing.
func TestObserveWhatMayBeSeen(t *testing.T) {
	const (
		onlyShop = "only namespace shop is shown; get the right to view others, or make another one the kubeconfig's"
		noNodes  = "nodes are not shown: it takes the right to list and watch them; ask the cluster's administrator for it"
		few      = "cronjobs, nodes are not shown: it takes the right to list and watch them; ask the cluster's administrator for it"
		noRights = "you may not see what runs (pods is forbidden: no); ask the cluster's administrator for the right to view, or make another namespace the kubeconfig's"
	)
	for name, c := range map[string]struct {
		may   func(resource, namespace string) bool
		notes []string
		pods  int
		nodes []string // nil when they may not be seen
		err   string
	}{
		"everything":    {may: func(string, string) bool { return true }, pods: 2, nodes: []string{"one"}},
		"no nodes":      {may: func(r, _ string) bool { return r != "nodes" }, pods: 2, notes: []string{noNodes}},
		"one namespace": {may: func(_, ns string) bool { return ns == "shop" }, pods: 1, notes: []string{onlyShop, noNodes}},
		"some kinds of one": {
			may: func(r, ns string) bool { return ns == "shop" && r != "cronjobs" }, pods: 1, notes: []string{onlyShop, few},
		},
		"no pods": {may: func(r, _ string) bool { return r != "pods" }, err: noRights},
	} {
		t.Run(name, func(t *testing.T) {
			clients := fake.NewClientset(
				&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "one"}},
				&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "a"}},
				&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "blog", Name: "b"}},
			)
			clients.PrependReactor("list", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
				if r := a.GetResource(); !c.may(r.Resource, a.GetNamespace()) {
					return true, nil, apierrors.NewForbidden(r.GroupResource(), "", errors.New("no"))
				}
				return false, nil, nil
			})
			o, err := (&Cluster{clients: clients, namespace: "shop"}).Observe(t.Context(), time.Minute)
			if c.err != "" {
				if err == nil || err.Error() != c.err {
					t.Fatalf("error %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			s := o.Snapshot()
			if !slices.Equal(s.Notes, c.notes) || len(s.Pods) != c.pods {
				t.Errorf("%d pods, notes %q", len(s.Pods), s.Notes)
			}
			status := Summarize(s, false)
			var nodes []string
			for _, n := range status.Nodes {
				nodes = append(nodes, n.Name)
			}
			if !slices.Equal(nodes, c.nodes) || (c.nodes == nil) != (status.Nodes == nil) {
				t.Errorf("nodes %v", status.Nodes)
			}
		})
	}
}
