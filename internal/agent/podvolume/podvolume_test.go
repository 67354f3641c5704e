package podvolume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/volume"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newManager works in a directory of its own, with an API that knows the
// objects and issues tokens that live as long as asked.
func newManager(t *testing.T, objects ...k8sruntime.Object) (*Manager, *fake.Clientset) {
	dir := t.TempDir()
	client := fake.NewClientset(objects...)
	var issued atomic.Int32
	client.PrependReactor("create", "serviceaccounts", func(a k8stesting.Action) (bool, k8sruntime.Object, error) {
		if a.GetSubresource() != "token" {
			return false, nil, nil
		}
		request := a.(k8stesting.CreateAction).GetObject().(*authenticationv1.TokenRequest).DeepCopy()
		if ref := request.Spec.BoundObjectRef; ref == nil || ref.Name != "p" || ref.UID != "uid-1" {
			return true, nil, fmt.Errorf("token is not bound to the pod: %+v", ref)
		}
		request.Status = authenticationv1.TokenRequestStatus{
			Token:               fmt.Sprintf("token-%d", issued.Add(1)),
			ExpirationTimestamp: metav1.NewTime(time.Now().Add(time.Duration(*request.Spec.ExpirationSeconds) * time.Second)),
		}
		return true, request, nil
	})
	resolv := filepath.Join(dir, "machine-resolv.conf")
	must(t, os.WriteFile(resolv, []byte("nameserver 192.0.2.53\nsearch example.com\noptions rotate\n"), 0o644))
	m := NewManager(Config{
		Dir: filepath.Join(dir, "data"), Client: client, NodeName: "n1", ResolvConf: resolv,
		ClusterDNS: netip.MustParseAddr("10.43.0.10"), ClusterDomain: "cluster.local",
		Allocatable: func() v1.ResourceList { return v1.ResourceList{"memory": resource.MustParse("1Gi")} },
	})
	t.Cleanup(func() {
		m.Close()
		must(t, volume.UnmountBelow(dir))
	})
	return m, client
}

func testPod(volumes ...v1.Volume) *v1.Pod {
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "uid-1", Labels: map[string]string{"app": "shop"}},
		Spec:       v1.PodSpec{Volumes: volumes, ServiceAccountName: "sa", DNSPolicy: v1.DNSClusterFirst},
	}
}

func configMap(name, version string, data map[string]string) *v1.ConfigMap {
	return &v1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, ResourceVersion: version}, Data: data}
}

func content(t *testing.T, parts ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	must(t, err)
	return string(b)
}

// eventually waits for a fact on disk that comes about by itself.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not so after 20 s: %s", what)
		}
	}
}

func mode(t *testing.T, path string) unix.Stat_t {
	t.Helper()
	var stat unix.Stat_t
	must(t, unix.Stat(path, &stat))
	return stat
}

