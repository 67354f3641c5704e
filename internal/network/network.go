// Package network gives pods their links and addresses on this machine by
// netlink and nftables: one bridge, a veth pair per pod, addresses from the
// node's range, masqueraded egress, host ports. It knows nothing of
// Kubernetes.
//
// A pod has a single address and a single route, to the machine: two pods of
// one machine reach each other through its routing, never past it. So packet
// filters and address translation see everything, with or without the
// kernel's br_netfilter. All neighbours are known beforehand: nobody asks for
// addresses, no frame is flooded, and what is attached is reachable at once.
package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"sigs.k8s.io/knftables"

	"tutti.dev/tutti/internal/host/netns"
)

// Config describes this machine's part of the pod network. Everything it
// names lives in the network namespace of the calling process.
type Config struct {
	// Dir keeps what must survive a restart: leases of addresses, host ports,
	// pinned namespaces, and the settings found on the machine before the
	// first change.
	Dir    string
	Bridge string // name of the bridge, "tutti0"
	// Local is "this machine" as its pods see it: an address on the bridge,
	// the same on every machine (default 10.41.0.1).
	Local   netip.Addr
	Cluster netip.Prefix // every pod of the cluster
	Service netip.Prefix // every ClusterIP
	MTU     int          // 0: that of the default route's link
	// Own are ports of the machine that no pod gets: forwarding them would cut
	// the machine off from itself. PodPort means nothing here.
	Own []HostPort
}

// Pod asks for a pod's network.
type Pod struct {
	ID    string
	Ports []HostPort
	// NetNS is the path of the pod's network namespace if the caller has made
	// it; "" has it made.
	NetNS string
}

// HostPort forwards a port of the machine to a port of the pod.
type HostPort struct {
	HostIP   netip.Addr // zero: every address
	HostPort uint16
	PodPort  uint16
	Protocol string // "tcp", "udp", "sctp"
}

// Attachment is a pod's network as it is.
type Attachment struct {
	ID    string
	NetNS string // path of the pinned namespace
	IPs   []netip.Addr
	Ports []HostPort
}

// Network is this machine's part of the pod network. Its methods are safe for
// concurrent use, and idempotent: each can be repeated after any failure.
type Network struct {
	cfg    Config
	log    *slog.Logger
	nft    knftables.Interface
	kernel *netlink.Handle // in the machine's namespace
	leases *leases
	pods   keyedMutex
	bridge int // link index

	mu   sync.RWMutex
	pool netip.Prefix // zero until SetRange

	sweeps   *time.Timer // the next sweep
	sweeping sync.Mutex
	closed   bool
}

