// Package volumeplugin makes those volumes of pods that others provide: by CSI
// drivers, and by upstream's plugins for NFS, iSCSI and Fibre Channel. It is
// upstream's volume manager, plugin manager and plugins, shown only such pods
// and volumes as concern them. Drivers register as with a kubelet.
//
// Upstream's managers look around ten times a second. They start when the
// first such volume, or the first pod that mounts something below KubeletDir,
// comes to this machine; who has none pays nothing.
package volumeplugin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/singleflight"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-helpers/storage/ephemeral"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	kubeletconfig "k8s.io/kubernetes/pkg/kubelet/config"
	"k8s.io/kubernetes/pkg/kubelet/pluginmanager"
	"k8s.io/kubernetes/pkg/kubelet/volumemanager"
	k8svolume "k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/csi"
	"k8s.io/kubernetes/pkg/volume/fc"
	"k8s.io/kubernetes/pkg/volume/iscsi"
	"k8s.io/kubernetes/pkg/volume/nfs"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	volumetypes "k8s.io/kubernetes/pkg/volume/util/types"
	"k8s.io/kubernetes/pkg/volume/util/volumepathhandler"
	"k8s.io/mount-utils"
)

const (
	apiTimeout = 30 * time.Second
	// lookInterval is how often upstream's managers look around, and we
	// whether what they use has changed.
	lookInterval = 100 * time.Millisecond
	// remakeInterval is how often drivers that want it are asked to publish
	// a volume again, and volumes are looked at for growth.
	remakeInterval = 15 * time.Second
	metricsTimeout = 5 * time.Second
)

// Config says what the plugins work with.
type Config struct {
	DataDir, NodeName string
	Client            kubernetes.Interface // identity of the node
	Node              func() *v1.Node
	// Pods are those of this machine.
	Pods func() []*v1.Pod
	// Report has the node's status told again.
	Report func()
	Log    *slog.Logger
}

// Plugins makes the volumes. All methods are safe for concurrent use.
type Plugins struct {
	config Config
	link   string             // KubeletDir
	begun  chan struct{}      // closed when the managers are wanted
	ready  chan struct{}      // closed when they run
	asked  singleflight.Group // how large volumes are, by pod and name

	mu      sync.Mutex
	root    string // of the plugins, "" until they are wanted
	manager volumemanager.VolumeManager
	pods    map[types.UID]*held
	loaded  bool // pods has all that had volumes before this process did
}

// held is a pod with volumes that are made here.
type held struct {
	pod     *v1.Pod // nothing is in it but what is made here
	leaving bool    // its volumes are to go
}

// New returns Plugins that do nothing before Run.
func New(c Config) *Plugins {
	return &Plugins{config: c, link: KubeletDir, begun: make(chan struct{}), ready: make(chan struct{}), pods: map[types.UID]*held{}}
}

// begin has the managers started.
func (p *Plugins) begin() (root string, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.root != "" {
		return p.root, nil
	}
	if root, err = makeDir(ownDir(p.config.DataDir), p.link); err != nil {
		return "", err
	}
	p.root = root
	close(p.begun)
	return root, nil
}

// HostPath is told of what pods mount of this machine: before a driver's pod
// can start, what it mounts of the kubelet's directory must be there.
func (p *Plugins) HostPath(path string) error {
	own := ownDir(p.config.DataDir)
	if !below(path, p.link) && !below(path, own) {
		return nil
	}
	root, err := p.begin()
	if err != nil {
		return err
	}
	if root != p.link && below(path, p.link+"/plugins_registry") {
		return fmt.Errorf("%s belongs to another kubelet; give the driver %s as the kubelet's directory", p.link, own)
	}
	return nil
}