func TestFiles(t *testing.T) {
	secret := &v1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "s"}, Data: map[string][]byte{"password": []byte("x"), "other": nil}}
	m, _ := newManager(t, configMap("cm", "1", map[string]string{"a": "A", "b": "B"}),
		configMap(rootCA, "1", map[string]string{"ca.crt": "CA"}), secret)
	pod := testPod(
		v1.Volume{Name: "cm", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}},
		v1.Volume{Name: "none", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "none"}, Optional: ptr.To(true)}}},
		v1.Volume{Name: "s", VolumeSource: v1.VolumeSource{Secret: &v1.SecretVolumeSource{SecretName: "s", DefaultMode: ptr.To[int32](0o400),
			Items: []v1.KeyToPath{{Key: "password", Path: "db/pw", Mode: ptr.To[int32](0o440)}}}}},
		v1.Volume{Name: "down", VolumeSource: v1.VolumeSource{DownwardAPI: &v1.DownwardAPIVolumeSource{Items: []v1.DownwardAPIVolumeFile{
			{Path: "labels", FieldRef: &v1.ObjectFieldSelector{FieldPath: "metadata.labels"}},
			{Path: "memory", ResourceFieldRef: &v1.ResourceFieldSelector{ContainerName: "c", Resource: "limits.memory", Divisor: resource.MustParse("1Mi")}}}}}},
		v1.Volume{Name: "api", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
			{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: ptr.To[int64](3607)}},
			{ConfigMap: &v1.ConfigMapProjection{LocalObjectReference: v1.LocalObjectReference{Name: rootCA}}},
			{DownwardAPI: &v1.DownwardAPIProjection{Items: []v1.DownwardAPIVolumeFile{{Path: "namespace", FieldRef: &v1.ObjectFieldSelector{FieldPath: "metadata.namespace"}}}}},
		}}}},
	)
	pod.Spec.Containers = []v1.Container{{Name: "c"}}
	pod.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: ptr.To[int64](2000)}
	start := time.Now()
	must(t, m.Prepare(t.Context(), pod))
	t.Logf("prepared in %s", time.Since(start))

	at := func(name string) string {
		path, err := m.VolumePath(pod.UID, name)
		must(t, err)
		return path
	}
	for path, want := range map[string]string{
		at("cm") + "/a": "A", at("cm") + "/b": "B", at("s") + "/db/pw": "x",
		at("down") + "/labels": `app="shop"`, at("down") + "/memory": "1024",
		at("api") + "/token": "token-1", at("api") + "/ca.crt": "CA", at("api") + "/namespace": "ns",
	} {
		if got := content(t, path); got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
	if entries, _ := os.ReadDir(at("none")); slices.ContainsFunc(entries, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), "..") }) {
		t.Errorf("an absent optional ConfigMap gave %v", entries)
	}
	if _, err := os.Stat(at("s") + "/other"); !os.IsNotExist(err) {
		t.Errorf("a key that is not among the items: %v", err)
	}
	if stat := mode(t, at("s")+"/db/pw"); stat.Mode&0o777 != 0o440 || stat.Gid != 2000 {
		t.Errorf("secret: mode %o gid %d", stat.Mode&0o777, stat.Gid)
	}
	if stat := mode(t, at("api")+"/token"); stat.Mode&0o777 != 0o640 && stat.Mode&0o777 != 0o440 && stat.Mode&0o007 != 0 || stat.Gid != 2000 {
		t.Errorf("token: mode %o gid %d", stat.Mode&0o777, stat.Gid)
	}
	var memory unix.Statfs_t
	must(t, unix.Statfs(at("s"), &memory))
	if memory.Type != unix.TMPFS_MAGIC {
		t.Error("a secret is on a disk")
	}

	// A writer that was killed leaves its link and its directory.
	halves := []string{at("down") + "/..data_tmp", at("down") + "/..2026_01_02_03_04_05.6"}
	must(t, os.Mkdir(halves[1], 0o755))
	must(t, os.Symlink(filepath.Base(halves[1]), halves[0]))

	// Idempotent, and brings the downward API up to date.
	again := pod.DeepCopy()
	again.Labels["app"] = "other"
	must(t, m.Prepare(t.Context(), again))
	if got := content(t, at("down"), "labels"); got != `app="other"` {
		t.Errorf("labels: %s", got)
	}
	for _, half := range halves {
		if _, err := os.Lstat(half); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", half, err)
		}
	}
	if got := content(t, at("api"), "token"); got != "token-1" {
		t.Errorf("a new token without need: %s", got)
	}

	must(t, m.Remove(t.Context(), pod.UID))
	must(t, m.Remove(t.Context(), pod.UID))
	if _, err := os.Stat(m.layout.Pod(string(pod.UID))); !os.IsNotExist(err) {
		t.Errorf("the pod's directory is still there: %v", err)
	}
	if _, err := os.Stat(m.layout.MemoryPod(string(pod.UID))); !os.IsNotExist(err) {
		t.Errorf("the pod's memory is still there: %v", err)
	}
}

