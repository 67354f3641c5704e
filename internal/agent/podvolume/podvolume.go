// Package podvolume makes the volumes of pods and the files that every
// container gets besides: /etc/hosts, /etc/hostname, /etc/resolv.conf and the
// termination message. It translates the API's volumes to the directories and
// mounts of package volume.
package podvolume

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	resourcehelper "k8s.io/component-helpers/resource"
	k8svolume "k8s.io/kubernetes/pkg/volume"

	"tutti.dev/tutti/internal/agent/volumeplugin"
	"tutti.dev/tutti/internal/volume"
)

// Config is what a Manager works with.
type Config struct {
	Dir           string // data directory
	Client        kubernetes.Interface
	NodeName      string
	ClusterDNS    netip.Addr
	ClusterDomain string
	// ResolvConf is the resolver file of the machine; "" finds it.
	ResolvConf string
	// Allocatable is what the node can give, for downward API volumes.
	Allocatable func() v1.ResourceList
	// Event reports something to the pod's owner; type is Normal or Warning.
	// May be nil.
	Event func(pod *v1.Pod, eventType, reason, message string)
	// Plugins make the volumes that others provide; nil is by none.
	Plugins *volumeplugin.Plugins
	Log     *slog.Logger // may be nil
}

// Manager makes volumes, keeps them fresh while their pod exists, and removes
// them. All methods are safe for concurrent use. What it made is on disk: a
// new Manager over the same directory goes on with it.
type Manager struct {
	cfg     Config
	layout  volume.Layout
	objects *objects
	resolve resolver

	memory struct {
		sync.Mutex
		mounted bool
	}

	mu   sync.Mutex
	pods map[types.UID]*pod
}

// pod is what is known of a pod's volumes; its mutex is held while they are
// made, refreshed or removed.
type pod struct {
	ctx    context.Context // ends when the pod is removed
	cancel context.CancelFunc

	mu      sync.Mutex
	pod     *v1.Pod
	made    map[string]made
	done    bool // every volume is made
	removed bool
	files   filesState
}

// made is a volume that is ready to be mounted, or, if it is a block device,
// given to containers as such.
type made struct {
	path     string
	readOnly bool
	block    bool
	plugin   bool // made by one
}

// NewManager returns a Manager. Close ends its watches.
func NewManager(cfg Config) *Manager {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Event == nil {
		cfg.Event = func(*v1.Pod, string, string, string) {}
	}
	if cfg.Allocatable == nil {
		cfg.Allocatable = func() v1.ResourceList { return nil }
	}
	m := &Manager{cfg: cfg, layout: volume.Layout(cfg.Dir), pods: map[types.UID]*pod{}}
	m.objects = newObjects(cfg.Client, cfg.Log, m.changed)
	m.resolve = newResolver(cfg)
	return m
}

// Close ends all watches and timers. Volumes stay as they are.
func (m *Manager) Close() {
	m.objects.close()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range m.pods {
		p.mu.Lock()
		p.files.stopTimer()
		p.removed = true
		p.mu.Unlock()
	}
}

