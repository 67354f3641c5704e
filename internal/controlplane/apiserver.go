package controlplane

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"time"

	noopoteltrace "go.opentelemetry.io/otel/trace/noop"
	apiextensionsapiserver "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/wait"
	mutatingadmissionpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/mutating"
	apiserverapi "k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	"k8s.io/apiserver/pkg/authentication/request/union"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/filters"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/util/openapi"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	aggregatorapiserver "k8s.io/kube-aggregator/pkg/apiserver"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	apiserverapp "k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/cmd/kube-apiserver/app/options"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/controlplane"
	controlplaneapiserver "k8s.io/kubernetes/pkg/controlplane/apiserver"
	generatedopenapi "k8s.io/kubernetes/pkg/generated/openapi"
	"k8s.io/kubernetes/pkg/kubeapiserver"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"

	"tutti.dev/tutti/internal/controlplane/hostaccess"
	"tutti.dev/tutti/internal/controlplane/inprocess"
	"tutti.dev/tutti/internal/controlplane/metrics"
	"tutti.dev/tutti/internal/controlplane/pki"
	"tutti.dev/tutti/internal/host/hangup"
)

// serviceAccountIssuer is the issuer of service account tokens, and their default audience.
const serviceAccountIssuer = "https://kubernetes.default.svc.cluster.local"

// drainTimeout is how long open connections may hold up the end of the API server.
const drainTimeout = time.Second

// apiServer is the chain of extensions, Kubernetes' own and aggregated APIs, not yet running.
type apiServer struct {
	aggregator *aggregatorapiserver.APIAggregator
	informers  informers.SharedInformerFactory // the server's own
}

// newAPIServer assembles the server behind listener with its data in s. Its own requests go through local.
func newAPIServer(ctx context.Context, cfg Config, files *pki.Files, listener net.Listener, s *store, local *inprocess.Server) (*apiServer, error) {
	opts := options.NewServerRunOptions()
	opts.GenericServerRunOptions.AdvertiseAddress = cfg.Advertise.AsSlice()
	opts.GenericServerRunOptions.ShutdownDelayDuration = 0
	opts.SecureServing.Listener = listener
	opts.SecureServing.BindAddress = listener.Addr().(*net.TCPAddr).IP
	opts.SecureServing.BindPort = listener.Addr().(*net.TCPAddr).Port
	opts.SecureServing.ServerCert.CertKey = genericoptions.CertKey(files.APIServer)

	opts.Etcd.StorageConfig.Transport.ServerList = []string{etcdEndpoint}
	opts.Etcd.StorageConfig.Transport.EgressLookup = s.egress
	opts.Etcd.StorageConfig.Transport.TracerProvider = noopoteltrace.NewTracerProvider()
	opts.Etcd.EncryptionProviderConfigFilepath = files.EncryptionConfig

	opts.Authorization.Modes = []string{modes.ModeNode, modes.ModeRBAC}
	opts.Authentication.Anonymous.Allow = false // see withLocalIdentities
	opts.Authentication.ClientCert.ClientCA = files.CA.CertFile
	opts.Authentication.ServiceAccounts.Issuers = []string{serviceAccountIssuer}
	opts.Authentication.ServiceAccounts.KeyFiles = []string{files.ServiceAccountKey}
	opts.ServiceAccountSigningKeyFile = files.ServiceAccountKey
	opts.Authentication.RequestHeader.ClientCAFile = files.FrontProxyCA.CertFile
	opts.Authentication.RequestHeader.AllowedNames = []string{pki.FrontProxyClientName}
	opts.Authentication.RequestHeader.UsernameHeaders = []string{"X-Remote-User"}
	opts.Authentication.RequestHeader.UIDHeaders = []string{"X-Remote-Uid"}
	opts.Authentication.RequestHeader.GroupHeaders = []string{"X-Remote-Group"}
	opts.Authentication.RequestHeader.ExtraHeaderPrefixes = []string{"X-Remote-Extra-"}
	opts.ProxyClientCertFile = files.FrontProxyClient.CertFile
	opts.ProxyClientKeyFile = files.FrontProxyClient.KeyFile
	chain := opts.Admission.GenericAdmission
	hostaccess.Register(chain.Plugins)
	// Before the webhooks: what they think of a pod that may not be here is of no interest.
	chain.RecommendedPluginOrder = slices.Insert(slices.Clone(chain.RecommendedPluginOrder),
		slices.Index(chain.RecommendedPluginOrder, mutatingadmissionpolicy.PluginName), hostaccess.PluginName)
	chain.EnablePlugins = []string{"NodeRestriction"}
	chain.Decorators = append(chain.Decorators, sparing(cfg.NodeName))

	opts.AllowPrivileged = true
	opts.ServiceClusterIPRanges = cfg.ServiceCIDR.String()
	opts.KubeletConfig.PreferredAddressTypes = []string{"InternalIP", "Hostname"}
	opts.KubeletConfig.TLSClientConfig.CertFile = files.KubeletClient.CertFile
	opts.KubeletConfig.TLSClientConfig.KeyFile = files.KubeletClient.KeyFile
	opts.KubeletConfig.TLSClientConfig.CAFile = files.CA.CertFile

	if err := auditTo(opts.Audit, filepath.Join(cfg.DataDir, "audit")); err != nil {
		return nil, err
	}
	if err := opts.GenericServerRunOptions.ComponentGlobalsRegistry.Set(); err != nil {
		return nil, fmt.Errorf("set feature gates: %w", err)
	}
	completed, err := opts.Complete(ctx)
	if err != nil {
		return nil, fmt.Errorf("complete the API server's options: %w", err)
	}
	if errs := completed.Validate(); len(errs) > 0 {
		return nil, fmt.Errorf("validate the API server's options: %w", utilerrors.NewAggregate(errs))
	}

	loopback := clientConfig(local, &user.DefaultInfo{
		Name:   user.APIServerUser,
		Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated},
	}, cfg.url())
	config, err := apiServerConfig(completed, loopback)
	if err != nil {
		return nil, err
	}
	servers, err := config.Complete()
	if err != nil {
		return nil, fmt.Errorf("complete the API server's configuration: %w", err)
	}
	aggregator, err := apiserverapp.CreateServerChain(servers)
	if err != nil {
		return nil, fmt.Errorf("build the API server: %w", err)
	}
	shared := config.KubeAPIs.ControlPlane.VersionedInformers
	if err := metrics.Install(aggregator.GenericAPIServer, shared, config.KubeAPIs.Extra.KubeletClientConfig, cfg.Log); err != nil {
		return nil, err
	}
	// Watches from outside would hold the listener's end for as long as a request may take.
	aggregator.GenericAPIServer.ShutdownTimeout = drainTimeout
	return &apiServer{aggregator: aggregator, informers: shared}, nil
}

