package agent

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedv1 "k8s.io/client-go/kubernetes/typed/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	nodelisters "k8s.io/client-go/listers/node/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	evictionapi "k8s.io/kubernetes/pkg/kubelet/eviction/api"
	kubetypes "k8s.io/kubernetes/pkg/kubelet/types"

	"tutti.dev/tutti/internal/agent/node"
	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/podvolume"
	"tutti.dev/tutti/internal/agent/pressure"
	"tutti.dev/tutti/internal/agent/probe"
	"tutti.dev/tutti/internal/agent/translate"
	"tutti.dev/tutti/internal/agent/volumeplugin"
	"tutti.dev/tutti/internal/runtime"
)

// Agent runs this machine's pods. Make it with New, then Run it once.
type Agent struct {
	Config
	thresholds []evictionapi.Threshold
	log        *slog.Logger
	client     kubernetes.Interface
	machine    translate.Machine
	node       *node.Node
	plugins    *volumeplugin.Plugins // nil where Volumes are not the agent's own
	gate       *gate
	pressure   *pressure.Manager // of Run
	users      *users
	recorder   record.EventRecorder

	podInformer cache.SharedIndexInformer
	services    corelisters.ServiceLister
	classes     nodelisters.RuntimeClassLister
	informers   []cache.SharedIndexInformer // services and classes
	synced      []cache.InformerSynced

	mu     sync.Mutex
	ctx    context.Context // of Run
	actors map[string]*actor
	// ended are pods that are finished with here and not yet gone from the
	// informer.
	ended map[string]bool
	// found are workloads of pods that have no actor yet; nil once all have.
	found map[string]*leftover
	halt  *time.Duration
	// static are the pods of this machine's manifests, mirrors what the API has
	// of them, by full name.
	static  map[types.UID]bool
	mirrors map[string]*v1.Pod
}

// leftover is what a runtime has of a pod that has no actor (yet).
type leftover struct {
	rt   runtime.Runtime
	runs map[runtime.ID]runtime.Status
}

// New makes an agent; it touches nothing before Run.
func New(c Config) (*Agent, error) {
	client, err := clientFor(c.Client)
	if err != nil {
		return nil, fmt.Errorf("make the agent's client: %w", err)
	}
	return newAgent(c, client)
}

func newAgent(c Config, client kubernetes.Interface) (*Agent, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	thresholds, err := pressure.Parse(c.EvictionHard)
	if err != nil {
		return nil, err
	}
	a := &Agent{
		Config: c, thresholds: thresholds, log: c.Log, client: client,
		actors: map[string]*actor{}, ended: map[string]bool{}, found: map[string]*leftover{},
		static: map[types.UID]bool{}, mirrors: map[string]*v1.Pod{},
	}
	if a.Volumes == nil {
		a.plugins = volumeplugin.New(volumeplugin.Config{
			DataDir: c.DataDir, NodeName: c.NodeName, Client: client, Pods: a.pods,
			Node: func() *v1.Node { return a.node.Node() }, Report: func() { a.node.Report() }, Log: c.Log,
		})
	}
	a.node, err = node.New(node.Config{
		Name: c.NodeName, Hostname: c.Hostname, IP: c.NodeIP, Client: client, Version: c.Version,
		MaxPods: c.MaxPods, Port: c.Port, DataDir: c.DataDir, Handlers: slices.Collect(maps.Keys(c.Runtimes)), Images: c.Images.List,
		UserNamespaces: func(handler string) bool { return canMapIDs(a.Runtimes[handler]) == nil },
		SetRange:       c.Network.SetRange, Pressure: a.short, InUse: a.inUse, Told: a.toldInUse, Log: c.Log,
	})
	if err != nil {
		return nil, err
	}
	if a.gate, err = newGate(context.Background(), a.node.Node, c.UnsafeSysctls); err != nil {
		return nil, err
	}
	a.users = newUsers(a)
	memory := a.node.Node().Status.Capacity[v1.ResourceMemory]
	a.machine = translate.Machine{MemoryBytes: memory.Value(), DataDir: c.DataDir}
	if a.Probes == nil {
		a.Probes = probe.NewManager(probe.Config{Exec: a.exec, Event: a.event, Wake: a.wake, Log: c.Log})
	}
	if a.Volumes == nil {
		a.Volumes = podvolume.NewManager(podvolume.Config{
			Dir: c.DataDir, Client: client, NodeName: c.NodeName, ClusterDNS: c.ClusterDNS, ClusterDomain: c.ClusterDomain,
			Allocatable: func() v1.ResourceList { return a.node.Node().Status.Allocatable },
			Event:       func(p *v1.Pod, kind, reason, message string) { a.event(p, "", kind, reason, message) },
			Plugins:     a.plugins,
			Log:         c.Log,
		})
	}
	a.watchAPI()
	return a, nil
}

