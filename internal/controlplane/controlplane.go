// Package controlplane runs a Kubernetes control plane inside this process: etcd, the API server, the controllers and
// the scheduler.
//
// The parts reach each other through memory: no network, no TLS, no tokens. Each still has an identity of its own, and
// the API server authorizes it as it does anyone else. From outside, the API server is reached by TLS.
//
// Kubernetes' libraries keep state per process. One control plane can run in a process, once.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	registration "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"

	"tutti.dev/tutti/internal/controlplane/inprocess"
	"tutti.dev/tutti/internal/controlplane/pki"
)

const (
	// DNSUser is the identity of the name server: it may list and watch services and endpoint slices.
	DNSUser = "tutti:dns"
	// VolumesUser is the identity of the provisioner of local volumes.
	VolumesUser = "tutti:volumes"
	// RegistryUser is the identity of the registry: it asks the API who somebody is and what they may do.
	RegistryUser = "tutti:registry"
	// KubeletClientName is the common name of the certificate by which the API server calls agents.
	KubeletClientName = pki.KubeletClientName

	// startTimeout is how long everything may take to become ready: seconds, but on an emulated processor.
	startTimeout = 10 * time.Minute
	renewPeriod  = 12 * time.Hour
)

// Config says where a control plane keeps its data and how it is reached.
type Config struct {
	// DataDir holds pki/, etcd/, audit/ and admin.kubeconfig.
	DataDir string
	// Listen are the addresses of the API, served by TLS. The admin kubeconfig names the first.
	Listen []netip.AddrPort
	// Advertise is the address, not a loopback one, at which pods reach the API and the name server.
	Advertise netip.Addr
	// ClusterCIDR is divided among nodes for their pods, a /24 each.
	ClusterCIDR netip.Prefix
	// ServiceCIDR is where Services get their addresses; the API gets the first.
	ServiceCIDR netip.Prefix
	// DNSAddress is the address in ServiceCIDR of the Service by which pods reach the name server.
	DNSAddress netip.Addr
	// NodeName is the node of this machine.
	NodeName string
	// SANs are further names and addresses at which the API and this machine's agent are reached.
	SANs []string
	// Taken says whether a program of this machine listens on a port, which no Service of type LoadBalancer may then have;
	// nil: none does.
	Taken func(protocol corev1.Protocol, port int32) bool `json:"-"`
	// Log takes what the control plane and the libraries in it have to say.
	Log *slog.Logger
}

func (c Config) validate() error {
	switch {
	case c.DataDir == "" || !filepath.IsAbs(c.DataDir):
		return fmt.Errorf("data directory %q is not an absolute path", c.DataDir)
	case len(c.Listen) == 0:
		return errors.New("no address to listen on")
	case !c.Advertise.IsValid() || c.Advertise.IsLoopback() || c.Advertise.IsUnspecified():
		return fmt.Errorf("advertised address %q is not an address that pods can reach", c.Advertise)
	case !c.ClusterCIDR.IsValid() || c.ClusterCIDR.Bits() > nodeMaskSize:
		return fmt.Errorf("pod network %q is not a network of at least a /%d", c.ClusterCIDR, nodeMaskSize)
	case !c.ServiceCIDR.IsValid() || c.ServiceCIDR.Addr().BitLen()-c.ServiceCIDR.Bits() < 4:
		return fmt.Errorf("service network %q is not a network of at least 16 addresses", c.ServiceCIDR)
	case c.ServiceCIDR.Overlaps(c.ClusterCIDR):
		return fmt.Errorf("service network %s and pod network %s overlap", c.ServiceCIDR, c.ClusterCIDR)
	case !c.ServiceCIDR.Contains(c.DNSAddress) || c.DNSAddress == c.apiService():
		return fmt.Errorf("DNS address %q is not a free address of the service network %s", c.DNSAddress, c.ServiceCIDR)
	case c.NodeName == "":
		return errors.New("no node name")
	case c.Log == nil:
		return errors.New("no logger")
	}
	return nil
}

// apiService is the address of the Service "kubernetes".
func (c Config) apiService() netip.Addr { return c.ServiceCIDR.Masked().Addr().Next() }

func (c Config) pkiSpec() pki.Spec {
	server := []string{
		"localhost", "127.0.0.1", "::1", c.Advertise.String(), c.apiService().String(), c.NodeName,
		"kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local",
	}
	for _, a := range c.Listen {
		if !a.Addr().IsUnspecified() {
			server = append(server, a.Addr().String())
		}
	}
	server = append(server, c.SANs...)
	slices.Sort(server)
	return pki.Spec{
		Dir:        filepath.Join(c.DataDir, "pki"),
		ServerSANs: slices.Compact(server),
		NodeName:   c.NodeName,
		NodeSANs:   append([]string{"localhost", "127.0.0.1", c.Advertise.String()}, c.SANs...),
	}
}