func TestFilesFollowTheirObjects(t *testing.T) {
	m, client := newManager(t, configMap("cm", "1", map[string]string{"a": "old"}))
	optional := v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "later"}, Optional: ptr.To(true)}
	pod := testPod(
		v1.Volume{Name: "cm", VolumeSource: v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}}},
		v1.Volume{Name: "later", VolumeSource: v1.VolumeSource{ConfigMap: &optional}},
		v1.Volume{Name: "token", VolumeSource: v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{
			{ServiceAccountToken: &v1.ServiceAccountTokenProjection{Path: "token", ExpirationSeconds: ptr.To[int64](1)}}}}}},
	)
	must(t, m.Prepare(t.Context(), pod))
	dir := m.layout.MemoryPod("uid-1")
	// The fake API does not tell a new watch what there is already.
	eventually(t, "both are watched", func() bool {
		n := 0
		for _, a := range client.Actions() {
			if a.Matches("watch", "configmaps") {
				n++
			}
		}
		return n == 2
	})
	_, err := client.CoreV1().ConfigMaps("ns").Update(t.Context(), configMap("cm", "2", map[string]string{"a": "new"}), metav1.UpdateOptions{})
	must(t, err)
	_, err = client.CoreV1().ConfigMaps("ns").Create(t.Context(), configMap("later", "3", map[string]string{"b": "came"}), metav1.CreateOptions{})
	must(t, err)
	read := func(parts ...string) string {
		b, _ := os.ReadFile(filepath.Join(append([]string{dir}, parts...)...))
		return string(b)
	}
	eventually(t, "the change is seen", func() bool { return read("configMap", "cm", "a") == "new" })
	eventually(t, "the new object is seen", func() bool { return read("configMap", "later", "b") == "came" })
	eventually(t, "the token is renewed", func() bool { return read("projected", "token", "token") == "token-3" })

	// A pod that read an old version while the others were told of the new.
	late := testPod(pod.Spec.Volumes[0])
	late.UID = "uid-2"
	must(t, m.Prepare(t.Context(), late))
	m.objects.forget("uid-2")
	file := filepath.Join(m.layout.MemoryPod("uid-2"), "configMap", "cm", "..data", "a")
	must(t, os.WriteFile(file, []byte("stale"), 0o600))
	m.objects.use("uid-2", map[key]string{{false, "ns", "cm"}: "1"})
	eventually(t, "the late pod is told as well", func() bool { b, _ := os.ReadFile(file); return string(b) != "stale" })
	must(t, m.Remove(t.Context(), "uid-2"))

	must(t, client.CoreV1().ConfigMaps("ns").Delete(t.Context(), "cm", metav1.DeleteOptions{}))
	must(t, client.CoreV1().ConfigMaps("ns").Delete(t.Context(), "later", metav1.DeleteOptions{}))
	eventually(t, "the optional object is gone", func() bool { return read("configMap", "later", "b") == "" })
	if got := read("configMap", "cm", "a"); got != "new" {
		t.Errorf("what was deleted but is needed: %q", got)
	}
	must(t, m.Remove(t.Context(), pod.UID))
	if n := len(m.objects.watches); n != 0 {
		t.Errorf("%d watches are left", n)
	}
}

func TestImageVolume(t *testing.T) {
	m, _ := newManager(t)
	pod := testPod(v1.Volume{Name: "v", VolumeSource: v1.VolumeSource{Image: &v1.ImageVolumeSource{Reference: "tools:1"}}})
	lower, upper := t.TempDir(), t.TempDir()
	must(t, os.WriteFile(filepath.Join(lower, "below"), []byte("lower"), 0o755))
	must(t, os.WriteFile(filepath.Join(lower, "both"), []byte("lower"), 0o755))
	must(t, os.WriteFile(filepath.Join(upper, "both"), []byte("upper"), 0o755))
	must(t, m.Prepare(t.Context(), pod)) // the image comes with the container's
	must(t, m.MountImage(pod.UID, "v", []string{lower, upper}))
	dir, err := m.VolumePath(pod.UID, "v")
	must(t, err)
	for name, want := range map[string]string{"below": "lower", "both": "upper"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v, want %s", name, got, err, want)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "new"), nil, 0o644); !errors.Is(err, unix.EROFS) {
		t.Errorf("wrote into an image: %v", err)
	}
	mounts, err := m.Mounts(pod, &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{{Name: "v", MountPath: "/v"}}}, 0, nil, nil)
	must(t, err)
	for _, mount := range mounts {
		if mount.Target == "/v" && (mount.Source != dir || !mount.ReadOnly) {
			t.Errorf("mounted as %+v", mount)
		}
	}
	must(t, m.Remove(t.Context(), pod.UID))
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
}

