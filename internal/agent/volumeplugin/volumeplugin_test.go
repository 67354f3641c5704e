package volumeplugin

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	k8svolume "k8s.io/kubernetes/pkg/volume"

	"tutti.dev/tutti/internal/host/mount"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The directory that drivers look for is made when the first driver comes,
// and somebody else's is left alone.
func TestHostPath(t *testing.T) {
	dir := t.TempDir()
	data, link := filepath.Join(dir, "data"), filepath.Join(dir, "kubelet")
	t.Cleanup(func() { must(t, mount.UnmountBelow(data)) })
	begin := func() *Plugins {
		p := New(Config{DataDir: data})
		p.link = link
		return p
	}
	p := begin()
	must(t, p.HostPath("/srv"))
	must(t, p.HostPath(link+"ted"))
	if _, err := os.Lstat(data); !os.IsNotExist(err) {
		t.Errorf("made for who has no use for it: %v", err)
	}
	for range 2 {
		p = begin() // as after a restart
		must(t, p.HostPath(link+"/plugins_registry/"))
		must(t, p.HostPath(link+"/pods"))
		if info, err := os.Stat(link + "/plugins_registry"); err != nil || !info.IsDir() || p.root != link {
			t.Errorf("drivers know it as %s: %v", p.root, err)
		}
	}
	// What is mounted there goes to whoever shares the directory.
	must(t, os.Mkdir(link+"/pods/uid", 0o700))
	must(t, unix.Mount("test", link+"/pods/uid", "tmpfs", 0, ""))
	removeEmpty(link + "/pods")
	if !mount.Is(filepath.Join(data, "kubelet", "pods", "uid")) {
		t.Error("a mount was removed with empty directories")
	}
	must(t, mount.Unmount(link+"/pods/uid"))
	removeEmpty(link + "/pods/uid")
	if left, err := os.ReadDir(link + "/pods"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}

	must(t, os.Remove(link))
	must(t, os.Mkdir(link, 0o700))
	p = begin()
	must(t, p.HostPath(link+"/pods"))
	want := link + " belongs to another kubelet; give the driver " + data + "/kubelet as the kubelet's directory"
	if err := p.HostPath(link + "/plugins_registry"); err == nil || err.Error() != want {
		t.Errorf("error %v, want %s", err, want)
	}
	must(t, p.HostPath(data+"/kubelet/plugins_registry"))
	if left, err := os.ReadDir(link); err != nil || len(left) > 0 || p.root != data+"/kubelet" {
		t.Errorf("another's directory has %v, %v; ours is %s", left, err, p.root)
	}
}

// Upstream's managers see of a pod what is made here, and wait for nothing
// else; a pod whose volumes are to go is not there for them.
func TestHeldPods(t *testing.T) {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "u"}, Spec: v1.PodSpec{
		Volumes:        []v1.Volume{{Name: "a"}, {Name: "b"}, {Name: "c"}},
		InitContainers: []v1.Container{{VolumeMounts: []v1.VolumeMount{{Name: "a"}, {Name: "c"}}}},
		Containers:     []v1.Container{{VolumeMounts: []v1.VolumeMount{{Name: "c"}}, VolumeDevices: []v1.VolumeDevice{{Name: "b"}, {Name: "d"}}}},
	}}
	names := func(p *v1.Pod) sets.Set[string] {
		found := sets.Set[string]{}
		for _, v := range p.Spec.Volumes {
			found.Insert(v.Name)
		}
		for _, c := range append(p.Spec.InitContainers, p.Spec.Containers...) {
			for _, m := range c.VolumeMounts {
				found.Insert("mount " + m.Name)
			}
			for _, d := range c.VolumeDevices {
				found.Insert("device " + d.Name)
			}
		}
		return found
	}
	p := New(Config{DataDir: t.TempDir()})
	p.hold(pod, "a")
	if got := names(p.hold(pod, "b")); !got.Equal(sets.New("a", "b", "mount a", "device b")) {
		t.Errorf("held %v", got)
	}
	list := (*podList)(p)
	if got := list.GetPods(); len(got) != 1 || list.ShouldPodRuntimeBeRemoved("u") || !list.ShouldPodRuntimeBeRemoved("other") {
		t.Errorf("pods %v", got)
	}
	// Nothing was ever made: there is nothing to wait for.
	must(t, p.TearDown(t.Context(), types.UID("u")))
	if got := list.GetPods(); len(got) != 0 || !list.ShouldPodContainersBeTerminating("u") {
		t.Errorf("pods %v", got)
	}
}

// What is not made here is made or refused by others.
func TestMakes(t *testing.T) {
	for name, c := range map[string]struct {
		inline v1.VolumeSource
		claim  v1.PersistentVolumeSource
		here   bool
	}{
		"csi":      {v1.VolumeSource{CSI: &v1.CSIVolumeSource{}}, v1.PersistentVolumeSource{CSI: &v1.CSIPersistentVolumeSource{}}, true},
		"nfs":      {v1.VolumeSource{NFS: &v1.NFSVolumeSource{}}, v1.PersistentVolumeSource{NFS: &v1.NFSVolumeSource{}}, true},
		"iscsi":    {v1.VolumeSource{ISCSI: &v1.ISCSIVolumeSource{}}, v1.PersistentVolumeSource{ISCSI: &v1.ISCSIPersistentVolumeSource{}}, true},
		"fc":       {v1.VolumeSource{FC: &v1.FCVolumeSource{}}, v1.PersistentVolumeSource{FC: &v1.FCVolumeSource{}}, true},
		"hostPath": {v1.VolumeSource{HostPath: &v1.HostPathVolumeSource{}}, v1.PersistentVolumeSource{HostPath: &v1.HostPathVolumeSource{}}, false},
		"cephfs":   {v1.VolumeSource{CephFS: &v1.CephFSVolumeSource{}}, v1.PersistentVolumeSource{CephFS: &v1.CephFSPersistentVolumeSource{}}, false},
	} {
		inline := Makes(k8svolume.NewSpecFromVolume(&v1.Volume{VolumeSource: c.inline}))
		claimed := Makes(k8svolume.NewSpecFromPersistentVolume(&v1.PersistentVolume{Spec: v1.PersistentVolumeSpec{PersistentVolumeSource: c.claim}}, false))
		if inline != c.here || claimed != c.here {
			t.Errorf("%s: made here %v, %v, want %v", name, inline, claimed, c.here)
		}
	}
}