// watchAPI makes the informers: this node's pods and what they all may need.
func (a *Agent) watchAPI() {
	own := informers.NewSharedInformerFactoryWithOptions(a.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("spec.nodeName", a.NodeName).String()
	}))
	a.podInformer = own.Core().V1().Pods().Informer()
	shared := informers.NewSharedInformerFactory(a.client, 0)
	services, classes := shared.Core().V1().Services(), shared.Node().V1().RuntimeClasses()
	a.services, a.classes = services.Lister(), classes.Lister()
	a.synced = []cache.InformerSynced{services.Informer().HasSynced, classes.Informer().HasSynced}
	for _, i := range []cache.SharedIndexInformer{a.podInformer, services.Informer(), classes.Informer()} {
		// Nobody reads who last wrote which field: it is half of an object.
		_ = i.SetTransform(func(o any) (any, error) {
			if m, ok := o.(metav1.Object); ok {
				m.SetManagedFields(nil)
			}
			return o, nil
		})
	}
	a.informers = []cache.SharedIndexInformer{services.Informer(), classes.Informer()}
}

// Ready is closed once the node is registered and its condition Ready is
// true.
func (a *Agent) Ready() <-chan struct{} { return a.node.Ready() }

// Run runs the agent until ctx ends. Workloads go on when it returns. Only
// what makes it impossible to go on is an error.
func (a *Agent) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	a.mu.Lock()
	a.ctx = ctx
	a.mu.Unlock()

	broadcaster := record.NewBroadcaster(record.WithContext(ctx))
	defer broadcaster.Shutdown()
	broadcaster.StartRecordingToSink(&typedv1.EventSinkImpl{Interface: a.client.CoreV1().Events("")})
	// People and tests look for what "kubelet" has to say.
	recorder := broadcaster.NewRecorder(scheme.Scheme, v1.EventSource{Component: "kubelet", Host: a.NodeName})
	a.recorder = recorder

	a.watchPressure()

	var listed sync.WaitGroup
	for rt := range a.distinct() {
		listed.Add(1)
		g.Go(func() error { a.watchRuntime(ctx, rt, sync.OnceFunc(listed.Done)); return nil })
	}
	for _, i := range a.informers {
		g.Go(func() error { i.RunWithContext(ctx); return nil })
	}
	g.Go(func() error { return a.node.Run(ctx) })
	if a.CertFile != "" {
		g.Go(func() error { return a.serve(ctx) })
	}
	g.Go(func() error {
		// What runs must be known before the first pod is: or it would be
		// started a second time.
		listed.Wait()
		manifests, err := a.watchManifests(ctx, recorder)
		if err != nil {
			return err
		}
		g.Go(func() error { a.followManifests(ctx, manifests); return nil })
		if !cache.WaitForCacheSync(ctx.Done(), a.synced...) {
			return nil
		}
		handler, err := a.podInformer.AddEventHandler(cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { a.setPod(o.(*v1.Pod)) },
			UpdateFunc: func(_, o any) { a.setPod(o.(*v1.Pod)) },
			DeleteFunc: func(o any) { a.deletePod(o) },
		})
		if err != nil {
			return fmt.Errorf("watch pods: %w", err)
		}
		g.Go(func() error { a.podInformer.RunWithContext(ctx); return nil })
		if cache.WaitForCacheSync(ctx.Done(), handler.HasSynced) {
			a.adopt(ctx)
			a.node.SetRunning()
			g.Go(func() error { return a.runPlugins(ctx) })
			// Who is to be spared is known only now.
			g.Go(func() error { a.pressure.Run(ctx); return nil })
		}
		return nil
	})
	return g.Wait()
}

// runPlugins makes the volumes that others provide.
func (a *Agent) runPlugins(ctx context.Context) error {
	if a.plugins == nil {
		return nil
	}
	select {
	case <-a.node.Ready(): // they write to it
		return a.plugins.Run(ctx, a.recorder)
	case <-ctx.Done():
		return nil
	}
}

func (a *Agent) inUse() ([]v1.UniqueVolumeName, bool) {
	if a.plugins == nil {
		return nil, false
	}
	return a.plugins.InUse()
}

func (a *Agent) toldInUse(names []v1.UniqueVolumeName) {
	if a.plugins != nil {
		a.plugins.Told(names)
	}
}

// pods are this machine's as they are run here.
func (a *Agent) pods() []*v1.Pod {
	var list []*v1.Pod
	for _, x := range a.all() {
		list = append(list, x.pod())
	}
	return list
}

// distinct are the runtimes, each once.
func (a *Agent) distinct() map[runtime.Runtime]bool {
	set := map[runtime.Runtime]bool{}
	for _, rt := range a.Runtimes {
		set[rt] = true
	}
	return set
}