// Prepare makes every volume of the pod and returns when all are ready to be
// mounted. It is idempotent: called again for a pod whose labels or
// annotations have changed, it brings downward API volumes up to date. An
// error names the volume (event FailedMount); the caller tries again.
func (m *Manager) Prepare(ctx context.Context, obj *v1.Pod) error {
	p := m.known(obj.UID)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed {
		return fmt.Errorf("prepare volumes of pod %s/%s: it has been removed", obj.Namespace, obj.Name)
	}
	told := p.pod
	p.pod = obj
	if p.done {
		if reflect.DeepEqual(told.Labels, obj.Labels) && reflect.DeepEqual(told.Annotations, obj.Annotations) {
			return nil
		}
		err := m.writeFiles(ctx, p, usesDownwardAPI)
		if err != nil {
			p.pod = told
		}
		return err
	}
	if err := m.writeResolvConf(obj); err != nil {
		return err
	}

	type result struct {
		name string
		made made
	}
	results := make(chan result, len(obj.Spec.Volumes))
	var work errgroup.Group
	for i := range obj.Spec.Volumes {
		v := &obj.Spec.Volumes[i]
		if _, ok := p.made[v.Name]; ok || filesOf(v) != nil || v.Image != nil {
			continue
		}
		attempt := func() error {
			done, err := m.make(ctx, obj, v)
			if err != nil {
				return setUpError(v.Name, err)
			}
			results <- result{v.Name, done}
			return nil
		}
		if v.EmptyDir != nil || v.HostPath != nil {
			// Nothing to wait for.
			if err := attempt(); err != nil {
				return errors.Join(err, work.Wait())
			}
			continue
		}
		work.Go(attempt)
	}
	err := errors.Join(m.writeFiles(ctx, p, always), work.Wait())
	close(results)
	for r := range results {
		p.made[r.name] = r.made
	}
	p.done = err == nil
	return err
}

// known is what is known of a pod, which may be new.
func (m *Manager) known(uid types.UID) *pod {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.pods[uid]
	if p == nil {
		p = &pod{made: map[string]made{}}
		p.ctx, p.cancel = context.WithCancel(m.objects.ctx)
		m.pods[uid] = p
	}
	return p
}

// MountImage makes the layers of an image, lowest first, the volume of that
// name. Prepare leaves volumes of images to it, as they come with the images
// of the containers that mount them. It can be repeated; a pod that has seen
// an image goes on with that one, whatever its name stands for later.
func (m *Manager) MountImage(uid types.UID, name string, layers []string) error {
	p := m.known(uid)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.removed {
		return fmt.Errorf("volume %q: the pod has been removed", name)
	}
	dir := m.layout.Volume(string(uid), "image", name)
	if err := volume.Layers(dir, layers); err != nil {
		return setUpError(name, err)
	}
	p.made[name] = made{path: dir, readOnly: true}
	return nil
}

// setUpError uses the words that people search for.
func setUpError(name string, err error) error {
	return fmt.Errorf("MountVolume.SetUp failed for volume %q : %w", name, err)
}

// Remove takes away everything Prepare and Mounts made for the pod. Nothing
// of the pod may be running. It can be repeated, and needs no Prepare before
// it. Data in persistent volumes and host paths stays.
func (m *Manager) Remove(ctx context.Context, uid types.UID) error {
	if uid == "" || strings.ContainsAny(string(uid), "/.") {
		return fmt.Errorf("remove volumes of pod %q: not a UID", uid)
	}
	m.mu.Lock()
	p := m.pods[uid]
	delete(m.pods, uid)
	m.mu.Unlock()
	if p != nil {
		p.cancel()
		p.mu.Lock()
		defer p.mu.Unlock()
		p.removed = true
		p.files.stopTimer()
		m.objects.forget(uid)
	}
	dir := m.layout.Pod(string(uid))
	// They are parts of volumes, which are in use while these are there.
	errs := []error{volume.Remove(filepath.Join(dir, "volume-subpaths"))}
	if m.cfg.Plugins != nil {
		errs = append(errs, m.cfg.Plugins.TearDown(ctx, uid))
	}
	errs = append(errs, volume.Remove(filepath.Join(dir, "volumes")))
	// Nothing is ever mounted in these.
	for _, plain := range []string{filepath.Join(dir, "etc"), filepath.Join(dir, "termination"), m.layout.MemoryPod(string(uid))} {
		errs = append(errs, os.RemoveAll(plain))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove volumes of pod %s: %w", uid, err)
	}
	// Others keep things of the pod here too.
	_ = os.Remove(dir)
	return nil
}

// VolumePath returns where a prepared volume of the pod is on this machine.
func (m *Manager) VolumePath(uid types.UID, name string) (string, error) {
	v, err := m.madeVolume(uid, name)
	return v.path, err
}

