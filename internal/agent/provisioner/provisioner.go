// Package provisioner gives claims their storage: a directory of the node
// that the scheduler chose. The scheduler has the last word on where, so a
// class of this provisioner binds when its first consumer comes.
package provisioner

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/volume"
)

// Name is what a StorageClass names as its provisioner.
const Name = "tutti.dev/local"

const (
	selectedNode  = "volume.kubernetes.io/selected-node"
	provisionedBy = "pv.kubernetes.io/provisioned-by"
	// finalizer keeps a volume that is deleted by hand until its data is.
	finalizer = "tutti.dev/local-data"
)

// Config is what Run works with.
type Config struct {
	Client   kubernetes.Interface // with an identity of its own
	NodeName string
	// Dir holds one directory per volume; nothing else may be in it.
	Dir string
	Log *slog.Logger // may be nil
}

type provisioner struct {
	Config
	events  record.EventRecorder
	claims  corelisters.PersistentVolumeClaimLister
	volumes corelisters.PersistentVolumeLister
	classes storagelisters.StorageClassLister
	queue   workqueue.TypedRateLimitingInterface[item]
}

// item is a claim, or a volume when it has no namespace.
type item struct{ namespace, name string }

// Run provisions and deletes the volumes of one node until ctx ends.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return fmt.Errorf("start the provisioner of local volumes: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: cfg.Client.CoreV1().Events("")})

	factory := informers.NewSharedInformerFactory(cfg.Client, 0)
	claims, volumes, classes := factory.Core().V1().PersistentVolumeClaims(), factory.Core().V1().PersistentVolumes(), factory.Storage().V1().StorageClasses()
	p := &provisioner{
		Config: cfg,
		events: broadcaster.NewRecorder(scheme.Scheme, v1.EventSource{Component: Name, Host: cfg.NodeName}),
		claims: claims.Lister(), volumes: volumes.Lister(), classes: classes.Lister(),
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[item](50*time.Millisecond, time.Minute)),
	}
	defer p.queue.ShutDown()
	for _, informer := range []cache.SharedIndexInformer{claims.Informer(), volumes.Informer()} {
		if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    p.enqueue,
			UpdateFunc: func(_, obj any) { p.enqueue(obj) },
		}); err != nil {
			return fmt.Errorf("start the provisioner of local volumes: %w", err)
		}
	}
	// A claim that goes may leave the directory of a volume that never was.
	if _, err := claims.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{DeleteFunc: func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if claim, ok := obj.(*v1.PersistentVolumeClaim); ok {
			p.queue.Add(item{name: volumeName(claim.UID)})
		}
	}}); err != nil {
		return fmt.Errorf("start the provisioner of local volumes: %w", err)
	}
	// A claim may come before its class.
	if _, err := classes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: func(any) {
		all, _ := p.claims.List(labels.Everything())
		for _, claim := range all {
			p.enqueue(claim)
		}
	}}); err != nil {
		return fmt.Errorf("start the provisioner of local volumes: %w", err)
	}
	factory.StartWithContext(ctx)
	defer factory.Shutdown()
	defer cancel() // before the informers are waited for
	if result := factory.WaitForCacheSyncWithContext(ctx); result.Err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("start the provisioner of local volumes: %w", result.Err)
	}
	stop := context.AfterFunc(ctx, p.queue.ShutDown)
	defer stop()
	// So may one that was killed between the directory and its volume.
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		return fmt.Errorf("start the provisioner of local volumes: %w", err)
	}
	for _, e := range entries {
		p.queue.Add(item{name: e.Name()})
	}
	// Deleting the data of one volume may take long.
	var workers sync.WaitGroup
	for range 4 {
		workers.Go(func() {
			for p.next(ctx) {
			}
		})
	}
	workers.Wait()
	return nil
}

func (p *provisioner) enqueue(obj any) {
	object, ok := obj.(metav1.Object)
	if !ok {
		return
	}
	p.queue.Add(item{object.GetNamespace(), object.GetName()})
}