// run serves the listener and local until ctx ends and requests have drained.
func (a *apiServer) run(ctx context.Context, local *inprocess.Server) error {
	prepared, err := a.aggregator.PrepareRun()
	if err != nil {
		return fmt.Errorf("prepare the API server: %w", err)
	}
	local.Serve(a.aggregator.GenericAPIServer.Handler)
	if err := prepared.Run(ctx); err != nil {
		return fmt.Errorf("run the API server: %w", err)
	}
	return nil
}

// clientConfig is a client of the API server in this process, acting as u.
func clientConfig(local *inprocess.Server, u user.Info, host string) *rest.Config {
	return &rest.Config{
		Host:      host,
		Transport: local.Transport(u),
		QPS:       -1,
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
		DisableCompression: true,
	}
}

// apiServerConfig is kube-apiserver's configuration, but for the client by which the server calls itself: that is
// loopback, which needs no network.
func apiServerConfig(opts options.CompletedOptions, loopback *rest.Config) (*apiserverapp.Config, error) {
	generic, shared, storage, err := genericConfig(opts, loopback)
	if err != nil {
		return nil, err
	}
	kube, resolver, initializers, err := apiserverapp.CreateKubeAPIServerConfig(opts, generic, shared, storage)
	if err != nil {
		return nil, fmt.Errorf("configure the Kubernetes API: %w", err)
	}
	cp := kube.ControlPlane
	extensions, err := controlplaneapiserver.CreateAPIExtensionsConfig(*cp.Generic, cp.VersionedInformers, initializers, opts.CompletedOptions, opts.MasterCount, resolver,
		webhook.NewDefaultAuthenticationInfoResolverWrapper(cp.ProxyTransport, cp.Generic.EgressSelector, cp.Generic.LoopbackClientConfig, cp.Generic.TracerProvider))
	if err != nil {
		return nil, fmt.Errorf("configure custom resources: %w", err)
	}
	aggregator, err := controlplaneapiserver.CreateAggregatorConfig(*cp.Generic, opts.CompletedOptions, cp.VersionedInformers, resolver, cp.ProxyTransport, cp.Extra.PeerProxy, initializers)
	if err != nil {
		return nil, fmt.Errorf("configure API aggregation: %w", err)
	}
	return &apiserverapp.Config{Options: opts, KubeAPIs: kube, ApiExtensions: extensions, Aggregator: aggregator}, nil
}