// setPod takes a pod as the API has it.
func (a *Agent) setPod(p *v1.Pod) {
	if kubetypes.IsMirrorPod(p) {
		a.setMirror(p, p)
		return
	}
	a.mu.Lock()
	x := a.actors[string(p.UID)]
	if x == nil && !a.ended[string(p.UID)] {
		a.begin(p, false)
	}
	a.mu.Unlock()
	if x != nil {
		x.setPod(p)
	}
}

// begin starts the actor of a pod that the API has, or has not any more. a.mu
// is held.
func (a *Agent) begin(p *v1.Pod, gone bool) {
	uid := string(p.UID)
	var runs []pod.Run
	var rt runtime.Runtime
	if !gone { // then nobody says of which class it was
		rt, _ = a.runtimeOf(p)
	}
	if left := a.found[uid]; left != nil {
		rt = left.rt
		for _, s := range left.runs {
			runs = append(runs, pod.Run{Status: s})
		}
		delete(a.found, uid)
	}
	x := newActor(a, p, runs)
	x.rt, x.absent, x.o.Gone = rt, gone, gone
	if a.halt != nil {
		x.o.Halt, x.o.HaltGrace = true, *a.halt
	}
	a.actors[uid] = x
	go x.run(a.ctx)
}

// deletePod takes that the API does not have a pod any more.
func (a *Agent) deletePod(o any) {
	if last, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = last.Obj
	}
	p, ok := o.(*v1.Pod)
	if !ok {
		return
	}
	if kubetypes.IsMirrorPod(p) {
		a.setMirror(p, nil)
		return
	}
	a.mu.Lock()
	x := a.actors[string(p.UID)]
	delete(a.ended, string(p.UID))
	if x != nil {
		x.absent = true
	}
	a.mu.Unlock()
	if x != nil {
		x.setPod(p)
		x.setGone()
	}
}

// forget drops a pod that is finished with, and its logs.
func (a *Agent) forget(x *actor) {
	a.mu.Lock()
	delete(a.actors, x.uid)
	if !x.absent {
		a.ended[x.uid] = true
	}
	a.mu.Unlock()
	a.leave(x.uid)
	if p := x.pod(); kubetypes.IsStaticPod(p) {
		go a.mirror(a.ctx, p)
	}
	if err := x.removeLogs(); err != nil {
		a.log.Warn("cannot remove what is left of a pod", "pod", x.uid, "err", err)
	}
}

// leave gives a pod's place on the machine to others.
func (a *Agent) leave(uid string) {
	if !a.gate.release(uid) {
		return
	}
	for _, x := range a.all() {
		x.mu.Lock()
		waits := x.o.Resize != nil
		x.mu.Unlock()
		if waits {
			go x.considerResize()
		}
	}
}

// adopt stops and removes what is on the machine of pods that the API does
// not have.
func (a *Agent) adopt(ctx context.Context) {
	a.mu.Lock()
	defer a.mu.Unlock()
	// They were deleted by force. What is left has a kubelet's grace: a longer
	// one would begin anew with each start, and its host ports stay taken.
	grace := int64(1)
	gone := func(uid, namespace, name string) {
		if a.actors[uid] != nil || uid == "" {
			return
		}
		a.log.Info("removing a pod that the API does not have", "pod", uid, "namespace", namespace, "name", name)
		a.begin(&v1.Pod{
			ObjectMeta: metav1.ObjectMeta{UID: types.UID(uid), Namespace: namespace, Name: name},
			Spec:       v1.PodSpec{TerminationGracePeriodSeconds: &grace},
		}, true)
	}
	for uid, left := range a.found {
		var namespace, name string
		for _, s := range left.runs {
			namespace, name = s.Labels[pod.LabelNamespace], s.Labels[pod.LabelPod]
		}
		gone(uid, namespace, name)
	}
	a.found = nil
	// Logs stay until the API has let go of the pod, which it may have done
	// while nobody was here.
	logs, _ := os.ReadDir(filepath.Join(a.DataDir, "logs"))
	for _, d := range logs {
		if part := strings.Split(d.Name(), "_"); len(part) == 3 {
			gone(part[2], part[0], part[1])
		}
	}
	attached, err := a.Network.List(ctx)
	if err != nil {
		a.log.Warn("cannot list pods of the network", "err", err)
	}
	for _, at := range attached {
		gone(at.ID, "", "")
	}
	for _, room := range []string{"pods", "memory"} {
		dirs, _ := os.ReadDir(filepath.Join(a.DataDir, room))
		for _, d := range dirs {
			gone(d.Name(), "", "")
		}
	}
	for _, holder := range a.Images.Holders() {
		gone(holder, "", "")
	}
}