// New makes the bridge, the settings and the nftables table that pods need,
// or adopts and corrects those that are there; links and addresses of
// attached pods stay. It needs root and the program nft.
func New(ctx context.Context, cfg Config, log *slog.Logger) (*Network, error) {
	if !cfg.Local.Is4() || !cfg.Cluster.Addr().Is4() || !cfg.Service.Addr().Is4() {
		return nil, fmt.Errorf("pod network: addresses must be IPv4: local %s, cluster %s, services %s", cfg.Local, cfg.Cluster, cfg.Service)
	}
	nft, err := knftables.New(knftables.IPv4Family, table)
	if err != nil {
		return nil, fmt.Errorf("use nftables: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "netns"), 0o700); err != nil {
		return nil, fmt.Errorf("make directory of network namespaces: %w", err)
	}
	held, err := openLeases(filepath.Join(cfg.Dir, "leases"), cfg.Own, log)
	if err != nil {
		return nil, err
	}
	kernel, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	if cfg.MTU == 0 {
		cfg.MTU = defaultMTU(kernel)
	}
	n := &Network{cfg: cfg, log: log, nft: nft, kernel: kernel, leases: held}
	if err := n.prepare(ctx); err != nil {
		kernel.Close()
		return nil, fmt.Errorf("prepare pod network: %w", err)
	}
	n.warnOfForeignRules(ctx)
	n.sweeps = time.AfterFunc(0, n.sweep)
	return n, nil
}

func (n *Network) prepare(ctx context.Context) error {
	f, err := readFound(n.cfg.Dir)
	if err != nil {
		return err
	}
	if f.Bridge != n.cfg.Bridge {
		if f.Bridge != "" {
			return fmt.Errorf("the network of %s was made with bridge %s, not %s", n.cfg.Dir, f.Bridge, n.cfg.Bridge)
		}
		f.Bridge = n.cfg.Bridge
		if err := replaceJSON(foundPath(n.cfg.Dir), f); err != nil {
			return fmt.Errorf("write settings found on the machine: %w", err)
		}
	}
	if err := n.ensureBridge(); err != nil {
		return err
	}
	if err := f.prepare(n.cfg.Dir); err != nil {
		return err
	}
	tx := n.nft.NewTransaction()
	rules(tx, n.cfg, n.leases.all())
	if err := n.nft.Run(ctx, tx); err != nil {
		return fmt.Errorf("write nftables table %s: %w", table, err)
	}
	return nil
}

// Close releases what the process holds. The network stays as it is.
func (n *Network) Close() {
	n.sweeps.Stop()
	n.sweeping.Lock() // one may be under way
	defer n.sweeping.Unlock()
	n.closed = true
	n.kernel.Close()
}

// SetRange gives the machine its range of pod addresses; its first address
// becomes the bridge's. The same range again changes nothing; another one is
// an error while pods hold addresses outside of it.
func (n *Network) SetRange(_ context.Context, r netip.Prefix) error {
	r = r.Masked()
	if !r.Addr().Is4() || r.Bits() > 30 {
		return fmt.Errorf("set range of pod addresses: %s is not an IPv4 range with room for pods", r)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.pool == r {
		return nil
	}
	for _, l := range n.leases.all() {
		if !r.Contains(l.IP) {
			return fmt.Errorf("set range of pod addresses to %s: pod %s holds %s", r, l.ID, l.IP)
		}
	}
	if err := n.setBridgeRange(r); err != nil {
		return fmt.Errorf("set range of pod addresses to %s: %w", r, err)
	}
	n.pool = r
	return nil
}

// Range returns the machine's range of pod addresses, zero before SetRange.
func (n *Network) Range() netip.Prefix {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.pool
}

// Attach gives the pod a network namespace, pinned below the network's
// directory, with an address of the machine's range, and opens its host
// ports. The pod can be reached when Attach returns. Attaching an attached
// pod returns its network, repaired if need be; a pod keeps its address until
// Detach, even across a restart of the machine.
func (n *Network) Attach(ctx context.Context, pod Pod) (Attachment, error) {
	if err := checkID(pod.ID); err != nil {
		return Attachment{}, err
	}
	defer n.pods.lock(pod.ID)()
	l, err := n.leases.grant(pod, n.Range())
	if err == nil {
		err = n.link(l, pod.NetNS)
	}
	if err == nil && len(l.Ports) > 0 {
		if err = n.openPorts(ctx, l); err == nil {
			err = n.forgetFlows(l)
		}
	}
	if err != nil {
		return Attachment{}, fmt.Errorf("attach pod %s to the network: %w", pod.ID, err)
	}
	return n.attachment(l), nil
}

// Detach closes the pod's host ports, unpins its namespace and frees its
// address. Its link goes with the namespace, some milliseconds later, or is
// removed if a process still holds the namespace after a while. Detaching an
// unknown pod is no error.
func (n *Network) Detach(ctx context.Context, id string) error {
	if err := checkID(id); err != nil {
		return err
	}
	defer n.pods.lock(id)()
	l, ok := n.leases.get(id)
	if !ok {
		return nil
	}
	err := func() error {
		if len(l.Ports) > 0 {
			if err := n.closePorts(ctx, l); err != nil {
				return fmt.Errorf("close host ports: %w", err)
			}
			if err := n.forgetFlows(l); err != nil {
				return err
			}
		}
		if err := n.forgetNeighbour(l); err != nil {
			return err
		}
		if err := netns.Remove(n.netnsPath(id)); err != nil {
			return err
		}
		if err := n.leases.release(id); err != nil {
			return err
		}
		n.sweeps.Reset(grace)
		return nil
	}()
	if err != nil {
		return fmt.Errorf("detach pod %s from the network: %w", id, err)
	}
	return nil
}

// List returns every pod that has not been detached. After a restart of the
// machine its pods are listed though their namespaces are gone: Attach makes
// them anew.
func (n *Network) List(context.Context) ([]Attachment, error) {
	all := n.leases.all()
	list := make([]Attachment, len(all))
	for i, l := range all {
		list[i] = n.attachment(l)
	}
	return list, nil
}

func (n *Network) attachment(l lease) Attachment {
	return Attachment{ID: l.ID, NetNS: n.netnsPath(l.ID), IPs: []netip.Addr{l.IP}, Ports: l.Ports}
}

func (n *Network) netnsPath(id string) string { return filepath.Join(n.cfg.Dir, "netns", id) }

func checkID(id string) error {
	if id == "" || strings.HasPrefix(id, ".") || strings.HasSuffix(id, ".new") || strings.ContainsRune(id, '/') {
		return fmt.Errorf("pod identifier %q cannot name a file", id)
	}
	return nil
}

// Purge undoes all that a Network over dir has done to this machine, with the
// Service proxy's nftables tables: links, rules, namespaces, settings. Only
// the leases in dir stay: a pod that comes back has the address that it had.
// It is no error if nothing is there. Nothing may use the network any more.
func Purge(ctx context.Context, dir string) error {
	f, err := readFound(dir)
	if err != nil {
		return err
	}
	errs := []error{removeTables(ctx)}
	pinned, err := os.ReadDir(filepath.Join(dir, "netns"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = append(errs, err)
	}
	for _, p := range pinned {
		errs = append(errs, netns.Remove(filepath.Join(dir, "netns", p.Name())))
	}
	if f.Bridge != "" {
		errs = append(errs, removeBridge(f.Bridge))
	}
	errs = append(errs, f.restore())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("purge pod network: %w", err)
	}
	for _, path := range []string{foundPath(dir), filepath.Join(dir, "netns")} {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("purge pod network: %w", err)
		}
	}
	return nil
}

// keyedMutex locks by name: calls for one pod wait for each other, calls for
// different pods do not.
type keyedMutex struct {
	mu    sync.Mutex
	locks map[string]*waiters
}

type waiters struct {
	sync.Mutex
	count int
}

func (k *keyedMutex) lock(key string) (unlock func()) {
	k.mu.Lock()
	if k.locks == nil {
		k.locks = map[string]*waiters{}
	}
	w := k.locks[key]
	if w == nil {
		w = &waiters{}
		k.locks[key] = w
	}
	w.count++
	k.mu.Unlock()
	w.Lock()
	return func() {
		w.Unlock()
		k.mu.Lock()
		defer k.mu.Unlock()
		if w.count--; w.count == 0 {
			delete(k.locks, key)
		}
	}
}