// genericConfig applies the options to what all servers of the chain share.
func genericConfig(opts options.CompletedOptions, loopback *rest.Config) (*genericapiserver.Config, informers.SharedInformerFactory, *serverstorage.DefaultStorageFactory, error) {
	fail := func(what string, err error) (*genericapiserver.Config, informers.SharedInformerFactory, *serverstorage.DefaultStorageFactory, error) {
		return nil, nil, nil, fmt.Errorf("configure the API server: %s: %w", what, err)
	}
	resources := controlplane.DefaultAPIResourceConfigSource()
	c := genericapiserver.NewConfig(legacyscheme.Codecs)
	c.MergedResourceConfig = resources
	if err := opts.GenericServerRunOptions.ApplyTo(c); err != nil {
		return fail("run options", err)
	}
	if err := opts.SecureServing.SecureServingOptions.ApplyTo(&c.SecureServing); err != nil {
		return fail("serving", err)
	}
	c.LoopbackClientConfig = loopback
	client, err := kubernetes.NewForConfig(loopback)
	if err != nil {
		return fail("loopback client", err)
	}
	shared := informers.NewSharedInformerFactoryWithOptions(client, 10*time.Minute, informers.WithTransform(withoutManagedFields))

	if err := opts.Features.ApplyTo(c, client, shared); err != nil {
		return fail("features", err)
	}
	if err := opts.APIEnablement.ApplyTo(c, resources, legacyscheme.Scheme); err != nil {
		return fail("API groups", err)
	}
	definitions := openapi.GetOpenAPIDefinitionsWithoutDisabledFeatures(generatedopenapi.GetOpenAPIDefinitions)
	namer := openapinamer.NewDefinitionNamer(legacyscheme.Scheme, apiextensionsapiserver.Scheme, aggregatorscheme.Scheme, metrics.Scheme)
	c.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(definitions, namer)
	c.OpenAPIConfig.Info.Title = "Kubernetes"
	c.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(definitions, namer)
	c.OpenAPIV3Config.Info.Title = "Kubernetes"
	c.LongRunningFunc = filters.BasicLongRunningRequestCheck(
		sets.NewString("watch", "proxy"),
		sets.NewString("attach", "exec", "proxy", "log", "portforward"))

	// A session is translated between two protocols here, and would last as long as its pod is silent.
	c.BuildHandlerChainFunc = func(handler http.Handler, c *genericapiserver.Config) http.Handler {
		return hangup.Handler(genericapiserver.DefaultBuildHandlerChain(handler, c))
	}

	storageConfig := kubeapiserver.NewStorageFactoryConfigEffectiveVersion(c.EffectiveVersion)
	storageConfig.APIResourceConfig = c.MergedResourceConfig
	storageConfig.DefaultResourceEncoding.SetEffectiveVersion(c.EffectiveVersion)
	storage, err := storageConfig.Complete(opts.Etcd).New()
	if err != nil {
		return fail("storage", err)
	}
	storage.StorageConfig.StorageObjectCountTracker = c.StorageObjectCountTracker
	if err := opts.Etcd.ApplyWithStorageFactoryTo(storage, c); err != nil {
		return fail("storage", err)
	}

	drained := wait.ContextForChannel(c.DrainedNotify())
	if err := opts.Authentication.ApplyTo(drained, &c.Authentication, c.SecureServing, c.EgressSelector, c.OpenAPIConfig, c.OpenAPIV3Config, client, shared, c.APIServerID); err != nil {
		return fail("authentication", err)
	}
	c.Authentication.Authenticator = withLocalIdentities(c.Authentication.Authenticator)
	c.Authorization.Authorizer, c.RuleResolver, _, err = controlplaneapiserver.BuildAuthorizer(drained, opts.CompletedOptions, c.EgressSelector, c.APIServerID, shared)
	if err != nil {
		return fail("authorization", err)
	}
	if err := opts.Audit.ApplyTo(c); err != nil {
		return fail("audit", err)
	}
	c.AggregatedDiscoveryGroupManager = aggregated.NewResourceManager("apis")

	// Both wait a second before their first try; bootstrap does their work at once.
	c.DisabledPostStartHooks.Insert(rbacrest.PostStartHookName, schedulingrest.PostStartHookName)
	return c, shared, storage, nil
}

// withLocalIdentities adds to network the identities of callers in this process, and the anonymous user for health
// checks alone.
func withLocalIdentities(network authenticator.Request) authenticator.Request {
	health := anonymous.NewAuthenticator([]apiserverapi.AnonymousAuthCondition{{Path: "/healthz"}, {Path: "/livez"}, {Path: "/readyz"}})
	return union.New(inprocess.Authenticator(), union.NewFailOnError(network, health))
}

// withoutManagedFields spares informers the memory of what only server-side apply reads.
func withoutManagedFields(obj any) (any, error) {
	if m, err := meta.Accessor(obj); err == nil && m.GetManagedFields() != nil {
		m.SetManagedFields(nil)
	}
	return obj, nil
}