func (p *provisioner) next(ctx context.Context) bool {
	it, quit := p.queue.Get()
	if quit {
		return false
	}
	defer p.queue.Done(it)
	work := p.deleteReleased
	if it.namespace != "" {
		work = p.provision
	}
	if err := work(ctx, it); err != nil && ctx.Err() == nil {
		p.Log.Warn("local volume: will try again", "namespace", it.namespace, "name", it.name, "error", err)
		p.queue.AddRateLimited(it)
		return true
	}
	p.queue.Forget(it)
	return true
}

// provision makes the volume of a claim that waits for one here, or sees to it
// that it is as large as its claim.
func (p *provisioner) provision(ctx context.Context, it item) error {
	claim, err := p.claims.PersistentVolumeClaims(it.namespace).Get(it.name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if claim.Status.Phase == v1.ClaimBound {
		return p.grow(ctx, claim)
	}
	if claim.Spec.VolumeName != "" || claim.DeletionTimestamp != nil || claim.Spec.StorageClassName == nil {
		return nil
	}
	class, err := p.classes.Get(*claim.Spec.StorageClassName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if class.Provisioner != Name || !p.chosen(claim, class) {
		return nil
	}
	if refusal := refuse(claim); refusal != "" {
		p.events.Event(claim, v1.EventTypeWarning, "ProvisioningFailed", refusal)
		return nil
	}
	pv := p.volumeFor(claim, class)
	if _, err := p.volumes.Get(pv.Name); err == nil {
		return nil // the claim is about to be bound to it
	}
	if err := makeDir(pv.Spec.Local.Path); err != nil {
		p.events.Eventf(claim, v1.EventTypeWarning, "ProvisioningFailed", "cannot make the directory of volume %s on node %s: %v", pv.Name, p.NodeName, err)
		return err
	}
	_, err = p.Client.CoreV1().PersistentVolumes().Create(ctx, pv, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return p.abandon(ctx, pv.Name) // unless it is the one that is there
	}
	if err != nil {
		return fmt.Errorf("create the volume of claim %s/%s: %w", it.namespace, it.name, err)
	}
	p.Log.Info("provisioned a local volume", "namespace", it.namespace, "claim", it.name, "volume", pv.Name)
	p.events.Eventf(claim, v1.EventTypeNormal, "ProvisioningSucceeded", "Successfully provisioned volume %s", pv.Name)
	return nil
}

// grow gives a claim the size that it has come to ask for. Nothing keeps a
// directory from growing: its size is what the API says of it.
func (p *provisioner) grow(ctx context.Context, claim *v1.PersistentVolumeClaim) error {
	want, has := claim.Spec.Resources.Requests[v1.ResourceStorage], claim.Status.Capacity[v1.ResourceStorage]
	if want.Cmp(has) <= 0 {
		return nil
	}
	pv, err := p.volumes.Get(claim.Spec.VolumeName)
	if apierrors.IsNotFound(err) || err == nil && !p.here(pv) {
		return nil
	}
	if err != nil {
		return err
	}
	if size := pv.Spec.Capacity[v1.ResourceStorage]; size.Cmp(want) < 0 {
		pv = pv.DeepCopy()
		pv.Spec.Capacity[v1.ResourceStorage] = want
		if _, err := p.Client.CoreV1().PersistentVolumes().Update(ctx, pv, metav1.UpdateOptions{}); err != nil {
			return fmt.Errorf("grow volume %s: %w", pv.Name, err)
		}
	}
	claim = claim.DeepCopy()
	claim.Status.Capacity = v1.ResourceList{v1.ResourceStorage: want}
	if _, err := p.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).UpdateStatus(ctx, claim, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("grow claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	p.events.Eventf(claim, v1.EventTypeNormal, "VolumeResizeSuccessful", "Successfully resized volume %s", pv.Name)
	return nil
}

// chosen reports whether the claim's storage is to be on this node. A class
// that binds at once leaves the choice to nobody: then it is the node whose
// agent is first, since only one volume of that name can be created.
func (p *provisioner) chosen(claim *v1.PersistentVolumeClaim, class *storagev1.StorageClass) bool {
	if node := claim.Annotations[selectedNode]; node != "" {
		return node == p.NodeName
	}
	return ptr.Deref(class.VolumeBindingMode, storagev1.VolumeBindingImmediate) == storagev1.VolumeBindingImmediate
}

// refuse returns what such a claim asks that a directory cannot give.
func refuse(claim *v1.PersistentVolumeClaim) string {
	switch {
	case ptr.Deref(claim.Spec.VolumeMode, v1.PersistentVolumeFilesystem) == v1.PersistentVolumeBlock:
		return "local volumes are directories; use volumeMode Filesystem"
	case claim.Spec.Selector != nil:
		return "a claim with a selector cannot be provisioned; leave the selector out, or make the PersistentVolume yourself"
	case claim.Spec.DataSource != nil || claim.Spec.DataSourceRef != nil:
		return "local volumes cannot be made from a data source by tutti yet; leave it out, and copy the data in"
	}
	return ""
}

func (p *provisioner) volumeFor(claim *v1.PersistentVolumeClaim, class *storagev1.StorageClass) *v1.PersistentVolume {
	name := volumeName(claim.UID)
	return &v1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{
			Name:        name,
			Annotations: map[string]string{provisionedBy: Name},
			Finalizers:  []string{finalizer},
		},
		Spec: v1.PersistentVolumeSpec{
			Capacity:                      v1.ResourceList{v1.ResourceStorage: claim.Spec.Resources.Requests[v1.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: ptr.Deref(class.ReclaimPolicy, v1.PersistentVolumeReclaimDelete),
			StorageClassName:              class.Name,
			VolumeMode:                    ptr.To(v1.PersistentVolumeFilesystem),
			ClaimRef: &v1.ObjectReference{
				APIVersion: "v1", Kind: "PersistentVolumeClaim",
				Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID, ResourceVersion: claim.ResourceVersion,
			},
			PersistentVolumeSource: v1.PersistentVolumeSource{Local: &v1.LocalVolumeSource{Path: filepath.Join(p.Dir, name)}},
			NodeAffinity: &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{
				MatchExpressions: []v1.NodeSelectorRequirement{{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpIn, Values: []string{p.NodeName}}},
			}}}},
		},
	}
}

const volumePrefix = "pvc-"

// volumeName is the name of the volume that is made for a claim.
func volumeName(claim types.UID) string { return volumePrefix + string(claim) }

// makeDir makes a directory that a program of any user can write to, as it
// could to a disk of its own. Nobody else gets this far: the data directory
// is root's.
func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o777); err != nil {
		return err
	}
	return os.Chmod(dir, 0o777) // whatever the umask
}