// Run runs the managers, when they are wanted, until ctx ends. The node must
// be registered. Volumes stay as they are.
func (p *Plugins) Run(ctx context.Context, events record.EventRecorder) error {
	if _, err := os.Stat(ownDir(p.config.DataDir)); err == nil {
		if _, err := p.begin(); err != nil {
			// Who wants a volume is told; the other pods go on.
			p.config.Log.Error("cannot begin with volume plugins", "err", err)
		}
	}
	select {
	case <-p.begun:
	case <-ctx.Done():
		return nil
	}
	if p.root != p.link {
		p.config.Log.Warn("the kubelet's directory is not ours: CSI drivers must be told another", "directory", p.link, "ours", p.root)
	}
	h := &host{
		root: p.root, config: p.config, events: events, mounter: mount.New(""), informers: informers.NewSharedInformerFactory(p.config.Client, 0),
	}
	var all []k8svolume.VolumePlugin
	for _, some := range [][]k8svolume.VolumePlugin{
		csi.ProbeVolumePlugins(), nfs.ProbeVolumePlugins(k8svolume.VolumeConfig{}), iscsi.ProbeVolumePlugins(), fc.ProbeVolumePlugins(),
	} {
		all = append(all, some...)
	}
	// Of the CSI plugin's variables, which the controllers' copy of it has
	// set too, the last to come has its way: that must be the node's.
	var loaded k8svolume.VolumePluginMgr
	if err := loaded.InitPlugins(all, nil, h); err != nil {
		return fmt.Errorf("start the volume plugins: %w", err)
	}
	manager := volumemanager.NewVolumeManager(true, h.GetNodeName(), (*podList)(p), (*podList)(p), p.config.Client, &loaded,
		h.mounter, hostutil.NewHostUtil(), h.GetPodsDir(), events, volumepathhandler.NewBlockVolumePathHandler())
	drivers := pluginmanager.NewPluginManager(p.root+"/plugins_registry", events)
	drivers.AddHandler(registration.CSIPlugin, csi.PluginHandler)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { manager.Run(ctx, (*podList)(p)); return nil })
	g.Go(func() error { drivers.Run(ctx, (*podList)(p), ctx.Done()); return nil })
	g.Go(func() error { p.load(ctx); return nil })
	p.mu.Lock()
	p.manager = manager
	p.mu.Unlock()
	close(p.ready)
	g.Go(func() error { p.watch(ctx); return nil })
	return g.Wait()
}

// load finds the pods that had volumes before this process did: what is not
// theirs will be unmounted.
func (p *Plugins) load(ctx context.Context) {
	for _, pod := range p.config.Pods() {
		if podutil.IsPodTerminal(pod) {
			continue
		}
		for i := range pod.Spec.Volumes {
			v := &pod.Spec.Volumes[i]
			for {
				ours, err := p.concerns(ctx, pod, v)
				if ours {
					p.hold(pod, v.Name)
				}
				if err == nil {
					break
				}
				p.config.Log.Warn("cannot find out who makes a volume; trying again", "pod", pod.UID, "volume", v.Name, "err", err)
				select {
				case <-time.After(time.Second):
				case <-ctx.Done():
					return
				}
			}
		}
	}
	p.mu.Lock()
	p.loaded = true
	p.mu.Unlock()
}

