package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	ctrl "sigs.k8s.io/controller-runtime"
)

// follow prints a line for every change of a ConfigMap that an informer sees, and for every change of the leader among
// the followers in the namespace, of whom this is one.
func follow(ctx context.Context, namespace, identity string) error {
	c, err := clientset()
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithNamespace(namespace))
	informer := factory.Core().V1().ConfigMaps().Informer()
	if _, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { say("added", obj) },
		UpdateFunc: func(_, obj any) { say("changed", obj) },
		DeleteFunc: func(obj any) {
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			say("deleted", obj)
		},
	}); err != nil {
		return err
	}
	factory.Start(ctx.Done())
	if !cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
		return ctx.Err()
	}
	fmt.Println("synced")

	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: "followers"},
			Client:     c.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
		},
		LeaseDuration:   30 * time.Second, // longer than the server may be away
		RenewDeadline:   25 * time.Second,
		RetryPeriod:     300 * time.Millisecond,
		ReleaseOnCancel: true,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(context.Context) { fmt.Println("leading") },
			OnStoppedLeading: func() { fmt.Println("not leading") },
			OnNewLeader:      func(who string) { fmt.Println("leader", who) },
		},
	})
	if err != nil {
		return err
	}
	elector.Run(ctx)
	if ctx.Err() == nil {
		return fmt.Errorf("%s lost its lease", identity)
	}
	factory.Shutdown()
	return nil
}

// say prints what happened to which object, and what the object says now.
func say(what string, obj any) {
	m := obj.(*corev1.ConfigMap)
	fmt.Println(what, m.Name, m.Data["round"])
}

// list prints what a list in pages gives, while the objects change between two pages, and which bookmarks a watch gets.
func list(ctx context.Context, namespace string, size int64) error {
	c, err := clientset()
	if err != nil {
		return err
	}
	maps := c.CoreV1().ConfigMaps(namespace)
	var version string
	pages, items := 0, 0
	for opts := (metav1.ListOptions{Limit: size}); ; pages++ {
		page, err := maps.List(ctx, opts)
		if err != nil {
			return err
		}
		if version != "" && version != page.ResourceVersion {
			return fmt.Errorf("page %d is of version %s, the first was of %s", pages, page.ResourceVersion, version)
		}
		version = page.ResourceVersion
		items += len(page.Items)
		if opts.Continue = page.Continue; opts.Continue == "" {
			break
		}
		// A list is of one moment: what comes later is not in it.
		late := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "zz-late-"}}
		if _, err := maps.Create(ctx, late, metav1.CreateOptions{}); err != nil {
			return err
		}
	}
	fmt.Println(pages+1, "pages,", items, "items")

	initial := true
	seen := 0
	if err := bookmark(ctx, maps.Watch, metav1.ListOptions{SendInitialEvents: &initial, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan},
		func() { seen++ },
		func(m metav1.Object) bool { return m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" }); err != nil {
		return fmt.Errorf("watch from the list on: %w", err)
	}
	fmt.Println("initial bookmark after", seen, "items")

	// Of what nobody writes, only the versions of everything else tell how old a watch is. A bookmark with one comes
	// two seconds before the end.
	ranges := c.CoreV1().LimitRanges(namespace)
	none, err := ranges.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	timeout := int64(9)
	if err := bookmark(ctx, ranges.Watch, metav1.ListOptions{ResourceVersion: none.ResourceVersion, TimeoutSeconds: &timeout},
		func() {},
		func(m metav1.Object) bool { return m.GetResourceVersion() != none.ResourceVersion }); err != nil {
		return fmt.Errorf("watch what nobody writes: %w", err)
	}
	fmt.Println("a bookmark of a newer version")
	return nil
}

// bookmark watches until it gets the bookmark that is meant. It calls added for each object that is told of before.
func bookmark(ctx context.Context, start func(context.Context, metav1.ListOptions) (watch.Interface, error), opts metav1.ListOptions,
	added func(), meant func(metav1.Object) bool) error {
	opts.AllowWatchBookmarks = true
	w, err := start(ctx, opts)
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		switch e.Type {
		case watch.Added:
			added()
		case watch.Bookmark:
			m, err := meta.Accessor(e.Object)
			if err != nil {
				return err
			}
			if meant(m) {
				return nil
			}
		case watch.Error:
			return fmt.Errorf("%v", e.Object)
		}
	}
	return errors.New("it ended without the bookmark")
}

func clientset() (*kubernetes.Clientset, error) {
	config, err := ctrl.GetConfig()
	if err != nil {
		return nil, err
	}
	where := "a kubeconfig"
	if os.Getenv("KUBECONFIG") == "" {
		where = "the pod's service account"
	}
	fmt.Println("by", where, "to", config.Host)
	return kubernetes.NewForConfig(config)
}
