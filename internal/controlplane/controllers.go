package controlplane

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/metadata/metadatainformer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/keyutil"
	controllersmetrics "k8s.io/component-base/metrics/prometheus/controllers"
	"k8s.io/controller-manager/pkg/informerfactory"
	"k8s.io/klog/v2"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	kcmconfig "k8s.io/kubernetes/cmd/kube-controller-manager/app/config"
	kcmoptions "k8s.io/kubernetes/cmd/kube-controller-manager/app/options"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
	"k8s.io/kubernetes/pkg/controller/garbagecollector"
	"k8s.io/kubernetes/pkg/controller/job"
	"k8s.io/kubernetes/pkg/controller/nodeipam/ipam"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	pkgserviceaccount "k8s.io/kubernetes/pkg/serviceaccount"

	"tutti.dev/tutti/internal/controlplane/pki"
)

const (
	// jobBatchPeriod is how long the Job controller collects changes of a Job's pods before it acts on them.
	jobBatchPeriod = 20 * time.Millisecond
	// discoveryPeriod is how long the controllers may not know of a new kind of object.
	discoveryPeriod = 30 * time.Second
	// controllersStop is how long controllers may take to stop.
	controllersStop = 5 * time.Second
	// nodeMaskSize is the size of a node's part of the cluster's pod network.
	nodeMaskSize = 24
)

// controllers are kube-controller-manager's, built and not yet running.
type controllers struct {
	context kcm.ControllerContext
	list    []kcm.Controller
}

// newControllers builds all controllers that are on by default.
func newControllers(ctx context.Context, cfg Config, files *pki.Files, clientFor func(user.Info) *rest.Config) (*controllers, error) {
	component, err := controllerConfig(cfg, files)
	if err != nil {
		return nil, err
	}
	root := clientFor(&user.DefaultInfo{Name: user.KubeControllerManager, Groups: []string{user.AllAuthenticated}})
	client, err := kubernetes.NewForConfig(rest.AddUserAgent(root, "shared-informers"))
	if err != nil {
		return nil, fmt.Errorf("make the controllers' client: %w", err)
	}
	metadataClient, err := metadata.NewForConfig(rest.AddUserAgent(root, "metadata-informers"))
	if err != nil {
		return nil, fmt.Errorf("make the controllers' client: %w", err)
	}
	discoveryClient, err := discovery.NewDiscoveryClientForConfig(rest.AddUserAgent(root, "controller-discovery"))
	if err != nil {
		return nil, fmt.Errorf("make the controllers' client: %w", err)
	}
	name, err := cache.NewInformerName("kube-controller-manager")
	if err != nil {
		return nil, fmt.Errorf("name the controllers' informers: %w", err)
	}
	resync := kcm.ResyncPeriod(component)
	shared := informers.NewSharedInformerFactoryWithOptions(client, resync(), informers.WithTransform(withoutManagedFields), informers.WithInformerName(name))
	metadataInformers := metadatainformer.NewSharedInformerFactoryWithOptions(metadataClient, resync(), metadatainformer.WithTransform(withoutManagedFields))
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(discoveryClient))
	go wait.Until(mapper.Reset, discoveryPeriod, ctx.Done())

	cc := kcm.ControllerContext{
		ClientBuilder:                   controllerClients{clientFor, shared},
		InformerFactory:                 shared,
		ObjectOrMetadataInformerFactory: informerfactory.NewInformerFactory(shared, metadataInformers),
		ComponentConfig:                 component.ComponentConfig,
		RESTMapper:                      mapper,
		InformersStarted:                make(chan struct{}),
		ResyncPeriod:                    resync,
		ControllerManagerMetrics:        controllersmetrics.NewControllerManagerMetrics("kube-controller-manager"),
	}
	ignored := map[schema.GroupResource]struct{}{}
	for _, r := range component.ComponentConfig.GarbageCollectorController.GCIgnoredResources {
		ignored[schema.GroupResource{Group: r.Group, Resource: r.Resource}] = struct{}{}
	}
	cc.GraphBuilder = garbagecollector.NewDependencyGraphBuilder(ctx, metadataClient, mapper, ignored, cc.ObjectOrMetadataInformerFactory, cc.InformersStarted)
	controllersmetrics.Register()
	job.SyncJobBatchPeriod = jobBatchPeriod

	descriptors := kcm.NewControllerDescriptors()
	// Upstream's constructor of this one wants a client of its own making; see newTokensController.
	delete(descriptors, names.ServiceAccountTokenController)
	list, err := kcm.BuildControllers(ctx, cc, descriptors, nil, noHealthChecks{})
	if err != nil {
		return nil, fmt.Errorf("build the controllers: %w", err)
	}
	tokens, err := newTokensController(ctx, cc, client, files)
	if err != nil {
		return nil, err
	}
	kinds, err := newNewKinds(cc, list)
	if err != nil {
		return nil, fmt.Errorf("have the garbage collector learn of new kinds: %w", err)
	}
	balancers, err := newLoadBalancers(cc, cfg.Taken)
	if err != nil {
		return nil, err
	}
	return &controllers{context: cc, list: append(list, tokens, kinds, balancers)}, nil
}

// start starts the informers, which go on until running ends, and returns when every cache is filled.
func (c *controllers) start(ctx, running context.Context) error {
	c.context.InformerFactory.Start(running.Done())
	c.context.ObjectOrMetadataInformerFactory.Start(running.Done())
	close(c.context.InformersStarted)
	for kind, synced := range c.context.InformerFactory.WaitForCacheSync(ctx.Done()) {
		if !synced {
			return fmt.Errorf("fill the controllers' cache of %v: %w", kind, context.Cause(ctx))
		}
	}
	return nil
}

