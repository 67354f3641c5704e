package agent

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
)

const manifest = `
apiVersion: v1
kind: Pod
metadata: {name: static}
spec: {containers: [{name: main, image: app, imagePullPolicy: IfNotPresent}]}
`

// A static pod is its manifest's: the API only shows it.
func TestStaticPod(t *testing.T) {
	b := newBench(t)
	api := b.client.CoreV1()
	node, err := api.Nodes().Get(t.Context(), "here", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node.UID = "node-uid"
	if _, err := api.Nodes().Update(t.Context(), node, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(Manifests(b.dir), "static.yaml")
	write := func(text string) {
		t.Helper()
		// It appears complete: what a watch sees half written is an error in the log.
		if err := os.WriteFile(filepath.Join(b.dir, "new"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(b.dir, "new"), file); err != nil {
			t.Fatal(err)
		}
	}
	mirror := func() *v1.Pod {
		p, err := api.Pods("default").Get(context.Background(), "static-here", metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	ready := func() bool { p := mirror(); return p != nil && podutil.IsPodReady(p) }
	starts := func() (n int) {
		for _, note := range b.m.notes() {
			if strings.HasPrefix(note, "start ") {
				n++
			}
		}
		return n
	}

	write(manifest)
	b.until("the mirror is ready", ready)
	first := mirror()
	hash := first.Annotations["kubernetes.io/config.hash"]
	if first.Annotations["kubernetes.io/config.source"] != "file" || hash == "" || first.Annotations["kubernetes.io/config.mirror"] != hash ||
		len(first.OwnerReferences) != 1 || first.OwnerReferences[0].UID != "node-uid" || first.Spec.NodeName != "here" {
		t.Errorf("mirror: %+v", first.ObjectMeta)
	}

	// Deleting the mirror ends nothing, and there is another.
	if err := api.Pods("default").Delete(t.Context(), "static-here", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("the mirror is back", ready)
	if got := b.m.notes(); !slices.Equal(got, []string{"start main 0"}) {
		t.Errorf("did %q", got)
	}

	// A new agent finds it running.
	b.stop()
	b.start()
	b.until("the actor is back", func() bool { return b.agent.staticOf(mirror()) != nil })

	// A manifest that changes is another pod, after the first.
	write(strings.Replace(manifest, "name: static}", "name: static, labels: {a: b}}", 1))
	b.until("the new mirror is ready", func() bool {
		p := mirror()
		return p != nil && podutil.IsPodReady(p) && p.Labels["a"] == "b"
	})
	if got := b.m.notes(); !slices.Equal(got, []string{"start main 0", "terminated main", "close", "start main 0"}) || starts() != 2 {
		t.Errorf("did %q", got)
	}

	// One that goes and comes back is begun anew.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	write(strings.Replace(manifest, "name: static}", "name: static, labels: {a: b}}", 1))
	b.until("it runs anew", func() bool { return starts() == 3 && ready() })

	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	b.until("pod and mirror are gone", func() bool { return mirror() == nil && b.m.notes()[len(b.m.notes())-1] == "close" })
	if len(b.m.workloads()) != 0 {
		t.Errorf("still runs: %v", b.m.workloads())
	}
}
