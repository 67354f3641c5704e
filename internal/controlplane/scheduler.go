package controlplane

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/dynamic/dynamicinformer"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/events"
	"k8s.io/kubernetes/pkg/scheduler"
	"k8s.io/kubernetes/pkg/scheduler/apis/config/latest"
	"k8s.io/kubernetes/pkg/scheduler/profile"
)

// maxBackoffSeconds is the longest pause after a failed attempt to place a pod. A pod that became placeable does not sit
// it out while the queue is empty; it only slows down attempts that end in errors.
const maxBackoffSeconds = 2

// podScheduler is kube-scheduler, built and not yet running. It has informers of its own: its pod informer leaves out
// pods that have ended, which the controllers must see and which must hold no capacity here.
type podScheduler struct {
	scheduler *scheduler.Scheduler
	informers informers.SharedInformerFactory
	dynamic   dynamicinformer.DynamicSharedInformerFactory
	events    events.EventBroadcasterAdapter //nolint:staticcheck // what the scheduler takes
}

func newScheduler(ctx context.Context, clientFor func(user.Info) *rest.Config) (*podScheduler, error) {
	c := clientFor(&user.DefaultInfo{Name: user.KubeScheduler, Groups: []string{user.AllAuthenticated}})
	client, err := kubernetes.NewForConfig(rest.AddUserAgent(c, "scheduler"))
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's client: %w", err)
	}
	dynamicClient, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's client: %w", err)
	}
	cfg, err := latest.Default()
	if err != nil {
		return nil, fmt.Errorf("make the scheduler's configuration: %w", err)
	}
	s := &podScheduler{
		informers: scheduler.NewInformerFactory(client, 0),
		dynamic:   dynamicinformer.NewFilteredDynamicSharedInformerFactory(dynamicClient, 0, corev1.NamespaceAll, nil),
		events:    events.NewEventBroadcasterAdapterWithContext(ctx, client),
	}
	s.scheduler, err = scheduler.New(ctx, client, s.informers, s.dynamic,
		profile.RecorderFactory(func(name string) events.EventRecorderLogger { return s.events.NewRecorder(name) }),
		scheduler.WithComponentConfigVersion(cfg.TypeMeta.APIVersion),
		scheduler.WithKubeConfig(c),
		scheduler.WithProfiles(cfg.Profiles...),
		scheduler.WithPercentageOfNodesToScore(cfg.PercentageOfNodesToScore),
		scheduler.WithPodInitialBackoffSeconds(cfg.PodInitialBackoffSeconds),
		scheduler.WithPodMaxBackoffSeconds(maxBackoffSeconds),
		scheduler.WithParallelism(cfg.Parallelism),
	)
	if err != nil {
		return nil, fmt.Errorf("build the scheduler: %w", err)
	}
	if err := bindVolumesByEvents(s.scheduler, s.informers); err != nil {
		return nil, err
	}
	return s, nil
}

// start starts the informers, which go on until running ends, and returns when the scheduler has seen all they hold.
func (s *podScheduler) start(ctx, running context.Context) error {
	s.informers.Start(running.Done())
	s.dynamic.Start(running.Done())
	for kind, synced := range s.informers.WaitForCacheSync(ctx.Done()) {
		if !synced {
			return fmt.Errorf("fill the scheduler's cache of %v: %w", kind, context.Cause(ctx))
		}
	}
	s.dynamic.WaitForCacheSync(ctx.Done())
	if err := s.scheduler.WaitForHandlersSync(ctx); err != nil {
		return fmt.Errorf("fill the scheduler's cache: %w", err)
	}
	return nil
}

// run schedules until ctx ends.
func (s *podScheduler) run(ctx context.Context) error {
	s.events.StartRecordingToSink(ctx.Done())
	defer s.events.Shutdown()
	defer s.informers.Shutdown()
	s.scheduler.Run(ctx)
	return nil
}
