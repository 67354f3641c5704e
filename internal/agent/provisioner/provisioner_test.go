package provisioner

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/utils/ptr"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after 20 s: %s", what)
		}
	}
}

func class(name, provisioner string, policy v1.PersistentVolumeReclaimPolicy) *storagev1.StorageClass {
	return &storagev1.StorageClass{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner, ReclaimPolicy: &policy,
		VolumeBindingMode: ptr.To(storagev1.VolumeBindingWaitForFirstConsumer),
	}
}

func claim(name, class, node string) *v1.PersistentVolumeClaim {
	c := &v1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name), Annotations: map[string]string{}},
		Spec: v1.PersistentVolumeClaimSpec{
			StorageClassName: &class, AccessModes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce},
			Resources: v1.VolumeResourceRequirements{Requests: v1.ResourceList{v1.ResourceStorage: resource.MustParse("1Gi")}},
		},
	}
	if node != "" {
		c.Annotations[selectedNode] = node
	}
	return c
}

// run runs a provisioner; what it returns waits for its end.
func run(t *testing.T, ctx context.Context, cfg Config) func() {
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, cfg) }()
	return func() {
		t.Helper()
		select {
		case err := <-ended:
			must(t, err)
		case <-time.After(20 * time.Second):
			t.Error("the provisioner does not stop")
		}
	}
}

func TestProvisionAndDelete(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volumes")
	block := claim("block", "local", "n1")
	block.Spec.VolumeMode = ptr.To(v1.PersistentVolumeBlock)
	client := fake.NewClientset(
		class("local", Name, v1.PersistentVolumeReclaimDelete), class("keep", Name, v1.PersistentVolumeReclaimRetain),
		class("other", "example.com/other", v1.PersistentVolumeReclaimDelete),
		claim("here", "local", "n1"), claim("kept", "keep", "n1"),
		claim("elsewhere", "local", "n2"), claim("waiting", "local", ""), claim("foreign", "other", "n1"), block,
	)
	ctx, cancel := context.WithCancel(t.Context())
	defer run(t, ctx, Config{Client: client, NodeName: "n1", Dir: dir})()
	defer cancel()
	volumes := client.CoreV1().PersistentVolumes()
	names := func() []string {
		list, err := volumes.List(ctx, metav1.ListOptions{})
		must(t, err)
		var names []string
		for _, pv := range list.Items {
			names = append(names, pv.Name)
		}
		slices.Sort(names)
		return names
	}
	eventually(t, "two volumes are made", func() bool { return slices.Equal(names(), []string{"pvc-uid-here", "pvc-uid-kept"}) })
	pv, err := volumes.Get(ctx, "pvc-uid-here", metav1.GetOptions{})
	must(t, err)
	info, err := os.Stat(pv.Spec.Local.Path)
	must(t, err)
	if pv.Spec.Local.Path != filepath.Join(dir, pv.Name) || info.Mode().Perm() != 0o777 || pv.Spec.ClaimRef.UID != "uid-here" ||
		pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0] != "n1" || pv.Spec.Capacity.Storage().String() != "1Gi" {
		t.Errorf("%+v", pv.Spec)
	}
	eventually(t, "the impossible claim is told so", func() bool {
		list, err := client.CoreV1().Events("ns").List(ctx, metav1.ListOptions{})
		must(t, err)
		return slices.ContainsFunc(list.Items, func(e v1.Event) bool {
			return e.Reason == "ProvisioningFailed" && e.InvolvedObject.Name == "block"
		})
	})

	// A claim whose node is chosen later.
	waiting := claim("waiting", "local", "n1")
	_, err = client.CoreV1().PersistentVolumeClaims("ns").Update(ctx, waiting, metav1.UpdateOptions{})
	must(t, err)
	eventually(t, "the waiting claim has its volume", func() bool { return slices.Contains(names(), "pvc-uid-waiting") })

	// A bound claim grows, and its volume.
	bound := claim("here", "local", "n1")
	bound.Spec.VolumeName = "pvc-uid-here"
	bound.Spec.Resources.Requests[v1.ResourceStorage] = resource.MustParse("2Gi")
	bound.Status = v1.PersistentVolumeClaimStatus{Phase: v1.ClaimBound, Capacity: v1.ResourceList{v1.ResourceStorage: resource.MustParse("1Gi")}}
	_, err = client.CoreV1().PersistentVolumeClaims("ns").Update(ctx, bound, metav1.UpdateOptions{})
	must(t, err)
	eventually(t, "the claim has grown", func() bool {
		c, err := client.CoreV1().PersistentVolumeClaims("ns").Get(ctx, "here", metav1.GetOptions{})
		must(t, err)
		return c.Status.Capacity.Storage().String() == "2Gi"
	})
	if grown, err := volumes.Get(ctx, "pvc-uid-here", metav1.GetOptions{}); err != nil || grown.Spec.Capacity.Storage().String() != "2Gi" {
		t.Errorf("the volume: %+v, %v", grown, err)
	}

	release := func(name string) {
		pv, err := volumes.Get(ctx, name, metav1.GetOptions{})
		must(t, err)
		must(t, os.WriteFile(filepath.Join(pv.Spec.Local.Path, "data"), nil, 0o600))
		pv.Status.Phase = v1.VolumeReleased
		_, err = volumes.UpdateStatus(ctx, pv, metav1.UpdateOptions{})
		must(t, err)
	}
	// Somebody else's directory under this provisioner's name.
	foreign := pv.DeepCopy()
	foreign.Name, foreign.ResourceVersion = "pvc-forged", ""
	foreign.Spec.Local.Path = t.TempDir()
	_, err = volumes.Create(ctx, foreign, metav1.CreateOptions{})
	must(t, err)
	release("pvc-forged")
	release("pvc-uid-kept")
	release("pvc-uid-here")
	eventually(t, "the released volume is gone", func() bool { return !slices.Contains(names(), "pvc-uid-here") })
	if _, err := os.Stat(filepath.Join(dir, "pvc-uid-here")); !os.IsNotExist(err) {
		t.Errorf("its data is still there: %v", err)
	}
	for _, kept := range []string{filepath.Join(dir, "pvc-uid-kept", "data"), filepath.Join(foreign.Spec.Local.Path, "data")} {
		if _, err := os.Stat(kept); err != nil {
			t.Errorf("what must be kept: %v", err)
		}
	}
	if got, want := names(), []string{"pvc-forged", "pvc-uid-kept", "pvc-uid-waiting"}; !slices.Equal(got, want) {
		t.Errorf("volumes %q, want %q", got, want)
	}
}