func (m *Manager) madeVolume(uid types.UID, name string) (made, error) {
	m.mu.Lock()
	p := m.pods[uid]
	m.mu.Unlock()
	if p == nil {
		return made{}, fmt.Errorf("volume %q: the pod's volumes are not prepared", name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	v, ok := p.made[name]
	if !ok {
		return made{}, fmt.Errorf("volume %q is not prepared", name)
	}
	return v, nil
}

// GetConfigMap reads a ConfigMap for a pod of this node.
func (m *Manager) GetConfigMap(ctx context.Context, namespace, name string) (*v1.ConfigMap, error) {
	return m.objects.configMap(ctx, namespace, name)
}

// GetSecret reads a Secret for a pod of this node.
func (m *Manager) GetSecret(ctx context.Context, namespace, name string) (*v1.Secret, error) {
	return m.objects.secret(ctx, namespace, name)
}

// make makes a volume that is not written from objects of the API.
func (m *Manager) make(ctx context.Context, pod *v1.Pod, v *v1.Volume) (made, error) {
	switch {
	case v.EmptyDir != nil:
		return m.makeEmptyDir(pod, v)
	case v.HostPath != nil:
		return m.makeHostPath(v.HostPath)
	case v.PersistentVolumeClaim != nil:
		return m.makeClaim(ctx, pod, v.Name, v.PersistentVolumeClaim.ClaimName, v.PersistentVolumeClaim.ReadOnly, nil)
	case v.Ephemeral != nil:
		return m.makeClaim(ctx, pod, v.Name, pod.Name+"-"+v.Name, false, v)
	}
	if m.cfg.Plugins != nil && volumeplugin.Makes(k8svolume.NewSpecFromVolume(v)) {
		return m.makeByPlugin(ctx, pod, v.Name)
	}
	return made{}, fmt.Errorf("volume type %s is not supported by tutti; use a PersistentVolumeClaim, an emptyDir or a hostPath", sourceName(v.VolumeSource))
}

func (m *Manager) makeByPlugin(ctx context.Context, pod *v1.Pod, name string) (made, error) {
	v, err := m.cfg.Plugins.SetUp(ctx, pod, name)
	return made{path: v.Path, readOnly: v.ReadOnly, block: v.Block, plugin: true}, err
}

func (m *Manager) makeHostPath(source *v1.HostPathVolumeSource) (made, error) {
	if m.cfg.Plugins != nil {
		if err := m.cfg.Plugins.HostPath(source.Path); err != nil {
			return made{}, err
		}
	}
	return made{path: source.Path}, checkHostPath(source)
}

// sourceName is the API's name of the field that is set in a volume source.
func sourceName(source any) string {
	value := reflect.ValueOf(source)
	for i := range value.NumField() {
		if f := value.Field(i); f.Kind() == reflect.Pointer && !f.IsNil() {
			name, _, _ := strings.Cut(value.Type().Field(i).Tag.Get("json"), ",")
			return fmt.Sprintf("%q", name)
		}
	}
	return "without a source"
}

func (m *Manager) makeEmptyDir(pod *v1.Pod, v *v1.Volume) (made, error) {
	dir := m.layout.Volume(string(pod.UID), "emptyDir", v.Name)
	mode, gid := fs.FileMode(0o777), 0
	if group := fsGroup(pod); group != nil {
		mode, gid = mode|fs.ModeSetgid, int(*group)
	}
	switch medium := v.EmptyDir.Medium; medium {
	case v1.StorageMediumMemory:
		// Sticky, as the kernel makes any tmpfs and the kubelet leaves it.
		return made{path: dir}, volume.Tmpfs{Size: memorySize(pod, v.EmptyDir), Mode: mode | fs.ModeSticky, GID: gid}.Mount(dir)
	case v1.StorageMediumDefault:
	default:
		return made{}, fmt.Errorf("medium %q of an emptyDir is not supported by tutti yet; leave it out, or use Memory", medium)
	}
	if _, err := os.Lstat(dir); err == nil {
		return made{path: dir}, nil
	}
	// It appears complete or not at all.
	unfinished := dir + ".new"
	if err := os.MkdirAll(unfinished, 0o755); err != nil {
		return made{}, err
	}
	if err := errors.Join(os.Chown(unfinished, 0, gid), os.Chmod(unfinished, mode)); err != nil {
		return made{}, err
	}
	return made{path: dir}, os.Rename(unfinished, dir)
}

// memorySize is the smaller of what the volume and the pod are limited to; 0
// is the kernel's default.
func memorySize(pod *v1.Pod, source *v1.EmptyDirVolumeSource) int64 {
	var size int64
	if limit, ok := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})[v1.ResourceMemory]; ok && everyContainerLimited(pod) {
		size = limit.Value()
	}
	if source.SizeLimit != nil && !source.SizeLimit.IsZero() && (size == 0 || source.SizeLimit.Value() < size) {
		size = source.SizeLimit.Value()
	}
	return size
}