// deleteReleased deletes a volume of this node, data first, once its claim is
// gone and its policy is to delete.
func (p *provisioner) deleteReleased(ctx context.Context, it item) error {
	pv, err := p.volumes.Get(it.name)
	if apierrors.IsNotFound(err) {
		return p.abandon(ctx, it.name)
	}
	if err != nil {
		return err
	}
	if pv.Annotations[provisionedBy] != Name {
		return nil
	}
	if !p.here(pv) {
		return p.abandon(ctx, it.name)
	}
	released := pv.Status.Phase == v1.VolumeReleased || pv.Status.Phase == v1.VolumeFailed
	remove := released && pv.Spec.PersistentVolumeReclaimPolicy == v1.PersistentVolumeReclaimDelete
	// Deleted by hand, and used by no claim: whether the data goes is up to
	// the policy.
	letGo := pv.DeletionTimestamp != nil && (released || pv.Status.Phase == v1.VolumeAvailable || pv.Status.Phase == v1.VolumePending)
	if !remove && !letGo {
		return nil
	}
	if pv.Spec.PersistentVolumeReclaimPolicy == v1.PersistentVolumeReclaimDelete {
		if err := volume.Remove(pv.Spec.Local.Path); err != nil {
			p.events.Eventf(pv, v1.EventTypeWarning, "VolumeFailedDelete", "%v", err)
			return err
		}
	}
	if slices.Contains(pv.Finalizers, finalizer) {
		kept := pv.DeepCopy()
		kept.Finalizers = slices.DeleteFunc(kept.Finalizers, func(f string) bool { return f == finalizer })
		if _, err := p.Client.CoreV1().PersistentVolumes().Update(ctx, kept, metav1.UpdateOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("let go of volume %s: %w", pv.Name, err)
		}
	}
	if remove && pv.DeletionTimestamp == nil {
		err := p.Client.CoreV1().PersistentVolumes().Delete(ctx, pv.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &pv.UID}})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete volume %s: %w", pv.Name, err)
		}
	}
	p.Log.Info("let go of a local volume", "volume", pv.Name, "policy", pv.Spec.PersistentVolumeReclaimPolicy)
	return nil
}

