package dns

import (
	"context"
	"net/netip"
	"strings"
	"sync"

	v1 "k8s.io/api/core/v1"
	discovery "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// cluster keeps a zone equal to the Services and EndpointSlices of a cluster.
type cluster struct {
	zone      *zone
	informers informers.SharedInformerFactory
	services  cache.Indexer
	slices    cache.Indexer

	// mu makes reading the caches and setting the zone one step: otherwise an
	// older reading could be set last.
	mu sync.Mutex
}

const byService = "service"

func newCluster(z *zone, client kubernetes.Interface) *cluster {
	return &cluster{
		zone:      z,
		informers: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(strip)),
	}
}

// follow starts the informers and keeps the zone up to date until ctx ends.
// It returns once the zone knows all that the cluster holds, or ctx ended.
func (c *cluster) follow(ctx context.Context) error {
	services := c.informers.Core().V1().Services().Informer()
	slices := c.informers.Discovery().V1().EndpointSlices().Informer()
	if err := slices.AddIndexers(cache.Indexers{byService: func(obj any) ([]string, error) {
		o, err := meta.Accessor(obj)
		if err != nil {
			return nil, err
		}
		return []string{o.GetNamespace() + "/" + o.GetLabels()[discovery.LabelServiceName]}, nil
	}}); err != nil {
		return err
	}
	c.services, c.slices = services.GetIndexer(), slices.GetIndexer()
	one, err := services.AddEventHandler(each(func(o object) { c.update(o.GetNamespace(), o.GetName()) }))
	if err != nil {
		return err
	}
	two, err := slices.AddEventHandler(each(func(o object) {
		c.update(o.GetNamespace(), o.GetLabels()[discovery.LabelServiceName])
	}))
	if err != nil {
		return err
	}
	c.informers.StartWithContext(ctx)
	cache.WaitFor(ctx, "", one.HasSyncedChecker(), two.HasSyncedChecker())
	return nil
}

type object interface {
	GetNamespace() string
	GetName() string
	GetLabels() map[string]string
}

// each calls f for whatever happens to an object; of an updated one with both
// versions, for it may have changed sides.
func each(f func(object)) cache.ResourceEventHandler {
	call := func(obj any) {
		if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = gone.Obj
		}
		if o, ok := obj.(object); ok {
			f(o)
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: call, DeleteFunc: call,
		UpdateFunc: func(old, now any) { call(old); call(now) },
	}
}

func (c *cluster) update(namespace, name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	obj, exists, err := c.services.GetByKey(namespace + "/" + name)
	if err != nil || !exists {
		c.zone.remove(namespace, name)
		return
	}
	slices, err := c.slices.ByIndex(byService, namespace+"/"+name)
	if err != nil {
		return // the index exists
	}
	eps := make([]*discovery.EndpointSlice, len(slices))
	for i, s := range slices {
		eps[i] = s.(*discovery.EndpointSlice)
	}
	c.zone.set(translate(obj.(*v1.Service), eps))
}

// translate says what is to be published of a Service.
func translate(s *v1.Service, slices []*discovery.EndpointSlice) *service {
	out := &service{namespace: s.Namespace, name: s.Name}
	switch {
	case s.Spec.Type == v1.ServiceTypeExternalName:
		out.externalName = s.Spec.ExternalName
		return out
	case s.Spec.ClusterIP != v1.ClusterIPNone:
		for _, text := range s.Spec.ClusterIPs {
			if ip, err := netip.ParseAddr(text); err == nil {
				out.clusterIPs = append(out.clusterIPs, ip)
			}
		}
		for _, p := range s.Spec.Ports {
			if p.Name != "" {
				out.ports = append(out.ports, port{p.Name, strings.ToLower(string(p.Protocol)), uint16(p.Port)})
			}
		}
		return out
	}
	out.headless = true
	for _, slice := range slices {
		var ports []port
		for _, p := range slice.Ports {
			if p.Name != nil && *p.Name != "" && p.Port != nil {
				proto := v1.ProtocolTCP
				if p.Protocol != nil {
					proto = *p.Protocol
				}
				ports = append(ports, port{*p.Name, strings.ToLower(string(proto)), uint16(*p.Port)})
			}
		}
		for _, e := range slice.Endpoints {
			if ready := e.Conditions.Ready; ready != nil && !*ready && !s.Spec.PublishNotReadyAddresses {
				continue
			}
			for _, text := range e.Addresses {
				ip, err := netip.ParseAddr(text)
				if err != nil {
					continue // a slice of domain names
				}
				one := endpoint{host: dashed(ip), ip: ip, ports: ports}
				if e.Hostname != nil && *e.Hostname != "" {
					one.host, one.given = strings.ToLower(*e.Hostname), true
				}
				out.endpoints = append(out.endpoints, one)
			}
		}
	}
	return out
}

// strip leaves out what only other clients need.
var strip cache.TransformFunc = func(obj any) (any, error) {
	if o, err := meta.Accessor(obj); err == nil {
		o.SetManagedFields(nil)
	}
	return obj, nil
}