func TestNotReady(t *testing.T) {
	m, client := newManager(t)
	source := func(s v1.VolumeSource) *v1.Pod { return testPod(v1.Volume{Name: "v", VolumeSource: s}) }
	file := filepath.Join(t.TempDir(), "file")
	must(t, os.WriteFile(file, nil, 0o600))
	for name, test := range map[string]struct {
		pod *v1.Pod
		err string
	}{
		"git":          {source(v1.VolumeSource{GitRepo: &v1.GitRepoVolumeSource{}}), `volume type "gitRepo" is not supported by tutti; use a PersistentVolumeClaim, an emptyDir or a hostPath`},
		"huge pages":   {source(v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: "HugePages"}}), `medium "HugePages" of an emptyDir is not supported by tutti yet; leave it out, or use Memory`},
		"trust bundle": {source(v1.VolumeSource{Projected: &v1.ProjectedVolumeSource{Sources: []v1.VolumeProjection{{ClusterTrustBundle: &v1.ClusterTrustBundleProjection{}}}}}), `projected source "clusterTrustBundle" is not supported by tutti yet; leave it out`},
		"config map":   {source(v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "none"}}}), `MountVolume.SetUp failed for volume "v" : configmaps "none" not found`},
		"claim":        {source(v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "none"}}), `persistentvolumeclaims "none" not found`},
		"host path": {source(v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: file, Type: ptr.To(v1.HostPathDirectory)}}),
			`hostPath type check failed: ` + file + ` is not a directory; make it one, or change the type`},
		"host path missing": {source(v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: file + "x", Type: ptr.To(v1.HostPathFile)}}), `hostPath type check failed: ` + file + `x does not exist; make it, or use DirectoryOrCreate`},
	} {
		t.Run(name, func(t *testing.T) {
			defer m.Remove(context.Background(), test.pod.UID)
			if err := m.Prepare(t.Context(), test.pod); err == nil || !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error %v, want %s", err, test.err)
			}
		})
	}
	t.Run("then ready", func(t *testing.T) {
		pod := source(v1.VolumeSource{ConfigMap: &v1.ConfigMapVolumeSource{LocalObjectReference: v1.LocalObjectReference{Name: "cm"}}})
		if err := m.Prepare(t.Context(), pod); err == nil {
			t.Fatal("ready without its ConfigMap")
		}
		_, err := client.CoreV1().ConfigMaps("ns").Create(t.Context(), configMap("cm", "1", nil), metav1.CreateOptions{})
		must(t, err)
		must(t, m.Prepare(t.Context(), pod))
	})
	t.Run("forbidden for a moment", func(t *testing.T) {
		refusals := 3
		client.PrependReactor("get", "secrets", func(k8stesting.Action) (bool, k8sruntime.Object, error) {
			if refusals--; refusals >= 0 {
				return true, nil, apierrors.NewForbidden(v1.Resource("secrets"), "s", nil)
			}
			return true, &v1.Secret{}, nil
		})
		_, err := m.GetSecret(t.Context(), "ns", "s")
		must(t, err)
	})
}