// A kill between the directory and its volume leaves the directory, and so
// does a claim that is deleted before it has its volume.
func TestAbandoned(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "volumes")
	directory := func(name string, with ...string) {
		t.Helper()
		must(t, makeDir(filepath.Join(dir, name)))
		for _, file := range with {
			must(t, os.WriteFile(filepath.Join(dir, name, file), nil, 0o600))
		}
	}
	volume := func(name, path, node, maker string) *v1.PersistentVolume {
		c := claim("gone", "local", node)
		pv := (&provisioner{Config: Config{NodeName: node, Dir: dir}}).volumeFor(c, class("local", Name, v1.PersistentVolumeReclaimRetain))
		pv.Name, pv.Spec.Local.Path, pv.Annotations[provisionedBy], pv.Status.Phase = name, path, maker, v1.VolumeReleased
		return pv
	}
	block := claim("waits", "local", "n1")
	block.Spec.VolumeMode = ptr.To(v1.PersistentVolumeBlock) // has its directory, gets no volume
	client := fake.NewClientset(
		class("local", Name, v1.PersistentVolumeReclaimDelete), block,
		volume("pvc-uid-released", filepath.Join(dir, "pvc-uid-released"), "n1", Name),
		volume("pvc-uid-foreign", filepath.Join(dir, "pvc-uid-foreign"), "n1", "example.com/other"),
		volume("pvc-uid-elsewhere", filepath.Join(dir, "pvc-uid-elsewhere"), "n2", Name),
		volume("by-hand", filepath.Join(dir, "pvc-uid-again")+"/", "n1", ""),
	)
	for _, name := range []string{"pvc-uid-never", "pvc-uid-waits", "pvc-uid-released", "pvc-uid-foreign", "pvc-uid-elsewhere", "pvc-uid-again", "something"} {
		directory(name)
	}
	// Deleted by hand, of a class that keeps data.
	directory("pvc-uid-kept", "data")
	ctx, cancel := context.WithCancel(t.Context())
	defer run(t, ctx, Config{Client: client, NodeName: "n1", Dir: dir})()
	defer cancel()
	names := func() []string {
		entries, err := os.ReadDir(dir)
		must(t, err)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	kept := []string{"pvc-uid-again", "pvc-uid-foreign", "pvc-uid-kept", "pvc-uid-released", "pvc-uid-waits", "something"}
	eventually(t, "what was abandoned is gone, and nothing else", func() bool { return slices.Equal(names(), kept) })
	must(t, client.CoreV1().PersistentVolumeClaims("ns").Delete(ctx, "waits", metav1.DeleteOptions{}))
	kept = slices.DeleteFunc(kept, func(name string) bool { return name == "pvc-uid-waits" })
	eventually(t, "what waited is gone, and nothing else", func() bool { return slices.Equal(names(), kept) })
}

func TestRefuse(t *testing.T) {
	for want, spec := range map[string]v1.PersistentVolumeClaimSpec{
		"": {},
		"local volumes are directories; use volumeMode Filesystem":                                                     {VolumeMode: ptr.To(v1.PersistentVolumeBlock)},
		"a claim with a selector cannot be provisioned; leave the selector out, or make the PersistentVolume yourself": {Selector: &metav1.LabelSelector{}},
		"local volumes cannot be made from a data source by tutti yet; leave it out, and copy the data in":             {DataSource: &v1.TypedLocalObjectReference{}},
	} {
		if got := refuse(&v1.PersistentVolumeClaim{Spec: spec}); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