// run runs the controllers until ctx ends and they have stopped.
func (c *controllers) run(ctx context.Context) error {
	defer c.context.InformerFactory.Shutdown()
	if !kcm.RunControllers(ctx, c.context, c.list, 0, controllersStop) {
		return fmt.Errorf("controllers have not stopped after %s", controllersStop)
	}
	return nil
}

// controllerConfig is kube-controller-manager's configuration.
func controllerConfig(cfg Config, files *pki.Files) (*kcmconfig.CompletedConfig, error) {
	opts, err := kcmoptions.NewKubeControllerManagerOptions()
	if err != nil {
		return nil, fmt.Errorf("make the controllers' options: %w", err)
	}
	opts.SecureServing.BindPort = 0
	opts.Generic.LeaderElection.LeaderElect = false
	opts.Generic.ControllerStartInterval.Duration = 0
	opts.KubeCloudShared.AllocateNodeCIDRs = true
	opts.KubeCloudShared.ClusterCIDR = cfg.ClusterCIDR.String()
	opts.KubeCloudShared.CIDRAllocatorType = string(ipam.RangeAllocatorType)
	opts.KubeCloudShared.ConfigureCloudRoutes = false
	opts.NodeIPAMController.ServiceCIDR = cfg.ServiceCIDR.String()
	opts.NodeIPAMController.NodeCIDRMaskSize = nodeMaskSize
	opts.SAController.ServiceAccountKeyFile = files.ServiceAccountKey
	// Must be set: with a client that knows no TLS, the controllers would publish an empty authority.
	opts.SAController.RootCAFile = files.CA.CertFile
	opts.CSRSigningController.ClusterSigningCertFile = files.CA.CertFile
	opts.CSRSigningController.ClusterSigningKeyFile = files.CA.KeyFile
	// They make this directory, and would do so in /usr.
	opts.PersistentVolumeBinderController.VolumeConfiguration.FlexVolumePluginDir = filepath.Join(cfg.DataDir, "flexvolume")
	var c kcmconfig.Config
	if err := opts.ApplyTo(&c, kcm.KnownControllers(), kcm.ControllersDisabledByDefault(), kcm.ControllerAliases()); err != nil {
		return nil, fmt.Errorf("apply the controllers' options: %w", err)
	}
	return c.Complete(), nil
}

// tokensController makes tokens for Secrets of the service account type.
type tokensController struct {
	*serviceaccountcontroller.TokensController
	workers int
}

func newTokensController(ctx context.Context, cc kcm.ControllerContext, client kubernetes.Interface, files *pki.Files) (kcm.Controller, error) {
	key, err := keyutil.PrivateKeyFromFile(files.ServiceAccountKey)
	if err != nil {
		return nil, fmt.Errorf("read the service account key: %w", err)
	}
	ca, err := os.ReadFile(files.CA.CertFile)
	if err != nil {
		return nil, fmt.Errorf("read the authority: %w", err)
	}
	generator, err := pkgserviceaccount.JWTTokenGenerator(pkgserviceaccount.LegacyIssuer, key)
	if err != nil {
		return nil, fmt.Errorf("make the token generator: %w", err)
	}
	c, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx),
		cc.InformerFactory.Core().V1().ServiceAccounts(), cc.InformerFactory.Core().V1().Secrets(), client,
		serviceaccountcontroller.TokensControllerOptions{TokenGenerator: generator, RootCA: ca})
	if err != nil {
		return nil, fmt.Errorf("build the tokens controller: %w", err)
	}
	return tokensController{c, int(cc.ComponentConfig.SAController.ConcurrentSATokenSyncs)}, nil
}

// Name implements [kcm.Controller].
func (tokensController) Name() string { return names.ServiceAccountTokenController }

// Run implements [kcm.Controller].
func (c tokensController) Run(ctx context.Context) { c.TokensController.Run(ctx, c.workers) }

// noHealthChecks takes the controllers' health checks, all of which always pass.
type noHealthChecks struct{}

func (noHealthChecks) AddHealthChecker(...healthz.HealthChecker) {}

// controllerClients gives each controller its own identity, a service account of kube-system.
type controllerClients struct {
	clientFor func(user.Info) *rest.Config
	shared    informers.SharedInformerFactory
}

func (b controllerClients) Config(name string) (*rest.Config, error) { return b.ConfigOrDie(name), nil }

func (b controllerClients) ConfigOrDie(name string) *rest.Config {
	u := serviceaccount.UserInfo("kube-system", name, "").(*user.DefaultInfo)
	u.Groups = append(u.Groups, user.AllAuthenticated)
	return rest.AddUserAgent(b.clientFor(u), name)
}

func (b controllerClients) Client(name string) (kubernetes.Interface, error) {
	client, err := kubernetes.NewForConfig(b.ConfigOrDie(name))
	if err != nil || name != nodeController {
		return client, err
	}
	return newNodeClient(client, b.shared.Core().V1().Nodes())
}

func (b controllerClients) ClientOrDie(name string) kubernetes.Interface {
	client, err := b.Client(name)
	if err != nil {
		panic(err)
	}
	return client
}

func (b controllerClients) DiscoveryClient(name string) (discovery.DiscoveryInterface, error) {
	return discovery.NewDiscoveryClientForConfig(b.ConfigOrDie(name))
}

func (b controllerClients) DiscoveryClientOrDie(name string) discovery.DiscoveryInterface {
	return discovery.NewDiscoveryClientForConfigOrDie(b.ConfigOrDie(name))
}