func TestDirectories(t *testing.T) {
	dir := t.TempDir()
	m, client := newManager(t)
	data := filepath.Join(dir, "pv")
	must(t, os.MkdirAll(data, 0o777))
	must(t, os.WriteFile(filepath.Join(data, "rows"), []byte("kept"), 0o600))
	claim := &v1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "claim", UID: "c1"},
		Spec:       v1.PersistentVolumeClaimSpec{VolumeName: "pv"},
	}
	pv := &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: v1.PersistentVolumeSpec{
		ClaimRef:               &v1.ObjectReference{UID: "c1"},
		PersistentVolumeSource: v1.PersistentVolumeSource{Local: &v1.LocalVolumeSource{Path: data}},
	}}
	_, err := client.CoreV1().PersistentVolumeClaims("ns").Create(t.Context(), claim, metav1.CreateOptions{})
	must(t, err)
	_, err = client.CoreV1().PersistentVolumes().Create(t.Context(), pv, metav1.CreateOptions{})
	must(t, err)

	pod := testPod(
		v1.Volume{Name: "disk", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}},
		v1.Volume{Name: "memory", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{Medium: v1.StorageMediumMemory, SizeLimit: ptr.To(resource.MustParse("8Mi"))}}},
		v1.Volume{Name: "host", VolumeSource: v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{Path: filepath.Join(dir, "new"), Type: ptr.To(v1.HostPathDirectoryOrCreate)}}},
		v1.Volume{Name: "pv", VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "claim"}}},
	)
	pod.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: ptr.To[int64](70)}
	if err := m.Prepare(t.Context(), pod); err == nil || !strings.Contains(err.Error(), `PersistentVolumeClaim "claim" is not bound yet`) {
		t.Fatalf("before it is bound: %v", err)
	}
	claim.Status.Phase = v1.ClaimBound
	_, err = client.CoreV1().PersistentVolumeClaims("ns").UpdateStatus(t.Context(), claim, metav1.UpdateOptions{})
	must(t, err)
	block, ceph := pv.DeepCopy(), pv.DeepCopy()
	block.Spec.VolumeMode = ptr.To(v1.PersistentVolumeBlock)
	blockPath := block.DeepCopy()
	blockPath.Spec.PersistentVolumeSource = v1.PersistentVolumeSource{HostPath: &v1.HostPathVolumeSource{Path: data}}
	ceph.Spec.PersistentVolumeSource = v1.PersistentVolumeSource{CephFS: &v1.CephFSPersistentVolumeSource{}}
	for want, wrong := range map[string]*v1.PersistentVolume{
		`PersistentVolume "pv": ` + data + ` is not a block device; name one, or use volumeMode Filesystem`:          block,
		`PersistentVolume "pv": a hostPath is no block device; make it a local volume, or use volumeMode Filesystem`: blockPath,
		`PersistentVolume "pv": volume type "cephfs" is not supported by tutti; use local, hostPath or csi`:          ceph,
	} {
		_, err = client.CoreV1().PersistentVolumes().Update(t.Context(), wrong, metav1.UpdateOptions{})
		must(t, err)
		if err := m.Prepare(t.Context(), pod); err == nil || !strings.HasSuffix(err.Error(), want) {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	_, err = client.CoreV1().PersistentVolumes().Update(t.Context(), pv, metav1.UpdateOptions{})
	must(t, err)
	must(t, m.Prepare(t.Context(), pod))

	c := &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{
		{Name: "disk", MountPath: "/work/disk"},
		{Name: "memory", MountPath: "/work", MountPropagation: ptr.To(v1.MountPropagationHostToContainer)},
		{Name: "host", MountPath: "/host", ReadOnly: true, RecursiveReadOnly: ptr.To(v1.RecursiveReadOnlyEnabled)},
		{Name: "pv", MountPath: "/data", SubPathExpr: "$(NAME)/db"},
		{Name: "pv", MountPath: "/rows", SubPath: "rows"},
	}}
	devices := &v1.Container{Name: "c", VolumeDevices: []v1.VolumeDevice{{Name: "pv"}}}
	if _, err := m.Devices(pod, devices); err == nil || err.Error() != `volume "pv" has volumeMode Filesystem, but is specified in volumeDevices; use volumeMounts` {
		t.Errorf("error %v", err)
	}
	mounts, err := m.Mounts(pod, c, 2, []string{"NAME=shop"}, []string{"10.42.0.7"})
	must(t, err)
	by := map[string]runtime.Mount{}
	order := []string{}
	for _, mount := range mounts {
		by[mount.Target] = mount
		order = append(order, mount.Target)
	}
	if slices.Index(order, "/work") > slices.Index(order, "/work/disk") {
		t.Errorf("a mount before the one it is below: %q", order)
	}
	if by["/work"].Propagation != "rslave" || !by["/host"].RecursiveReadOnly || !by["/host"].ReadOnly {
		t.Errorf("%+v", by)
	}
	for dir, want := range map[string]uint32{by["/work"].Source: 0o3777, by["/work/disk"].Source: 0o2777} {
		if stat := mode(t, dir); stat.Mode&0o7777 != want || stat.Gid != 70 {
			t.Errorf("%s: mode %o gid %d", dir, stat.Mode&0o7777, stat.Gid)
		}
	}
	var memory unix.Statfs_t
	must(t, unix.Statfs(by["/work"].Source, &memory))
	if size := int64(memory.Blocks) * memory.Bsize; memory.Type != unix.TMPFS_MAGIC || size != 8<<20 {
		t.Errorf("memory: type %x size %d", memory.Type, size)
	}
	if got := content(t, by["/rows"].Source); got != "kept" {
		t.Errorf("subPath of a file: %q", got)
	}
	must(t, os.WriteFile(filepath.Join(by["/data"].Source, "f"), nil, 0o600))
	if _, err := os.Stat(filepath.Join(data, "shop", "db", "f")); err != nil {
		t.Errorf("subPathExpr: %v", err)
	}
	if stat := mode(t, filepath.Join(data, "rows")); stat.Gid != 70 || stat.Mode&0o777 != 0o660 {
		t.Errorf("fsGroup: mode %o gid %d", stat.Mode&0o777, stat.Gid)
	}
	if filepath.Base(by["/dev/termination-log"].Source) != "c_2" {
		t.Errorf("termination file: %+v", by["/dev/termination-log"])
	}

	// A new agent over the same directory finds what was there.
	must(t, os.WriteFile(filepath.Join(by["/work"].Source, "mine"), nil, 0o600))
	m2 := NewManager(m.cfg)
	defer m2.Close()
	must(t, m2.Prepare(t.Context(), pod))
	again, err := m2.Mounts(pod, c, 2, []string{"NAME=shop"}, []string{"10.42.0.7"})
	must(t, err)
	if !slices.Equal(mounts, again) {
		t.Errorf("after a restart:\n%+v\nbefore:\n%+v", again, mounts)
	}
	if _, err := os.Stat(filepath.Join(by["/work"].Source, "mine")); err != nil {
		t.Errorf("after a restart: %v", err)
	}

	for _, bad := range []v1.VolumeMount{
		{Name: "pv", MountPath: "/x", SubPath: "../../etc"},
		{Name: "pv", MountPath: "/x", SubPath: "/etc"},
		{Name: "pv", MountPath: "/x", SubPathExpr: "$(NONE)"},
		{Name: "none", MountPath: "/x"},
	} {
		if _, err := m.Mounts(pod, &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{bad}}, 0, nil, nil); err == nil {
			t.Errorf("%+v was mounted", bad)
		}
	}
	// A link in the volume must not lead out of it.
	must(t, os.Symlink("/etc", filepath.Join(data, "out")))
	if _, err := m.Mounts(pod, &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{{Name: "pv", MountPath: "/x", SubPath: "out"}}}, 0, nil, nil); err == nil {
		t.Error("a link led out of the volume")
	}

	must(t, m.Remove(t.Context(), pod.UID))
	if got := content(t, data, "rows"); got != "kept" {
		t.Errorf("removing the pod removed data: %q", got)
	}
}