// abandon removes the directory of a volume that was never made, or was made
// by another node, if such a directory is here. A volume that never was has
// never been mounted: its directory is empty, and only an empty one is removed,
// so that no data can be lost, whatever a person did with volumes by hand.
func (p *provisioner) abandon(ctx context.Context, name string) error {
	claim, made := strings.CutPrefix(name, volumePrefix)
	dir := filepath.Join(p.Dir, name)
	if _, err := os.Lstat(dir); !made || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// The API has the last word: the volume may be newer than what is listed.
	pv, err := p.Client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
	switch {
	case err == nil:
		if node := p.maker(pv); pv.Annotations[provisionedBy] != Name || node == "" || node == p.NodeName {
			return nil
		}
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("look for volume %s: %w", name, err)
	default:
		// Whoever waits for the volume will have it made in this directory.
		claims, err := p.claims.List(labels.Everything())
		if err != nil {
			return err
		}
		if slices.ContainsFunc(claims, func(c *v1.PersistentVolumeClaim) bool { return string(c.UID) == claim }) {
			return nil
		}
	}
	// One made by hand may use what an earlier one left.
	volumes, err := p.volumes.List(labels.Everything())
	if err != nil {
		return err
	}
	if slices.ContainsFunc(volumes, func(pv *v1.PersistentVolume) bool {
		return pv.Name != name && (pv.Spec.Local != nil && filepath.Clean(pv.Spec.Local.Path) == dir || pv.Spec.HostPath != nil && filepath.Clean(pv.Spec.HostPath.Path) == dir)
	}) {
		return nil
	}
	err = os.Remove(dir)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY) || errors.Is(err, syscall.EBUSY) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove the directory of a volume that was never made: %w", err)
	}
	p.Log.Info("removed the directory of a volume that was never made", "volume", name)
	return nil
}

// here reports whether the volume is exactly one that this provisioner would
// have made: what is deleted must never be another directory.
func (p *provisioner) here(pv *v1.PersistentVolume) bool { return p.maker(pv) == p.NodeName }

// maker is the node whose provisioner would have made exactly this volume, ""
// if none would.
func (p *provisioner) maker(pv *v1.PersistentVolume) string {
	if pv.Spec.Local == nil || filepath.Base(pv.Name) != pv.Name || pv.Spec.Local.Path != filepath.Join(p.Dir, pv.Name) {
		return ""
	}
	affinity := pv.Spec.NodeAffinity
	if affinity == nil || affinity.Required == nil || len(affinity.Required.NodeSelectorTerms) != 1 {
		return ""
	}
	expressions := affinity.Required.NodeSelectorTerms[0].MatchExpressions
	if len(expressions) != 1 || expressions[0].Key != v1.LabelHostname || len(expressions[0].Values) != 1 {
		return ""
	}
	return expressions[0].Values[0]
}