// ControlPlane is a control plane of one machine.
type ControlPlane struct {
	cfg   Config
	log   *slog.Logger
	files *pki.Files
	local inprocess.Server
	ready chan struct{}
	// renewEvery is how often certificates are looked at while running.
	renewEvery time.Duration
}

// New checks the configuration, and makes or reads the certificates and the admin kubeconfig. Nothing runs yet.
func New(cfg Config) (*ControlPlane, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	if err := keyOfData(cfg.DataDir); err != nil {
		return nil, err
	}
	files, err := renew(cfg)
	if err != nil {
		return nil, err
	}
	return &ControlPlane{cfg: cfg, log: cfg.Log, files: files, ready: make(chan struct{}), renewEvery: renewPeriod}, nil
}

// renew makes what is missing of the certificates, replaces what ends soon, and writes the admin kubeconfig.
func renew(cfg Config) (*pki.Files, error) {
	files, err := pki.Ensure(cfg.pkiSpec(), time.Now())
	if err != nil {
		return nil, err
	}
	return files, files.WriteAdminKubeconfig(filepath.Join(cfg.DataDir, "admin.kubeconfig"), cfg.url())
}

// keyOfData refuses to make a new encryption key for a store that was written with another.
func keyOfData(dir string) error {
	key := pki.EncryptionConfigFile(filepath.Join(dir, "pki"))
	member := filepath.Join(dir, "etcd", "member")
	if _, err := os.Stat(member); err != nil {
		return nil //nolint:nilerr // an empty or unreadable store is for etcd to judge
	}
	if _, err := os.Stat(key); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is missing but %s is there; restore it from a backup, it is the only key to the Secrets in etcd", key, member)
	}
	return nil
}

// url is how this machine reaches the API.
func (c Config) url() string {
	a := c.Listen[0]
	if a.Addr().IsUnspecified() {
		loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
		if a.Addr().Is6() {
			loopback = netip.IPv6Loopback()
		}
		a = netip.AddrPortFrom(loopback, a.Port())
	}
	return "https://" + a.String()
}

// Ready is closed when the API serves, its roles are in force, and the controllers and the scheduler run with full caches.
func (cp *ControlPlane) Ready() <-chan struct{} { return cp.ready }

// Client is a client in this process that acts as u, without a network, and without a limit of requests. It sends
// protobuf: clients of custom resources set ContentType to JSON. Requests fail until [ControlPlane.Run] has brought up
// the API server; exec, attach and port-forward need the real listener.
func (cp *ControlPlane) Client(u user.Info) *rest.Config {
	return clientConfig(&cp.local, u, cp.cfg.url())
}

// User is an identity for [ControlPlane.Client]. The group of all authenticated users is added.
func User(name string, groups ...string) user.Info {
	return &user.DefaultInfo{Name: name, Groups: append(groups, user.AllAuthenticated)}
}

// Node is the identity of the agent of the node with that name.
func Node(name string) user.Info { return User("system:node:"+name, user.NodesGroup) }

// Admin is the identity that may do everything.
func Admin() user.Info { return User(pki.AdminName, user.SystemPrivilegedGroup) }

// NodeCertificates are the PEM files with which this machine's agent serves HTTPS. They are replaced while running when
// they end soon: read them again.
type NodeCertificates struct {
	// CertFile and KeyFile are the serving certificate and its key.
	CertFile, KeyFile string
	// ClientCAFile is the authority of clients. It signs every user's certificate: the agent must also check that the
	// common name is [KubeletClientName], or ask the API.
	ClientCAFile string
}

// NodeCertificates returns the agent's files; they exist since [New].
func (cp *ControlPlane) NodeCertificates() NodeCertificates {
	return NodeCertificates{CertFile: cp.files.Kubelet.CertFile, KeyFile: cp.files.Kubelet.KeyFile, ClientCAFile: cp.files.CA.CertFile}
}

