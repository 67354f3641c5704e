package compose

import (
	"cmp"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/compose-spec/compose-go/v2/types"
	"github.com/docker/go-units"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

func claim(name string, annotations map[string]string, size string) *corev1.PersistentVolumeClaim {
	return &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: annotationsOf(annotations)},
		Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources:   corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}},
		},
	}
}

// mounts gives the service what it sees beside its image.
func (t *translation) mounts(s types.ServiceConfig, pod *corev1.PodSpec, c *corev1.Container) error {
	m := mounts{pod: pod, container: c, known: map[string]string{}}
	for i, v := range s.Volumes {
		if err := t.mount(s, i, v, &m); err != nil {
			return err
		}
	}
	for i, text := range s.Tmpfs {
		target, options, _ := strings.Cut(text, ":")
		size := int64(0)
		for _, option := range strings.Split(options, ",") {
			name, value, _ := strings.Cut(option, "=")
			switch name {
			case "", "rw", "noexec", "nosuid", "nodev", "exec", "mode", "uid", "gid":
			case "size":
				var err error
				if size, err = units.RAMInBytes(value); err != nil {
					return t.refuse(fmt.Sprintf("%q is no size; write 64m or the like", value), "services", s.Name, "tmpfs", strconv.Itoa(i))
				}
			default:
				return t.refuse(fmt.Sprintf("%q is not to be had; use size", option), "services", s.Name, "tmpfs", strconv.Itoa(i))
			}
		}
		m.add(memoryVolume(size), corev1.VolumeMount{MountPath: target})
	}
	if s.ShmSize > 0 {
		m.add(memoryVolume(int64(s.ShmSize)), corev1.VolumeMount{MountPath: "/dev/shm"})
	}
	for _, f := range s.Configs {
		name := f.Source
		o := types.FileObjectConfig(t.project.Configs[name])
		item := corev1.KeyToPath{Key: keyOf(o), Path: "content", Mode: modeOf(f.Mode)}
		m.add(corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: t.files["configs."+name]}, Items: []corev1.KeyToPath{item},
		}}, corev1.VolumeMount{MountPath: cmp.Or(f.Target, "/"+name), SubPath: "content", ReadOnly: true})
	}
	for _, f := range s.Secrets {
		name := f.Source
		o := types.FileObjectConfig(t.project.Secrets[name])
		item := corev1.KeyToPath{Key: keyOf(o), Path: "content", Mode: modeOf(f.Mode)}
		target := cmp.Or(f.Target, name)
		if !path.IsAbs(target) {
			target = "/run/secrets/" + target
		}
		m.add(corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{
			SecretName: t.files["secrets."+name], Items: []corev1.KeyToPath{item},
		}}, corev1.VolumeMount{MountPath: target, SubPath: "content", ReadOnly: true})
	}
	return nil
}

// mode 0444 is what Docker gives such a file.
func modeOf(m *types.FileMode) *int32 {
	if m == nil {
		return ptr.To(int32(0o444))
	}
	return ptr.To(int32(*m))
}

// mounts collects volumes of a pod; one that is mounted twice is there once.
type mounts struct {
	pod       *corev1.PodSpec
	container *corev1.Container
	known     map[string]string // source → name
}

func (m *mounts) add(source corev1.VolumeSource, mount corev1.VolumeMount) {
	key := source.String()
	name, ok := m.known[key]
	if !ok || source.EmptyDir != nil {
		name = "v" + strconv.Itoa(len(m.pod.Volumes))
		m.known[key] = name
		m.pod.Volumes = append(m.pod.Volumes, corev1.Volume{Name: name, VolumeSource: source})
	}
	mount.Name = name
	m.container.VolumeMounts = append(m.container.VolumeMounts, mount)
}

func memoryVolume(size int64) corev1.VolumeSource {
	e := &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory}
	if size > 0 {
		e.SizeLimit = resource.NewQuantity(size, resource.BinarySI)
	}
	return corev1.VolumeSource{EmptyDir: e}
}

func (t *translation) mount(s types.ServiceConfig, i int, v types.ServiceVolumeConfig, m *mounts) error {
	at := []string{"services", s.Name, "volumes", strconv.Itoa(i)}
	mount := corev1.VolumeMount{MountPath: v.Target, ReadOnly: v.ReadOnly}
	switch v.Type {
	case types.VolumeTypeVolume:
		name := t.claimName(v.Source)
		if v.Source == "" {
			// Nobody gave it a name, but what is in it stays as long as the
			// service does, as with Docker.
			name = s.Name + "-" + objectName(v.Target)
			if err := t.add(claim(name, nil, defaultSize)); err != nil {
				return err
			}
		}
		if v.Volume != nil {
			mount.SubPath = v.Volume.Subpath
		}
		m.add(corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: name}}, mount)
	case types.VolumeTypeBind:
		source, err := t.bind(v, &mount, at)
		if err != nil {
			return err
		}
		m.add(source, mount)
	case types.VolumeTypeTmpfs:
		size := int64(0)
		if v.Tmpfs != nil {
			size = int64(v.Tmpfs.Size)
		}
		m.add(memoryVolume(size), mount)
	case types.VolumeTypeImage:
		if v.Image != nil {
			mount.SubPath = v.Image.SubPath
		}
		mount.ReadOnly = true
		m.add(corev1.VolumeSource{Image: &corev1.ImageVolumeSource{Reference: v.Source}}, mount)
	default:
		return t.refuse(v.Type+" is not to be had; use volume, bind, tmpfs or image", append(at, "type")...)
	}
	return nil
}

// bind is a file or directory of the machine. Docker makes a directory of what
// is not there, unless told not to.
func (t *translation) bind(v types.ServiceVolumeConfig, mount *corev1.VolumeMount, at []string) (corev1.VolumeSource, error) {
	kind := corev1.HostPathUnset
	create := v.Bind == nil || bool(v.Bind.CreateHostPath)
	info, err := os.Stat(v.Source)
	switch {
	case err == nil && info.IsDir():
		kind = corev1.HostPathDirectory
	case err == nil && info.Mode().IsRegular():
		kind = corev1.HostPathFile
	case err == nil: // a socket or a device
	case create:
		kind = corev1.HostPathDirectoryOrCreate
	default:
		return corev1.VolumeSource{}, t.refuse(v.Source+" does not exist; make it, or leave create_host_path out", append(at, "source")...)
	}
	if v.Bind != nil {
		switch v.Bind.Propagation {
		case "", "rprivate", "private":
		case "rslave", "slave":
			mount.MountPropagation = ptr.To(corev1.MountPropagationHostToContainer)
		case "rshared", "shared":
			mount.MountPropagation = ptr.To(corev1.MountPropagationBidirectional)
		}
		switch v.Bind.Recursive {
		case "", "enabled", "writable":
		case "readonly":
			mount.RecursiveReadOnly = ptr.To(corev1.RecursiveReadOnlyEnabled)
		default:
			return corev1.VolumeSource{}, t.refuse("mounts below are always seen; leave it out", slices.Concat(at, []string{"bind", "recursive"})...)
		}
	}
	return corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: filepath.Clean(v.Source), Type: &kind}}, nil
}
