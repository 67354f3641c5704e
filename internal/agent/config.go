// Package agent is this machine's part of Kubernetes, in the place of a
// kubelet: it registers the Node, runs the pods bound to it and tells the API
// how they are.
//
// One actor per pod (actor.go) holds what the API wants and what is observed.
// Whenever either changes it asks package pod what follows from it
// (pod.Decide, pure) and carries the steps out (steps.go), each on its own;
// their outcome is another observation. Events only wake: nothing on the path
// from create to Ready polls, and a missed event costs time, not truth.
// Status is written behind all this by one writer per pod (status.go);
// nothing waits for it.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"

	"github.com/distribution/reference"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	k8svolume "k8s.io/kubernetes/pkg/volume"

	"tutti.dev/tutti/internal/agent/probe"
	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/runtime"
)

// Config says what an agent works with.
type Config struct {
	NodeName string
	// Hostname is the machine's; "" is NodeName.
	Hostname string
	NodeIP   netip.Addr // how others reach this machine
	DataDir  string
	// ClusterDomain is "cluster.local" unless said otherwise.
	ClusterDomain string
	ClusterDNS    netip.Addr
	// Client is the API with the node's identity: user system:node:<name>,
	// group system:nodes.
	Client *rest.Config
	// Runtimes by handler, as RuntimeClasses name them; "" is the default.
	Runtimes map[string]runtime.Runtime
	Group    runtime.Group // of all pods
	Images   image.Store
	// RegistryAuth is by what a pod of the namespace may pull the image
	// without a pull secret, if by anything; nil is by nothing.
	RegistryAuth func(namespace string, ref reference.Named) (image.Auth, bool)
	Network      Network
	// Volumes and Probes are the agent's own when nil.
	Volumes Volumes
	Probes  Probes
	// EvictionHard says what is to be kept free on the machine, as
	// pressure.Parse reads it; "" is pressure.Default.
	EvictionHard string
	// SystemReserved says what of the machine is kept from pods, as
	// node.ParseReserved reads it; "" is its default.
	SystemReserved string
	// MaxPods is how many pods the machine takes; 0 is 250.
	MaxPods int
	// UnsafeSysctls are those that pods may set beside the safe ones; a "*" at
	// the end of one stands for anything.
	UnsafeSysctls []string
	// Port is where the kubelet's endpoints are served; 0 is 10250. CertFile
	// and KeyFile are their certificate, ClientCAFile the authority of their
	// clients; without a certificate they are not served.
	Port                            int
	CertFile, KeyFile, ClientCAFile string
	// Version is tutti's own.
	Version string
	Log     *slog.Logger
}

// Network is what the agent needs of the pod network. All calls are
// idempotent.
type Network interface {
	// SetRange gives the range that pods of this machine get addresses from.
	SetRange(ctx context.Context, prefix netip.Prefix) error
	Attach(ctx context.Context, p network.Pod) (network.Attachment, error)
	// Detach of an unknown pod is no error.
	Detach(ctx context.Context, podID string) error
	List(ctx context.Context) ([]network.Attachment, error)
	// Flows are who talks to whom on this machine, as far as pods do.
	Flows() ([]api.Flow, error)
}

// Volumes is what the agent needs of volumes. All calls are idempotent.
type Volumes interface {
	// Prepare makes all volumes of the pod ready, or says why one is not yet.
	Prepare(ctx context.Context, p *v1.Pod) error
	// MountImage makes an image's layers, lowest first, the volume of that name.
	MountImage(uid types.UID, name string, layers []string) error
	// Devices are the block devices that a container of a prepared pod gets.
	Devices(p *v1.Pod, c *v1.Container) ([]runtime.Device, error)
	// Mounts are those of one run of a container of a prepared pod.
	Mounts(p *v1.Pod, c *v1.Container, attempt int, env, podIPs []string) ([]runtime.Mount, error)
	// Remove takes the pod's volumes from the machine; unknown is no error.
	Remove(ctx context.Context, uid types.UID) error
	VolumePath(uid types.UID, name string) (string, error)
	// Metrics tells how large a prepared volume is and what of it is used, if
	// that can be told.
	Metrics(ctx context.Context, p *v1.Pod, v *v1.Volume) (*k8svolume.Metrics, error)
	// Hostname is what the pod's programs see as their host's name.
	Hostname(p *v1.Pod) (string, error)
	// TerminationMessage is what an ended run left to say.
	TerminationMessage(ctx context.Context, p *v1.Pod, c *v1.Container, attempt int, log string, failed bool) (string, error)
	GetConfigMap(ctx context.Context, namespace, name string) (*v1.ConfigMap, error)
	GetSecret(ctx context.Context, namespace, name string) (*v1.Secret, error)
}

// Probes is what the agent needs of probes. A change of a result wakes the
// pod's actor.
type Probes interface {
	Add(p *v1.Pod, c *v1.Container, id runtime.ID, podIP string)
	// Quiet ends startup and liveness probes of a run that is being stopped.
	Quiet(id runtime.ID)
	Remove(id runtime.ID)
	Result(id runtime.ID) probe.Result
}

func (c *Config) validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New("agent needs "+what))
		}
	}
	need(c.NodeName != "", "a node name")
	need(c.NodeIP.IsValid(), "the machine's address")
	need(c.DataDir != "", "a data directory")
	need(c.Client != nil, "a client of the API")
	need(c.Runtimes[""] != nil, "a default runtime")
	need(c.Group != nil, "the control group of all pods")
	need(c.Images != nil, "an image store")
	need(c.Network != nil, "a network")
	if c.ClusterDomain == "" {
		c.ClusterDomain = "cluster.local"
	}
	if c.Hostname == "" {
		c.Hostname = c.NodeName
	}
	if c.MaxPods == 0 {
		c.MaxPods = 250
	}
	if c.Port == 0 {
		c.Port = 10250
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// clientFor makes a client that speaks protobuf and is not slowed down: the
// API server has its own means of fairness.
func clientFor(c *rest.Config) (kubernetes.Interface, error) {
	c = rest.CopyConfig(c)
	c.QPS = -1
	c.ContentType = "application/vnd.kubernetes.protobuf"
	c.AcceptContentTypes = "application/vnd.kubernetes.protobuf,application/json"
	return kubernetes.NewForConfig(c)
}