func TestEtc(t *testing.T) {
	m, _ := newManager(t)
	for name, test := range map[string]struct {
		change func(*v1.Pod)
		file   string
		want   string
	}{
		"cluster first": {func(*v1.Pod) {}, "resolv.conf",
			"search ns.svc.cluster.local svc.cluster.local cluster.local example.com\nnameserver 10.43.0.10\noptions ndots:5\n"},
		"default": {func(p *v1.Pod) { p.Spec.DNSPolicy = v1.DNSDefault }, "resolv.conf",
			"search example.com\nnameserver 192.0.2.53\noptions rotate\n"},
		"host network": {func(p *v1.Pod) { p.Spec.HostNetwork = true }, "resolv.conf",
			"search example.com\nnameserver 192.0.2.53\noptions rotate\n"},
		"host network, cluster first": {func(p *v1.Pod) { p.Spec.HostNetwork, p.Spec.DNSPolicy = true, v1.DNSClusterFirstWithHostNet }, "resolv.conf",
			"search ns.svc.cluster.local svc.cluster.local cluster.local example.com\nnameserver 10.43.0.10\noptions ndots:5\n"},
		"none": {func(p *v1.Pod) {
			p.Spec.DNSPolicy = v1.DNSNone
			p.Spec.DNSConfig = &v1.PodDNSConfig{Nameservers: []string{"192.0.2.1"}, Searches: []string{"corp"}, Options: []v1.PodDNSConfigOption{{Name: "ndots", Value: ptr.To("2")}, {Name: "edns0"}}}
		}, "resolv.conf", "search corp\nnameserver 192.0.2.1\noptions edns0 ndots:2\n"},
		"config over policy": {func(p *v1.Pod) {
			p.Spec.DNSConfig = &v1.PodDNSConfig{Nameservers: []string{"192.0.2.1"}, Options: []v1.PodDNSConfigOption{{Name: "ndots", Value: ptr.To("1")}}}
		}, "resolv.conf", "search ns.svc.cluster.local svc.cluster.local cluster.local example.com\nnameserver 10.43.0.10\nnameserver 192.0.2.1\noptions ndots:1\n"},
		"hostname":           {func(*v1.Pod) {}, "hostname", "p\n"},
		"hostname given":     {func(p *v1.Pod) { p.Spec.Hostname, p.Spec.Subdomain = "db-0", "db" }, "hostname", "db-0\n"},
		"hostname as FQDN":   {func(p *v1.Pod) { p.Spec.Subdomain, p.Spec.SetHostnameAsFQDN = "db", ptr.To(true) }, "hostname", "p.db.ns.svc.cluster.local\n"},
		"hostname override":  {func(p *v1.Pod) { p.Spec.HostnameOverride = ptr.To("a.example.com") }, "hostname", "a.example.com\n"},
		"hostname too long":  {func(p *v1.Pod) { p.Name = strings.Repeat("a", 62) + "-b" }, "hostname", strings.Repeat("a", 62) + "\n"},
		"hosts":              {func(*v1.Pod) {}, "hosts", hostsHead + "10.42.0.7\tp\nfd00::7\tp\n"},
		"hosts in subdomain": {func(p *v1.Pod) { p.Spec.Hostname, p.Spec.Subdomain = "db-0", "db" }, "hosts", hostsHead + "10.42.0.7\tdb-0.db.ns.svc.cluster.local\tdb-0\nfd00::7\tdb-0.db.ns.svc.cluster.local\tdb-0\n"},
		"hosts with aliases": {func(p *v1.Pod) {
			p.Spec.HostAliases = []v1.HostAlias{{IP: "192.0.2.9", Hostnames: []string{"foo", "bar"}}}
		}, "hosts", hostsHead + "10.42.0.7\tp\nfd00::7\tp\n\n# Entries added by HostAliases.\n192.0.2.9\tfoo\tbar\n"},
	} {
		t.Run(name, func(t *testing.T) {
			pod := testPod()
			test.change(pod)
			must(t, m.Prepare(t.Context(), pod))
			defer m.Remove(context.Background(), pod.UID)
			mounts, err := m.Mounts(pod, &v1.Container{Name: "c"}, 0, nil, []string{"10.42.0.7", "fd00::7"})
			must(t, err)
			i := slices.IndexFunc(mounts, func(m runtime.Mount) bool { return m.Target == "/etc/"+test.file })
			if got := content(t, mounts[i].Source); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
	pod := testPod(v1.Volume{Name: "v", VolumeSource: v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}})
	must(t, m.Prepare(t.Context(), pod))
	own := &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{{Name: "v", MountPath: "/etc/hosts"}}}
	mounts, err := m.Mounts(pod, own, 0, nil, []string{"10.42.0.7"})
	must(t, err)
	n := 0
	for _, mount := range mounts {
		if mount.Target == "/etc/hosts" {
			n++
		}
	}
	if n != 1 {
		t.Errorf("/etc/hosts is mounted %d times", n)
	}

	// A container may write to it, and what it wrote must not be read whole.
	c := &v1.Container{Name: "c"}
	mounts, err = m.Mounts(pod, c, 0, nil, []string{"10.42.0.7"})
	must(t, err)
	i := slices.IndexFunc(mounts, func(m runtime.Mount) bool { return m.Target == "/etc/hosts" })
	must(t, os.Truncate(mounts[i].Source, 1<<42))
	_, err = m.Mounts(pod, c, 1, nil, []string{"10.42.0.7"})
	must(t, err)
	if info, err := os.Stat(mounts[i].Source); err != nil || info.Size() > 1<<10 {
		t.Errorf("/etc/hosts is not put right: %v %v", info, err)
	}
}

const hostsHead = `# Kubernetes-managed hosts file.
127.0.0.1	localhost
::1	localhost ip6-localhost ip6-loopback
fe00::0	ip6-localnet
fe00::0	ip6-mcastprefix
fe00::1	ip6-allnodes
fe00::2	ip6-allrouters
`

func TestTerminationMessage(t *testing.T) {
	m, _ := newManager(t)
	pod := testPod()
	must(t, m.Prepare(t.Context(), pod))
	log := filepath.Join(t.TempDir(), "0.log")
	must(t, os.WriteFile(log, []byte("2026-01-02T03:04:05.000000000Z stdout F starting\n2026-01-02T03:04:06.000000000Z stderr F out of cheese\n"), 0o600))
	for name, test := range map[string]struct {
		written string
		policy  v1.TerminationMessagePolicy
		failed  bool
		want    string
	}{
		"file":              {"bye", v1.TerminationMessageReadFile, true, "bye"},
		"nothing":           {"", v1.TerminationMessageReadFile, true, ""},
		"log":               {"", v1.TerminationMessageFallbackToLogsOnError, true, "starting\nout of cheese\n"},
		"file before log":   {"bye", v1.TerminationMessageFallbackToLogsOnError, true, "bye"},
		"no log on success": {"", v1.TerminationMessageFallbackToLogsOnError, false, ""},
		"too long":          {strings.Repeat("x", 5000), v1.TerminationMessageReadFile, true, strings.Repeat("x", 4096)},
		"not text":          {"a\xffb", v1.TerminationMessageReadFile, true, "a?b"},
	} {
		t.Run(name, func(t *testing.T) {
			c := &v1.Container{Name: "c", TerminationMessagePolicy: test.policy}
			mounts, err := m.Mounts(pod, c, 0, nil, nil)
			must(t, err)
			i := slices.IndexFunc(mounts, func(m runtime.Mount) bool { return m.Target == "/dev/termination-log" })
			must(t, os.WriteFile(mounts[i].Source, []byte(test.written), 0o666))
			got, err := m.TerminationMessage(t.Context(), pod, c, 0, log, test.failed)
			must(t, err)
			if got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// A block device is given to containers as such; a volume of an image is
// there before or after the others are.
func TestBlockAndImage(t *testing.T) {
	m, client := newManager(t)
	device := filepath.Join(t.TempDir(), "disk")
	must(t, unix.Mknod(device, unix.S_IFBLK|0o600, int(unix.Mkdev(7, 201))))
	claim := &v1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "claim", UID: "c1"},
		Spec:       v1.PersistentVolumeClaimSpec{VolumeName: "pv"},
		Status:     v1.PersistentVolumeClaimStatus{Phase: v1.ClaimBound},
	}
	must(t, client.Tracker().Add(claim))
	must(t, client.Tracker().Add(&v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: "pv"}, Spec: v1.PersistentVolumeSpec{
		ClaimRef: &v1.ObjectReference{UID: "c1"}, VolumeMode: ptr.To(v1.PersistentVolumeBlock),
		PersistentVolumeSource: v1.PersistentVolumeSource{Local: &v1.LocalVolumeSource{Path: device}},
	}}))
	pod := testPod(
		v1.Volume{Name: "disk", VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "claim", ReadOnly: true}}},
		v1.Volume{Name: "tools", VolumeSource: v1.VolumeSource{Image: &v1.ImageVolumeSource{Reference: "tools"}}},
	)
	layer := t.TempDir()
	must(t, os.MkdirAll(filepath.Join(layer, "bin"), 0o755))
	must(t, m.MountImage(pod.UID, "tools", []string{layer}))
	must(t, m.Prepare(t.Context(), pod))
	must(t, m.MountImage(pod.UID, "tools", []string{layer}))

	devices, err := m.Devices(pod, &v1.Container{VolumeDevices: []v1.VolumeDevice{{Name: "disk", DevicePath: "/dev/xvda"}}})
	must(t, err)
	if want := []runtime.Device{{Source: device, Target: "/dev/xvda", ReadOnly: true}}; !slices.Equal(devices, want) {
		t.Errorf("devices %+v", devices)
	}
	mounted := &v1.Container{VolumeMounts: []v1.VolumeMount{{Name: "disk", MountPath: "/x"}}}
	if _, err := m.Mounts(pod, mounted, 0, nil, nil); err == nil || err.Error() != `volume "disk" has volumeMode Block, but is specified in volumeMounts; use volumeDevices` {
		t.Errorf("error %v", err)
	}
	mounts, err := m.Mounts(pod, &v1.Container{Name: "c", VolumeMounts: []v1.VolumeMount{{Name: "tools", MountPath: "/opt", SubPath: "bin"}}}, 0, nil, nil)
	must(t, err)
	at := slices.IndexFunc(mounts, func(m runtime.Mount) bool { return m.Target == "/opt" })
	if !mounts[at].ReadOnly {
		t.Errorf("mount %+v", mounts[at])
	}
	if err := os.WriteFile(filepath.Join(mounts[at].Source, "f"), nil, 0o600); err == nil {
		t.Error("the image was written to")
	}
	must(t, m.Remove(t.Context(), pod.UID))
	if _, err := os.Stat(filepath.Join(layer, "bin")); err != nil {
		t.Errorf("removing the pod removed the image: %v", err)
	}
}