// concerns tells whether a volume of a pod is made here.
func (p *Plugins) concerns(ctx context.Context, pod *v1.Pod, v *v1.Volume) (bool, error) {
	claim := ""
	switch {
	case v.PersistentVolumeClaim != nil:
		claim = v.PersistentVolumeClaim.ClaimName
	case v.Ephemeral != nil:
		claim = ephemeral.VolumeClaimName(pod, v)
	default:
		return Makes(k8svolume.NewSpecFromVolume(v)), nil
	}
	pvc, err := p.config.Client.CoreV1().PersistentVolumeClaims(pod.Namespace).Get(ctx, claim, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && pvc.Spec.VolumeName == "" {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	pv, err := p.config.Client.CoreV1().PersistentVolumes().Get(ctx, pvc.Spec.VolumeName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && Makes(k8svolume.NewSpecFromPersistentVolume(pv, false)), err
}

// Makes tells whether a volume is of a kind that is made here.
func Makes(spec *k8svolume.Spec) bool {
	if pv := spec.PersistentVolume; pv != nil {
		return pv.Spec.CSI != nil || pv.Spec.NFS != nil || pv.Spec.ISCSI != nil || pv.Spec.FC != nil
	}
	v := spec.Volume
	return v.CSI != nil || v.NFS != nil || v.ISCSI != nil || v.FC != nil
}

// watch has the API told which volumes are in use, and drivers asked again.
func (p *Plugins) watch(ctx context.Context) {
	look, remake := time.NewTicker(lookInterval), time.NewTicker(remakeInterval)
	defer look.Stop()
	defer remake.Stop()
	var told []v1.UniqueVolumeName
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			if used := p.manager.GetVolumesInUse(); !slices.Equal(used, told) {
				told = used
				p.config.Report()
			}
		case <-remake.C:
			for _, pod := range (*podList)(p).GetPods() {
				go func() {
					if err := p.manager.WaitForAttachAndMount(ctx, pod); err != nil && ctx.Err() == nil {
						p.config.Log.Warn("cannot make volumes of a pod again", "pod", pod.UID, "err", err)
					}
				}()
			}
		}
	}
}

// hold adds a volume of a pod to those that are made here.
func (p *Plugins) hold(pod *v1.Pod, name string) *v1.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	names := sets.New(name)
	if h := p.pods[pod.UID]; h != nil {
		for _, v := range h.pod.Spec.Volumes {
			names.Insert(v.Name)
		}
	}
	part := only(pod, names)
	p.pods[pod.UID] = &held{pod: part}
	return part
}

// only is the pod as if it had no other volumes than these.
func only(pod *v1.Pod, names sets.Set[string]) *v1.Pod {
	part := pod.DeepCopy()
	part.Spec.Volumes = slices.DeleteFunc(part.Spec.Volumes, func(v v1.Volume) bool { return !names.Has(v.Name) })
	podutil.VisitContainers(&part.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
		c.VolumeMounts = slices.DeleteFunc(c.VolumeMounts, func(m v1.VolumeMount) bool { return !names.Has(m.Name) })
		c.VolumeDevices = slices.DeleteFunc(c.VolumeDevices, func(d v1.VolumeDevice) bool { return !names.Has(d.Name) })
		return true
	})
	return part
}

// Volume is one that has been made: a directory, or a link to a block device.
// Path is "" if no container uses it.
type Volume struct {
	Path     string
	Block    bool
	ReadOnly bool
}

// SetUp makes the pod's volume of that name and returns once it can be used.
// It can be repeated. What goes wrong meanwhile is told by events.
func (p *Plugins) SetUp(ctx context.Context, pod *v1.Pod, name string) (Volume, error) {
	if _, err := p.begin(); err != nil {
		return Volume{}, err
	}
	select {
	case <-p.ready:
	case <-ctx.Done():
		return Volume{}, ctx.Err()
	}
	part := p.hold(pod, name)
	if err := p.manager.WaitForAttachAndMount(ctx, part); err != nil {
		return Volume{}, err
	}
	info, ok := p.manager.GetMountedVolumesForPod(volumetypes.UniquePodName(pod.UID))[name]
	switch {
	case !ok:
		return Volume{}, nil
	case info.BlockVolumeMapper != nil:
		dir, file := info.BlockVolumeMapper.GetPodDeviceMapPath()
		return Volume{Path: dir + "/" + file, Block: true, ReadOnly: info.ReadOnly}, nil
	}
	return Volume{Path: info.Mounter.GetPath(), ReadOnly: info.ReadOnly || info.Mounter.GetAttributes().ReadOnly}, nil
}

