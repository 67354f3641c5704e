package daemon

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path"
	"time"

	"github.com/distribution/reference"
	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"tutti.dev/tutti/internal/agent"
	"tutti.dev/tutti/internal/agent/provisioner"
	"tutti.dev/tutti/internal/agent/translate"
	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/controlplane"
	"tutti.dev/tutti/internal/dns"
	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/keeper/embedded"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/proxy"
	"tutti.dev/tutti/internal/systemd"
)

// rooms are the parts that others build on, nil until they are there.
type rooms struct {
	keeper  *keeper.Client
	images  *image.Local
	network *network.Network
	api     clusterAPI
	agent   *agent.Agent

	registryAuth func(namespace string, ref reference.Named) (image.Auth, bool)
}

// bringUp starts all parts: what needs nothing together, then the control
// plane, then what works through it together.
func (s *server) bringUp(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	for name, f := range map[string]func(context.Context) error{
		"keeper": s.startKeeper, "images": s.openImages, "network": s.makeNetwork,
	} {
		g.Go(func() error { return s.start.do(name, func() error { return f(gctx) }) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if s.joined != nil {
		if err := s.start.do("cluster", func() error { return s.joinCluster(ctx) }); err != nil {
			return err
		}
	} else {
		if err := s.start.do("control plane", func() error { return s.startControlPlane(ctx) }); err != nil {
			return err
		}
		// Nodes begin to pull when they start.
		if err := s.start.do("registry", func() error { return s.startRegistry(ctx) }); err != nil {
			return err
		}
	}
	g, gctx = errgroup.WithContext(ctx)
	for name, f := range map[string]func(context.Context) error{
		"node": s.startAgent, "services": s.startProxy, "names": s.startDNS, "volumes": s.startProvisioner,
	} {
		g.Go(func() error { return s.start.do(name, func() error { return f(gctx) }) })
	}
	return g.Wait()
}

// until waits for a part to be ready.
func (s *server) until(ctx context.Context, name string, ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(readyTimeout):
		return s.late(name)
	}
}

func (s *server) late(name string) error {
	return fmt.Errorf("%s is not ready after %s; the log says why (%s)", name, readyTimeout, s.logPlace())
}

// logPlace is where people find what the server says.
func (s *server) logPlace() string {
	if s.supervisor.Present() {
		return "`journalctl -u tutti`"
	}
	return s.dir.Log()
}

// readyTimeout bounds how long one part may take to become ready. Seconds are
// usual; a slow disk or an emulated processor makes minutes of them, and a
// service that gave up on those would begin anew for ever.
const readyTimeout = 10 * time.Minute

func (s *server) startKeeper(ctx context.Context) error {
	binary, err := embedded.Install(s.join("bin"))
	if err != nil {
		return err
	}
	s.rooms.keeper, err = keeper.Ensure(ctx, s.join("keeper"), binary, func(pid int) error {
		return cgroup.Join(cgroupRoot(s.dir)+"/keeper", pid)
	})
	if err != nil {
		return err
	}
	s.parts.opened("keeper", func() error { s.rooms.keeper.Close(); return nil })
	if err := embedded.Prune(s.join("bin"), binary); err != nil {
		s.log.Warn("old keepers stay on the disk", "err", err)
	}
	return nil
}

func (s *server) openImages(ctx context.Context) (err error) {
	s.rooms.images, err = image.Open(ctx, image.Options{Dir: s.join("images"), Log: s.log.With("room", "image")})
	if err != nil {
		return err
	}
	s.parts.opened("images", s.rooms.images.Close)
	handler := image.Handler(s.rooms.images)
	s.control.images.Store(&handler)
	return nil
}

// ownPorts are those that pods must leave to the server. The address that
// pods know the machine by keeps its ports anyway.
func ownPorts(s api.Settings) []network.HostPort {
	var own []network.HostPort
	for _, p := range ports(s) {
		if p.at.Addr() != local {
			own = append(own, network.HostPort{HostIP: p.at.Addr(), HostPort: p.at.Port(), Protocol: p.network})
		}
	}
	return own
}

func (s *server) makeNetwork(ctx context.Context) (err error) {
	s.rooms.network, err = network.New(ctx, network.Config{
		Dir: s.join("network"), Bridge: bridge, Local: local, Cluster: s.cluster, Service: s.service, Own: ownPorts(s.settings),
	}, s.log.With("room", "network"))
	if err != nil {
		return err
	}
	s.parts.opened("network", func() error { s.rooms.network.Close(); return nil })
	return nil
}

func (s *server) startControlPlane(ctx context.Context) error {
	host, _ := os.Hostname()
	sans := []string{s.nodeIP.String(), host}
	if a := s.settings.Address; a != "" && a != "0.0.0.0" {
		sans = append(sans, a)
	}
	cp, err := controlplane.New(controlplane.Config{
		DataDir: string(s.dir), Listen: listenAddresses(s.settings), Advertise: local,
		ClusterCIDR: s.cluster, ServiceCIDR: s.service, DNSAddress: serviceDNS(s.service),
		NodeName: s.settings.NodeName, SANs: sans, Log: s.log.With("room", "controlplane"),
		Taken: portTaken,
	})
	if err != nil {
		return err
	}
	s.rooms.api = clusterAPI{
		node:         cp.Client(controlplane.Node(s.settings.NodeName)),
		part:         func(user string) *rest.Config { return cp.Client(controlplane.User(user)) },
		certificates: cp.NodeCertificates(),
	}
	s.parts.run("control plane", cp.Run)
	return s.until(ctx, "the control plane", cp.Ready())
}

func (s *server) startAgent(ctx context.Context) error {
	runtimes, err := s.runtimes(ctx)
	if err != nil {
		return err
	}
	pods := podGroup(path.Join(cgroupRoot(s.dir), translate.Pods))
	if err := cgroup.Make(path.Join(cgroupRoot(s.dir), translate.BestEffort), cgroup.Limits{CPUShares: translate.BestEffortShares}); err != nil {
		return err
	}
	certificates := s.rooms.api.certificates
	a, err := agent.New(agent.Config{
		NodeName: s.settings.NodeName, NodeIP: s.nodeIP, DataDir: string(s.dir),
		ClusterDomain: clusterDomain, ClusterDNS: serviceDNS(s.service),
		Client:   s.rooms.api.node,
		Runtimes: runtimes, Group: pods,
		Images: s.rooms.images, RegistryAuth: s.rooms.registryAuth, Network: s.rooms.network, Version: api.Version,
		Port: agentPort, CertFile: certificates.CertFile, KeyFile: certificates.KeyFile, ClientCAFile: certificates.ClientCAFile,
		EvictionHard: s.settings.EvictionHard, SystemReserved: s.settings.SystemReserved, UnsafeSysctls: unsafeSysctls(s.settings),
		Log: s.log.With("room", "agent"),
	})
	if err != nil {
		return err
	}
	s.rooms.agent = a
	s.parts.run("agent", a.Run)
	return s.until(ctx, "the node", a.Ready())
}

// clusterAPI is how this machine's parts reach the API: in this process, or at
// a server elsewhere.
type clusterAPI struct {
	node         *rest.Config                   // as this machine's node
	part         func(user string) *rest.Config // as a part that has an identity of its own
	certificates controlplane.NodeCertificates
}

func (s *server) client(user string) (kubernetes.Interface, error) {
	return kubernetes.NewForConfig(s.rooms.api.part(user))
}

func (s *server) startProxy(ctx context.Context) error {
	c, err := s.client("system:kube-proxy")
	if err != nil {
		return err
	}
	p := proxy.New(proxy.Config{
		Client: c, NodeName: s.settings.NodeName, NodeIP: s.nodeIP, ClusterCIDR: s.cluster, Log: s.log.With("room", "proxy"),
	})
	s.parts.run("proxy", p.Run)
	return s.until(ctx, "the Service proxy", p.Ready())
}

func (s *server) startDNS(ctx context.Context) error {
	c, err := s.client(controlplane.DNSUser)
	if err != nil {
		return err
	}
	d := dns.New(dns.Config{
		Client: c, Domain: clusterDomain, Pods: s.cluster, Services: s.service,
		Listen: []netip.AddrPort{netip.AddrPortFrom(local, dnsPort)}, Log: s.log.With("room", "dns"),
	})
	s.parts.run("names", d.Run)
	return s.until(ctx, "the name server", d.Ready())
}

func (s *server) startProvisioner(ctx context.Context) error {
	c, err := s.client(controlplane.VolumesUser)
	if err != nil {
		return err
	}
	cfg := provisioner.Config{
		Client: c, NodeName: s.settings.NodeName, Dir: s.join("volumes"), Log: s.log.With("room", "volumes"),
	}
	s.parts.run("volumes", func(ctx context.Context) error { return provisioner.Run(ctx, cfg) })
	return nil
}

// idle says that no workload runs for this directory.
func (s *server) idle(ctx context.Context) bool {
	if s.rooms.keeper == nil {
		return s.fresh // else it may hold some: leave it alone
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	all, err := s.rooms.keeper.List(ctx)
	if err != nil {
		return false
	}
	for _, w := range all {
		if w.Running {
			return false
		}
	}
	return true
}

const (
	// stopGrace is the most that a pod gets to end by itself when somebody
	// waits for the machine to stop.
	stopGrace = 30 * time.Second
	// lastGrace is the same when the machine is shut down: a database that asks
	// for minutes gets them.
	lastGrace = 10 * time.Minute
	// stopMargin is what stopping may take beyond the grace.
	stopMargin = 10 * time.Second
)

func (s *server) stopPods(grace time.Duration) error {
	if s.rooms.agent == nil {
		return nil // none was started
	}
	ctx, cancel := context.WithTimeout(context.Background(), grace+stopMargin)
	defer cancel()
	return s.rooms.agent.StopPods(ctx, grace)
}

// goingDown says whether this server is told to end because the whole machine
// is shut down, or started again.
func (s *server) goingDown() bool {
	if !s.supervisor.Present() {
		return false
	}
	// It is told in milliseconds, but by a machine that is busy to death; not
	// to know would cost the pods their grace. A stop may take 90 s.
	ctx, cancel := context.WithTimeout(context.Background(), 45*time.Second)
	defer cancel()
	return systemd.Machine().GoingDown(ctx)
}
