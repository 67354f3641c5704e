package controlplane

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/tools/cache"
	kcm "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	"k8s.io/kubernetes/cmd/kube-controller-manager/names"
)

const (
	// newKindsPeriod is how often the garbage collector looks for new kinds after a definition changed, and
	// newKindsTime for how long: what the API serves follows its definitions within moments.
	newKindsPeriod = 500 * time.Millisecond
	newKindsTime   = 3 * time.Second
)

// collector is upstream's garbage collector as far as it learns of kinds. Sync looks for new ones at once and then each
// period, until its context ends.
type collector interface {
	Sync(ctx context.Context, kinds discovery.ServerResourcesInterface, period time.Duration)
}

// newKinds tells the garbage collector of new kinds when they are defined. By itself it looks each [discoveryPeriod]: for
// so long nothing would happen to an object of a new kind that is deleted in the foreground, nor to what it owns.
type newKinds struct {
	collector collector
	discovery discovery.DiscoveryInterface
	changed   chan struct{} // holds one token if a definition changed
}

func newNewKinds(cc kcm.ControllerContext, list []kcm.Controller) (kcm.Controller, error) {
	at := slices.IndexFunc(list, func(c kcm.Controller) bool { return c.Name() == names.GarbageCollectorController })
	if at < 0 {
		return nil, errors.New("there is no garbage collector")
	}
	gc, ok := list[at].(collector)
	if !ok {
		return nil, fmt.Errorf("the garbage collector, a %T, has no Sync", list[at])
	}
	kinds, err := cc.ClientBuilder.DiscoveryClient("generic-garbage-collector")
	if err != nil {
		return nil, fmt.Errorf("make the garbage collector's client: %w", err)
	}
	definitions, err := cc.ObjectOrMetadataInformerFactory.ForResource(apiextensionsv1.SchemeGroupVersion.WithResource("customresourcedefinitions"))
	if err != nil {
		return nil, fmt.Errorf("watch definitions of kinds: %w", err)
	}
	n := newKinds{gc, kinds, make(chan struct{}, 1)}
	wake := func() {
		select {
		case n.changed <- struct{}{}:
		default:
		}
	}
	_, err = definitions.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { wake() },
		UpdateFunc: func(any, any) { wake() },
		DeleteFunc: func(any) { wake() },
	})
	if err != nil {
		return nil, fmt.Errorf("watch definitions of kinds: %w", err)
	}
	return n, nil
}

// Name implements [kcm.Controller].
func (newKinds) Name() string { return "garbage-collector-new-kinds" }

// Run implements [kcm.Controller].
func (n newKinds) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.changed:
		}
		looking, stop := context.WithTimeout(ctx, newKindsTime)
		n.collector.Sync(looking, n.discovery, newKindsPeriod)
		stop()
	}
}