// watchRuntime keeps the actors told of what a runtime's workloads do. told
// is called once everything that runs is known.
func (a *Agent) watchRuntime(ctx context.Context, rt runtime.Runtime, told func()) {
	defer told()
	const first, most = 20 * time.Millisecond, 5 * time.Second
	for delay := first; ctx.Err() == nil; {
		err := func() error {
			changes, err := rt.Watch(ctx)
			if err != nil {
				return fmt.Errorf("watch workloads: %w", err)
			}
			known := a.running(rt)
			list, err := rt.List(ctx)
			if err != nil {
				return fmt.Errorf("list workloads: %w", err)
			}
			delay = first
			a.setRuns(rt, known, list)
			told()
			for s := range changes {
				a.setRun(rt, s)
			}
			return nil
		}()
		if ctx.Err() != nil {
			return
		}
		a.log.Warn("lost the runtime; connecting again", "err", err)
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
		delay = min(2*delay, most)
	}
}

func (a *Agent) setRun(rt runtime.Runtime, s runtime.Status) {
	a.mu.Lock()
	x := a.actors[s.Pod]
	if x == nil && a.found != nil {
		if a.found[s.Pod] == nil {
			a.found[s.Pod] = &leftover{rt: rt, runs: map[runtime.ID]runtime.Status{}}
		}
		a.found[s.Pod].runs[s.ID] = s
	}
	a.mu.Unlock()
	if x != nil {
		x.setRun(s)
	}
}

// running are the workloads that are known to run.
func (a *Agent) running(rt runtime.Runtime) map[runtime.ID]bool {
	set := map[runtime.ID]bool{}
	for _, x := range a.all() {
		x.mu.Lock()
		for i := range x.o.Runs {
			if r := &x.o.Runs[i]; x.rt == rt && r.State == runtime.Running {
				set[r.ID] = true
			}
		}
		x.mu.Unlock()
	}
	return set
}

// setRuns takes all that a runtime has, listed after known was running: what
// was started meanwhile may not be in the list and is not lost.
func (a *Agent) setRuns(rt runtime.Runtime, known map[runtime.ID]bool, list []runtime.Status) {
	byPod := map[string][]runtime.Status{}
	for _, s := range list {
		byPod[s.Pod] = append(byPod[s.Pod], s)
	}
	for _, x := range a.all() {
		x.mu.Lock()
		mine := x.rt == rt
		x.mu.Unlock()
		if mine {
			x.setRuns(known, byPod[x.uid])
		}
		delete(byPod, x.uid)
	}
	for _, l := range byPod {
		for _, s := range l {
			a.setRun(rt, s)
		}
	}
}

// handlers are the names that a RuntimeClass can have for a runtime of this
// machine.
func (a *Agent) handlers() []string {
	names := slices.Sorted(maps.Keys(a.Runtimes))
	return slices.DeleteFunc(names, func(name string) bool { return name == "" })
}

// runtimeOf is the runtime that a pod's class names, or why there is none.
func (a *Agent) runtimeOf(p *v1.Pod) (runtime.Runtime, string) {
	if p.Spec.RuntimeClassName == nil || *p.Spec.RuntimeClassName == "" {
		return a.Runtimes[""], ""
	}
	class, err := a.classes.Get(*p.Spec.RuntimeClassName)
	if err != nil {
		return nil, fmt.Sprintf("failed to get sandbox runtime: RuntimeClass.node.k8s.io %q not found", *p.Spec.RuntimeClassName)
	}
	rt := a.Runtimes[class.Handler]
	if rt == nil {
		return nil, fmt.Sprintf("failed to get sandbox runtime: this machine has no runtime %q; use a RuntimeClass of one that it has (%s), or none", class.Handler, strings.Join(a.handlers(), ", "))
	}
	return rt, ""
}

func (a *Agent) hostIPs() []netip.Addr { return []netip.Addr{a.NodeIP} }

func (a *Agent) wake(uid types.UID) {
	a.mu.Lock()
	x := a.actors[string(uid)]
	a.mu.Unlock()
	if x != nil {
		x.kick()
	}
}

// StopPods stops all workloads gracefully, each with its own grace but none
// with more than the given one, and returns when nothing runs or ctx ends.
// The API is told nothing: a later agent starts them again. Until Run ends
// nothing is started any more.
func (a *Agent) StopPods(ctx context.Context, grace time.Duration) error {
	a.mu.Lock()
	a.halt = &grace
	a.mu.Unlock()
	actors := a.all()
	for _, x := range actors {
		x.change(func(o *pod.Observed) { o.Halt, o.HaltGrace = true, grace })
	}
	for i, x := range actors {
		select {
		case <-x.still:
		case <-x.done:
		case <-ctx.Done():
			return fmt.Errorf("stop pods: %d of %d may still run: %w", len(actors)-i, len(actors), ctx.Err())
		}
	}
	return nil
}
