package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// lease is what a pod holds on this machine until it is detached: written
// before anything is made for it, removed after everything is gone.
type lease struct {
	ID    string     `json:"id"`
	IP    netip.Addr `json:"ip"`
	Ports []HostPort `json:"ports,omitempty"`
}

// leases keeps one file per lease, so that granting one costs the same
// whatever their number.
type leases struct {
	dir string
	own []HostPort // of the machine: nobody gets them

	mu   sync.Mutex
	byID map[string]lease
	byIP map[netip.Addr]string
	last netip.Addr // granted most recently
}

func openLeases(dir string, own []HostPort, log *slog.Logger) (*leases, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make directory of leases: %w", err)
	}
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	l := &leases{dir: dir, own: own, byID: map[string]lease{}, byIP: map[netip.Addr]string{}}
	var newest time.Time
	for _, f := range files {
		path := filepath.Join(dir, f.Name())
		if strings.HasSuffix(path, ".new") {
			_ = os.Remove(path)
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read lease: %w", err)
		}
		var one lease
		if err := json.Unmarshal(data, &one); err != nil || one.ID != f.Name() || !one.IP.IsValid() {
			// Files are replaced, never rewritten: only a machine that lost
			// power leaves such a one, and with it went the pod.
			log.Warn("Removing an unreadable address lease", "path", path, "err", err)
			_ = os.Remove(path)
			continue
		}
		l.byID[one.ID], l.byIP[one.IP] = one, one.ID
		if info, err := f.Info(); err == nil && info.ModTime().After(newest) {
			newest, l.last = info.ModTime(), one.IP
		}
	}
	return l, nil
}

// grant returns the pod's lease and makes one if there is none. The ports of
// a lease never change.
func (l *leases) grant(pod Pod, from netip.Prefix) (lease, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, ok := l.byID[pod.ID]; ok {
		if !slices.Equal(old.Ports, pod.Ports) {
			return lease{}, errors.New("host ports differ from those it was attached with")
		}
		return old, nil
	}
	if !from.IsValid() {
		return lease{}, errors.New("this machine has no range of pod addresses yet")
	}
	for _, p := range pod.Ports {
		if err := p.validate(); err != nil {
			return lease{}, err
		}
		if slices.ContainsFunc(l.own, p.overlaps) {
			return lease{}, fmt.Errorf("host port %d/%s is this machine's own; choose another", p.HostPort, p.Protocol)
		}
		for _, other := range l.byID {
			if slices.ContainsFunc(other.Ports, p.overlaps) {
				return lease{}, fmt.Errorf("host port %d/%s is taken by pod %s; choose another, or remove that pod", p.HostPort, p.Protocol, other.ID)
			}
		}
	}
	ip, ok := nextFree(from, l.last, func(a netip.Addr) bool { _, taken := l.byIP[a]; return taken })
	if !ok {
		return lease{}, fmt.Errorf("all addresses of %s are in use; remove pods, or begin anew with a larger --cluster-cidr", from)
	}
	one := lease{ID: pod.ID, IP: ip, Ports: pod.Ports}
	if err := replaceJSON(filepath.Join(l.dir, pod.ID), one); err != nil {
		return lease{}, fmt.Errorf("write lease: %w", err)
	}
	l.byID[one.ID], l.byIP[one.IP], l.last = one, one.ID, one.IP
	return one, nil
}

func (l *leases) get(id string) (lease, bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	one, ok := l.byID[id]
	return one, ok
}

// all returns every lease, by address.
func (l *leases) all() []lease {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]lease, 0, len(l.byID))
	for _, one := range l.byID {
		all = append(all, one)
	}
	slices.SortFunc(all, func(a, b lease) int { return a.IP.Compare(b.IP) })
	return all
}

func (l *leases) release(id string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := os.Remove(filepath.Join(l.dir, id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove lease: %w", err)
	}
	delete(l.byIP, l.byID[id].IP)
	delete(l.byID, id)
	return nil
}

// nextFree returns the first free address after last, round the range, so
// that an address rests as long as possible before it is used again. The
// first address is the bridge's; the network's and broadcast's are left out.
func nextFree(r netip.Prefix, last netip.Addr, taken func(netip.Addr) bool) (netip.Addr, bool) {
	first := gateway(r).Next()
	usable := func(a netip.Addr) bool { return r.Contains(a) && r.Contains(a.Next()) && !a.Less(first) }
	a := last
	for range 1 << (r.Addr().BitLen() - r.Bits()) {
		if a = a.Next(); !usable(a) {
			a = first
		}
		if usable(a) && !taken(a) {
			return a, true
		}
	}
	return netip.Addr{}, false
}

// gateway is the bridge's own address in the range: the first.
func gateway(r netip.Prefix) netip.Addr { return r.Masked().Addr().Next() }

func (p HostPort) validate() error {
	switch p.Protocol {
	case "tcp", "udp", "sctp":
	default:
		return fmt.Errorf("host port %d has unknown protocol %q", p.HostPort, p.Protocol)
	}
	if p.HostPort == 0 || p.PodPort == 0 {
		return fmt.Errorf("host port %d to pod port %d: neither may be 0", p.HostPort, p.PodPort)
	}
	if p.HostIP.IsValid() && !p.HostIP.Is4() {
		return fmt.Errorf("host port %d: address %s is not IPv4", p.HostPort, p.HostIP)
	}
	return nil
}

// everywhere tells whether the port is open on all addresses.
func (p HostPort) everywhere() bool { return !p.HostIP.IsValid() || p.HostIP.IsUnspecified() }

func (p HostPort) overlaps(o HostPort) bool {
	return p.HostPort == o.HostPort && p.Protocol == o.Protocol &&
		(p.everywhere() || o.everywhere() || p.HostIP == o.HostIP)
}

// replaceJSON writes a file so that it is there completely or not at all.
func replaceJSON(path string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
