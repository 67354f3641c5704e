package main

import (
	"context"
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

	// A bookmark comes two seconds before the end, if there is a newer version by then: each five seconds.
	initial, timeout := true, int64(8)
	w, err := maps.Watch(ctx, metav1.ListOptions{
		AllowWatchBookmarks: true, SendInitialEvents: &initial, TimeoutSeconds: &timeout,
		ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan,
	})
	if err != nil {
		return err
	}
	defer w.Stop()
	seen := 0
	for e := range w.ResultChan() {
		switch e.Type {
		case watch.Added:
			seen++
		case watch.Bookmark:
			m, err := meta.Accessor(e.Object)
			if err != nil {
				return err
			}
			if m.GetAnnotations()[metav1.InitialEventsAnnotationKey] == "true" {
				fmt.Println("initial bookmark after", seen, "items")
			} else if m.GetResourceVersion() != "" {
				fmt.Println("another bookmark")
			}
		case watch.Error:
			return fmt.Errorf("watch: %v", e.Object)
		}
	}
	return nil
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
