package volumeplugin

import (
	"context"
	"fmt"
	"path/filepath"

	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	k8svolume "k8s.io/kubernetes/pkg/volume"
	"k8s.io/kubernetes/pkg/volume/util/hostutil"
	"k8s.io/kubernetes/pkg/volume/util/subpath"
	"k8s.io/mount-utils"
)

// host is what the plugins see of the agent. What none of ours asks for is
// left to the embedded interfaces, which are nil.
type host struct {
	plugins
	root      string // of what drivers know as the kubelet's directory
	config    Config
	events    record.EventRecorder
	mounter   mount.Interface
	informers informers.SharedInformerFactory
}

type plugins interface {
	k8svolume.VolumeHost
	trust
}

// trust is the part of a KubeletVolumeHost that only projected volumes use.
type trust interface {
	GetTrustAnchorsByName(name string, allowMissing bool) ([]byte, error)
	GetTrustAnchorsBySigner(signer string, selector *metav1.LabelSelector, allowMissing bool) ([]byte, error)
	GetPodCertificateCredentialBundle(ctx context.Context, namespace, pod, uid, volume string, source int) ([]byte, []byte, error)
}

var _ k8svolume.KubeletVolumeHost = &host{}

func (h *host) pod(uid types.UID, parts ...string) string {
	return filepath.Join(append([]string{h.root, "pods", string(uid)}, parts...)...)
}

func (h *host) GetPluginDir(plugin string) string { return filepath.Join(h.root, "plugins", plugin) }
func (h *host) GetVolumeDevicePluginDir(plugin string) string {
	return filepath.Join(h.root, "plugins", plugin, "volumeDevices")
}
func (h *host) GetPodsDir() string { return filepath.Join(h.root, "pods") }
func (h *host) GetPodVolumeDir(uid types.UID, plugin, volume string) string {
	return h.pod(uid, "volumes", plugin, volume)
}
func (h *host) GetPodPluginDir(uid types.UID, plugin string) string {
	return h.pod(uid, "plugins", plugin)
}
func (h *host) GetPodVolumeDeviceDir(uid types.UID, plugin string) string {
	return h.pod(uid, "volumeDevices", plugin)
}

func (h *host) GetKubeClient() kubernetes.Interface            { return h.config.Client }
func (h *host) GetNodeName() types.NodeName                    { return types.NodeName(h.config.NodeName) }
func (h *host) GetNodeLabels() (map[string]string, error)      { return h.config.Node().Labels, nil }
func (h *host) GetEventRecorder() record.EventRecorder         { return h.events }
func (h *host) GetMounter() mount.Interface                    { return h.mounter }
func (h *host) GetSubpather() subpath.Interface                { return subpath.New(h.mounter) }
func (h *host) GetHostUtil() hostutil.HostUtils                { return hostutil.NewHostUtil() }
func (h *host) DeleteServiceAccountTokenFunc() func(types.UID) { return func(types.UID) {} }

func (h *host) GetAttachedVolumesFromNodeStatus() (map[v1.UniqueVolumeName]string, error) {
	attached := map[v1.UniqueVolumeName]string{}
	for _, v := range h.config.Node().Status.VolumesAttached {
		attached[v.Name] = v.DevicePath
	}
	return attached, nil
}

// GetServiceAccountTokenFunc asks for a token each time: a driver that wants
// tokens is called again about once a minute, with time to live left in them.
func (h *host) GetServiceAccountTokenFunc() func(namespace, name string, request *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	return func(namespace, name string, request *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
		ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
		defer cancel()
		return h.config.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, request, metav1.CreateOptions{})
	}
}

// SetKubeletError is told while the CSINode is being made.
func (h *host) SetKubeletError(err error) {
	if err != nil {
		h.config.Log.Debug("volume plugins are not ready", "err", err)
	}
}

func (h *host) GetInformerFactory() informers.SharedInformerFactory { return h.informers }
func (h *host) CSIDriverLister() storagelisters.CSIDriverLister {
	return h.informers.Storage().V1().CSIDrivers().Lister()
}
func (h *host) CSIDriversSynced() cache.InformerSynced {
	return h.informers.Storage().V1().CSIDrivers().Informer().HasSynced
}
func (h *host) WaitForCacheSync() error {
	ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
	defer cancel()
	if !cache.WaitForCacheSync(ctx.Done(), h.CSIDriversSynced()) {
		return fmt.Errorf("wait for the API to tell of CSI drivers: %w", ctx.Err())
	}
	return nil
}