// Run runs the control plane until ctx ends, then stops it in order: scheduler and controllers, API server, store. It
// returns nil then, or the first part's error. It can be called once in a process.
func (cp *ControlPlane) Run(ctx context.Context) error {
	foreign := LogLibraries(cp.log.Handler(), func() bool {
		select {
		case <-cp.ready:
			return ctx.Err() == nil
		default:
			return false
		}
	})
	began := time.Now()
	listener, err := listenAll(ctx, cp.cfg.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()
	s, err := startStore(ctx, filepath.Join(cp.cfg.DataDir, "etcd"), cp.log, foreign)
	if err != nil {
		return err
	}
	defer s.stop()
	cp.log.Debug("store is open", "after", time.Since(began))

	// The API server outlives its clients in this process, so that they can end what they have begun.
	serverCtx, stopServer := context.WithCancel(context.WithoutCancel(ctx))
	defer stopServer()
	server, err := newAPIServer(serverCtx, cp.cfg, cp.files, listener, s, &cp.local)
	if err != nil {
		return err
	}
	cp.log.Debug("API server is built", "after", time.Since(began))
	clientsCtx, stopClients := context.WithCancel(ctx)
	defer stopClients()
	served, ended := make(chan error, 1), make(chan error, 1)
	go func() { served <- server.run(serverCtx, &cp.local) }()
	go func() { ended <- cp.runClients(clientsCtx, server, began) }()

	var failure, clients error
	select {
	case err := <-s.failure():
		failure = fmt.Errorf("store in %s: %w", s.dir, err)
		stopClients()
		clients = <-ended
	case err := <-served:
		stopClients()
		<-ended
		return firstError(err, errors.New("API server ended by itself"))
	case clients = <-ended:
	}
	stopServer()
	err = <-served
	return firstError(failure, clients, err)
}

func firstError(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// runClients runs everything that works through the API, and returns when all of it has ended: with nil when ctx ended.
func (cp *ControlPlane) runClients(ctx context.Context, server *apiServer, began time.Time) error {
	g, running := errgroup.WithContext(ctx)
	g.Go(func() error {
		starting, cancel := context.WithTimeoutCause(running, startTimeout, fmt.Errorf("control plane is not ready after %s", startTimeout))
		defer cancel()
		err := cp.start(starting, running, g, server, began)
		if err == nil {
			close(cp.ready)
			cp.log.Info("control plane is ready", "url", cp.cfg.url(), "after", time.Since(began))
		}
		return err
	})
	g.Go(func() error { return cp.keepCertificates(running) })
	err := g.Wait()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// start brings up everything that works through the API, in the order in which one needs another, and returns when it
// is up. What stays goes on in g until running ends.
func (cp *ControlPlane) start(starting, running context.Context, g *errgroup.Group, server *apiServer, began time.Time) error {
	admin, err := kubernetes.NewForConfig(rest.AddUserAgent(cp.Client(bootstrapUser()), "bootstrap"))
	if err != nil {
		return fmt.Errorf("make the bootstrap client: %w", err)
	}
	registrations, err := registration.NewForConfig(rest.AddUserAgent(cp.Client(bootstrapUser()), "bootstrap"))
	if err != nil {
		return fmt.Errorf("make the bootstrap client: %w", err)
	}
	if err := healthy(starting, admin, "/livez/ping"); err != nil {
		return err
	}
	cp.log.Debug("API server serves", "after", time.Since(began))
	if err := reconcilePolicy(starting, admin); err != nil {
		return err
	}
	if err := policyInForce(starting, server.informers); err != nil {
		return err
	}
	cp.log.Debug("roles are in force", "after", time.Since(began))

	up, starting := errgroup.WithContext(starting)
	up.Go(func() error { return bootstrap(starting, admin, cp.cfg) })
	up.Go(func() error { return registerMetrics(starting, registrations.APIServices()) })
	up.Go(func() error { return healthy(starting, admin, "/readyz") })
	up.Go(func() error {
		c, err := newControllers(running, cp.cfg, cp.files, cp.Client)
		if err != nil {
			return err
		}
		if err := c.start(starting, running); err != nil {
			return err
		}
		g.Go(func() error { return c.run(running) })
		return podsAdmitted(starting, admin)
	})
	up.Go(func() error {
		s, err := newScheduler(running, cp.Client)
		if err != nil {
			return err
		}
		if err := s.start(starting, running); err != nil {
			return err
		}
		g.Go(func() error { return s.run(running) })
		return nil
	})
	return up.Wait()
}

// healthy waits until the API server answers well at path.
func healthy(ctx context.Context, client kubernetes.Interface, path string) error {
	return until(ctx, "API server at "+path, func() (bool, error) {
		return client.CoreV1().RESTClient().Get().AbsPath(path).Do(ctx).Error() == nil, nil
	})
}

// podsAdmitted waits until a pod can be created: its namespace must have a service account by then.
func podsAdmitted(ctx context.Context, client kubernetes.Interface) error {
	return until(ctx, "the default service account", func() (bool, error) {
		_, err := client.CoreV1().ServiceAccounts(metav1.NamespaceDefault).Get(ctx, "default", metav1.GetOptions{})
		return err == nil, nil
	})
}

// keepCertificates renews certificates before they end. The servers read them again by themselves.
func (cp *ControlPlane) keepCertificates(ctx context.Context) error {
	t := time.NewTicker(cp.renewEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-t.C:
			if _, err := renew(cp.cfg); err != nil {
				cp.log.Error("cannot renew certificates", "error", err)
			}
		}
	}
}
