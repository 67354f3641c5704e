package agent

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	kubeletconfig "k8s.io/kubelet/config/v1beta1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/pressure"
	"tutti.dev/tutti/internal/agent/serve"
	"tutti.dev/tutti/internal/agent/translate"
	"tutti.dev/tutti/internal/runtime"
)

// serve answers on the kubelet's port until ctx ends.
func (a *Agent) serve(ctx context.Context) error {
	ca, err := os.ReadFile(a.ClientCAFile)
	if err != nil {
		return fmt.Errorf("read the authority of the kubelet endpoints' clients: %w", err)
	}
	s, err := serve.New(serve.Config{
		NodeName: a.NodeName, Pods: a, Runtime: workloads{a}, Dir: a.DataDir, ClientCA: ca, Client: a.client, Log: a.log, Flows: a.Network.Flows,
		Certificate: func() (*tls.Certificate, error) {
			c, err := tls.LoadX509KeyPair(a.CertFile, a.KeyFile)
			return &c, err
		},
		Configuration: a.configuration(),
	})
	if err != nil {
		return err
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", ":"+strconv.Itoa(a.Port))
	if err != nil {
		return fmt.Errorf("listen for the kubelet endpoints: %w", err)
	}
	return s.Serve(ctx, l)
}

// configuration is what of a kubelet's configuration there is here.
func (a *Agent) configuration() kubeletconfig.KubeletConfiguration {
	return kubeletconfig.KubeletConfiguration{
		TypeMeta:          metav1.TypeMeta{APIVersion: kubeletconfig.SchemeGroupVersion.String(), Kind: "KubeletConfiguration"},
		Port:              int32(a.Port),
		TLSCertFile:       a.CertFile,
		TLSPrivateKeyFile: a.KeyFile,
		Authentication: kubeletconfig.KubeletAuthentication{
			X509:      kubeletconfig.KubeletX509Authentication{ClientCAFile: a.ClientCAFile},
			Webhook:   kubeletconfig.KubeletWebhookAuthentication{Enabled: ptr.To(true)},
			Anonymous: kubeletconfig.KubeletAnonymousAuthentication{Enabled: ptr.To(false)},
		},
		Authorization: kubeletconfig.KubeletAuthorization{Mode: kubeletconfig.KubeletAuthorizationModeWebhook},
		ClusterDomain: a.ClusterDomain,
		ClusterDNS:    []string{a.ClusterDNS.String()},
		MaxPods:       int32(a.MaxPods),
		PodPidsLimit:  ptr.To[int64](translate.PodPids),
		EvictionHard:  pressure.Map(a.thresholds),
		CgroupDriver:  "cgroupfs",
		FailSwapOn:    ptr.To(false),
	}
}

// Pods are the pods of this node, with their status as it is here. Those that
// the API does not have any more are not among them, though they may still be
// stopping: another may have their name by now.
func (a *Agent) Pods() []*v1.Pod {
	var list []*v1.Pod
	for _, x := range a.all() {
		if !x.gone() {
			list = append(list, x.desired())
		}
	}
	return list
}

// Find returns the newest run of a container, or runtime.ErrNotFound.
func (a *Agent) Find(uid types.UID, container string) (runtime.Status, error) {
	a.mu.Lock()
	x := a.actors[string(uid)]
	a.mu.Unlock()
	if x == nil {
		return runtime.Status{}, fmt.Errorf("pod %s: %w", uid, runtime.ErrNotFound)
	}
	runs := slices.DeleteFunc(x.runs(), func(r pod.Run) bool { return r.Name != container })
	if len(runs) == 0 {
		return runtime.Status{}, fmt.Errorf("container %s of pod %s: %w", container, uid, runtime.ErrNotFound)
	}
	return slices.MaxFunc(runs, func(a, b pod.Run) int { return a.Attempt - b.Attempt }).Status, nil
}

// NetNS is the path of the pod's network namespace, "" for the machine's. Only
// a pod that asks for the machine's network gets that: one that is not
// attached yet, or not known to be after a restart, has none.
func (a *Agent) NetNS(uid types.UID) (string, error) {
	a.mu.Lock()
	x := a.actors[string(uid)]
	a.mu.Unlock()
	if x == nil {
		return "", fmt.Errorf("pod %s: %w", uid, runtime.ErrNotFound)
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.netns == "" && !x.o.Pod.Spec.HostNetwork {
		return "", fmt.Errorf("pod %s is not attached to the pod network", uid)
	}
	return x.netns, nil
}

// workloads has each pod's own runtime do what is asked.
type workloads struct{ a *Agent }

func (w workloads) of(id runtime.ID) (runtime.Runtime, error) {
	w.a.mu.Lock()
	x := w.a.actors[id.Pod]
	w.a.mu.Unlock()
	if x == nil {
		return nil, fmt.Errorf("pod %s: %w", id.Pod, runtime.ErrNotFound)
	}
	return x.runtime()
}

// Exec implements serve.Workloads.
func (w workloads) Exec(ctx context.Context, id runtime.ID, e runtime.Exec) (int, error) {
	rt, err := w.of(id)
	if err != nil {
		return 0, err
	}
	return rt.Exec(ctx, id, e)
}

// Attach implements serve.Workloads.
func (w workloads) Attach(ctx context.Context, id runtime.ID, s runtime.Streams) error {
	rt, err := w.of(id)
	if err != nil {
		return err
	}
	return rt.Attach(ctx, id, s)
}

// Stats implements serve.Workloads.
func (w workloads) Stats(ctx context.Context, id runtime.ID) (runtime.Stats, error) {
	rt, err := w.of(id)
	if err != nil {
		return runtime.Stats{}, err
	}
	return rt.Stats(ctx, id)
}

// all are the actors there are now.
func (a *Agent) all() []*actor {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := make([]*actor, 0, len(a.actors))
	for _, x := range a.actors {
		list = append(list, x)
	}
	return list
}