// Metrics asks who makes a volume how large it is and what of it is used. One
// that does not answer is not asked a second time before it has.
func (p *Plugins) Metrics(ctx context.Context, uid types.UID, name string) (*k8svolume.Metrics, error) {
	p.mu.Lock()
	manager := p.manager
	p.mu.Unlock()
	if manager == nil {
		return nil, k8svolume.NewNotSupportedError()
	}
	ctx, cancel := context.WithTimeout(ctx, metricsTimeout)
	defer cancel()
	answer := p.asked.DoChan(string(uid)+"/"+name, func() (any, error) {
		info := manager.GetMountedVolumesForPod(volumetypes.UniquePodName(uid))[name]
		if info.Mounter != nil {
			return info.Mounter.GetMetrics()
		}
		if block, ok := info.BlockVolumeMapper.(k8svolume.MetricsProvider); ok && info.BlockVolumeMapper.SupportsMetrics() {
			return block.GetMetrics()
		}
		return nil, k8svolume.NewNotSupportedError()
	})
	select {
	case a := <-answer:
		m, _ := a.Val.(*k8svolume.Metrics)
		return m, a.Err
	case <-ctx.Done():
		return nil, fmt.Errorf("ask how large volume %s is: %w", name, ctx.Err())
	}
}

// TearDown takes all volumes of a pod away that were made here, also by an
// earlier process. Nothing of the pod may be running. It can be repeated, and
// a pod that has none is no error.
func (p *Plugins) TearDown(ctx context.Context, uid types.UID) error {
	p.mu.Lock()
	root := p.root
	h := p.pods[uid]
	if h != nil {
		h.leaving = true
	}
	p.mu.Unlock()
	if root == "" {
		return nil
	}
	dir := root + "/pods/" + string(uid)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) && h == nil {
		return nil
	}
	select {
	case <-p.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	for !p.manager.ReconcilerStatesHasBeenSynced() {
		select {
		case <-time.After(lookInterval):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if err := p.manager.WaitForUnmount(ctx, &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid}}); err != nil {
		return err
	}
	p.mu.Lock()
	delete(p.pods, uid)
	p.mu.Unlock()
	removeEmpty(dir)
	return nil
}

// InUse are the volumes that must not be detached from this machine; false
// while that is not known.
func (p *Plugins) InUse() ([]v1.UniqueVolumeName, bool) {
	p.mu.Lock()
	manager := p.manager
	p.mu.Unlock()
	if manager == nil || !manager.ReconcilerStatesHasBeenSynced() {
		return nil, false
	}
	return manager.GetVolumesInUse(), true
}

// Told says that the API knows that these volumes are in use: only then are
// they mounted.
func (p *Plugins) Told(inUse []v1.UniqueVolumeName) {
	p.mu.Lock()
	manager := p.manager
	p.mu.Unlock()
	if manager != nil {
		manager.MarkVolumesAsReportedInUse(inUse)
	}
}

// podList is what upstream's managers see of the pods.
type podList Plugins

func (l *podList) GetPods() []*v1.Pod {
	l.mu.Lock()
	defer l.mu.Unlock()
	var list []*v1.Pod
	for _, h := range l.pods {
		if !h.leaving {
			list = append(list, h.pod)
		}
	}
	return list
}

func (l *podList) GetPodByUID(uid types.UID) (*v1.Pod, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if h := l.pods[uid]; h != nil && !h.leaving {
		return h.pod, true
	}
	return nil, false
}

func (l *podList) ShouldPodContainersBeTerminating(uid types.UID) bool {
	_, stays := l.GetPodByUID(uid)
	return !stays
}

func (l *podList) ShouldPodRuntimeBeRemoved(uid types.UID) bool {
	return l.ShouldPodContainersBeTerminating(uid)
}

// AllReady says whether the pods are all known.
func (l *podList) AllReady() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.loaded
}

// AddSource is of kubelets that take pods from several places.
func (l *podList) AddSource(string) {}

var _ kubeletconfig.SourcesReady = &podList{}
