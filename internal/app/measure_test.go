package app

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// What is measured comes into the snapshot; what cannot be is explained; and
// an API that does not answer is told from one that refuses.
func TestMeasure(t *testing.T) {
	answers := map[string]string{
		"/version":                           `{}`,
		"/apis/metrics.k8s.io/v1beta1/pods":  `{"items":[{"metadata":{"namespace":"shop","name":"db-0"},"containers":[{"usage":{"cpu":"250m","memory":"1Mi"}},{"usage":{"cpu":"1","memory":"2Mi"}}]}]}`,
		"/apis/metrics.k8s.io/v1beta1/nodes": `{"items":[{"metadata":{"name":"one"},"usage":{"cpu":"2","memory":"1Gi"}}]}`,
		"/api/v1/nodes/one/proxy/flows":      `[{"protocol":"tcp","from":"10.42.0.2","to":"10.43.0.7:80","at":"10.42.0.3:8080","open":3}]`,
		"/api/v1/nodes/two/proxy/flows":      `[]`,
	}
	refused := map[string]int{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := refused[r.URL.Path]; code != 0 {
			http.Error(w, "refused for the test", code)
			return
		}
		_, _ = w.Write([]byte(answers[r.URL.Path]))
	}))
	defer server.Close()
	c, err := Connect(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	o := &Observer{rest: c.clients.Discovery().RESTClient(), stores: map[string]cache.Store{nodesKind: cache.NewStore(cache.MetaNamespaceKeyFunc)}, measured: &measured{wrong: map[string]string{}}}
	for _, name := range []string{"one", "two"} {
		if err := o.stores[nodesKind].Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}); err != nil {
			t.Fatal(err)
		}
	}
	ask := func() (s Snapshot) {
		o.askAPI(t.Context())
		o.askUsage(t.Context())
		o.askFlows(t.Context())
		o.measured.into(&s)
		return s
	}
	known := func(when string, s Snapshot) {
		t.Helper()
		if u := s.PodUsage[types.NamespacedName{Namespace: "shop", Name: "db-0"}]; u != (Usage{1.25, 3 << 20}) {
			t.Errorf("%s: the pod uses %+v", when, u)
		}
		if u := s.NodeUsage["one"]; u != (Usage{2, 1 << 30}) {
			t.Errorf("%s: the node uses %+v", when, u)
		}
		if f := s.Flows["one"]; len(f) != 1 || f[0].Open != 3 || f[0].At.String() != "10.42.0.3:8080" {
			t.Errorf("%s: flows are %+v", when, f)
		}
	}

	s := ask()
	known("at first", s)
	if len(s.Notes) > 0 || !s.Silent.IsZero() {
		t.Errorf("all is well, but: %+v", s)
	}

	refused = map[string]int{"/apis/metrics.k8s.io/v1beta1/pods": http.StatusNotFound, "/api/v1/nodes/two/proxy/flows": http.StatusForbidden}
	s = ask()
	known("refused", s)
	if notes := strings.Join(s.Notes, "\n"); len(s.Notes) != 2 || !strings.Contains(notes, "this cluster has no metrics API; install a metrics server") || !strings.Contains(notes, "it takes the right to get nodes/proxy; ask the cluster's administrator for it") || !s.Silent.IsZero() {
		t.Errorf("notes are %q, silent since %v", notes, s.Silent)
	}
	refused = map[string]int{"/apis/metrics.k8s.io/v1beta1/pods": http.StatusServiceUnavailable}
	if s = ask(); len(s.Notes) != 1 || !strings.Contains(s.Notes[0], "unable to handle the request") || !s.Silent.IsZero() {
		t.Errorf("notes are %q, silent since %v", s.Notes, s.Silent)
	}
	refused = nil
	if s = ask(); len(s.Notes) > 0 {
		t.Errorf("all is well again, but: %q", s.Notes)
	}

	server.Close()
	s = ask()
	known("silent", s)
	if s.Silent.IsZero() || len(s.Notes) > 0 {
		t.Errorf("silent since %v, notes are %q", s.Silent, s.Notes)
	}
	if again := ask(); again.Silent != s.Silent {
		t.Errorf("silent since %v, then since %v", s.Silent, again.Silent)
	}
	if st := Summarize(s, false); st.Ready || st.Silent == nil {
		t.Errorf("status is %+v", st)
	}
}