func everyContainerLimited(pod *v1.Pod) bool {
	if pod.Spec.Resources != nil {
		if _, ok := pod.Spec.Resources.Limits[v1.ResourceMemory]; ok {
			return true
		}
	}
	for _, c := range pod.Spec.Containers {
		if c.Resources.Limits.Memory().IsZero() {
			return false
		}
	}
	return true
}

func fsGroup(pod *v1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

// owned makes the pod's fsGroup own what is below dir.
func owned(pod *v1.Pod, dir string, readOnly bool) error {
	if fsGroup(pod) == nil {
		return nil
	}
	// A local volume may be a link to its directory: what counts is there.
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return err
	}
	return k8svolume.NewVolumeOwnership(attributes{readOnly: readOnly}, dir, fsGroup(pod),
		pod.Spec.SecurityContext.FSGroupChangePolicy, nil).ChangePermissions()
}

// attributes is all of a Mounter that the change of ownership looks at.
type attributes struct {
	k8svolume.Mounter
	readOnly bool
}

func (a attributes) GetAttributes() k8svolume.Attributes {
	return k8svolume.Attributes{ReadOnly: a.readOnly, Managed: true}
}

func checkHostPath(source *v1.HostPathVolumeSource) error {
	wanted := v1.HostPathUnset
	if source.Type != nil {
		wanted = *source.Type
	}
	info, err := os.Stat(source.Path)
	if errors.Is(err, fs.ErrNotExist) {
		switch wanted {
		case v1.HostPathUnset, v1.HostPathDirectoryOrCreate:
			return os.MkdirAll(source.Path, 0o755)
		case v1.HostPathFileOrCreate:
			file, err := os.OpenFile(source.Path, os.O_CREATE|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			return file.Close()
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("hostPath type check failed: %s does not exist; make it, or use DirectoryOrCreate", source.Path)
	}
	if err != nil {
		return fmt.Errorf("hostPath type check failed: %w", err)
	}
	kinds := map[v1.HostPathType]struct {
		is   bool
		what string
	}{
		v1.HostPathDirectory:         {info.IsDir(), "a directory"},
		v1.HostPathDirectoryOrCreate: {info.IsDir(), "a directory"},
		v1.HostPathFile:              {info.Mode().IsRegular(), "a file"},
		v1.HostPathFileOrCreate:      {info.Mode().IsRegular(), "a file"},
		v1.HostPathSocket:            {info.Mode().Type() == fs.ModeSocket, "a socket file"},
		v1.HostPathCharDev:           {info.Mode().Type() == fs.ModeDevice|fs.ModeCharDevice, "a character device"},
		v1.HostPathBlockDev:          {info.Mode().Type() == fs.ModeDevice, "a block device"},
	}
	if kind, ok := kinds[wanted]; ok && !kind.is {
		return fmt.Errorf("hostPath type check failed: %s is not %s; make it one, or change the type", source.Path, kind.what)
	}
	return nil
}

// retryAfter is how long a refresh that failed waits for the next attempt.
const retryAfter = 15 * time.Second
