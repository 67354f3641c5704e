package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/kubernetes/pkg/kubelet/events"

	"tutti.dev/tutti/internal/agent/env"
	"tutti.dev/tutti/internal/agent/hook"
	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/translate"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/runtime"
)

// How long to wait after a failure, doubling from the first to the most. The
// first are short because most early failures are the API being a moment
// behind: node authorization learns of a binding milliseconds later.
const (
	partFirst, partMost   = 100 * time.Millisecond, 20 * time.Second
	startFirst, startMost = time.Second, time.Minute
	pullFirst, pullMost   = 10 * time.Second, 300 * time.Second
)

// carryOut does one step and puts its outcome among what is observed.
func (x *actor) carryOut(ctx context.Context, s pod.Step) {
	log := x.a.log.With("pod", x.uid, "step", s.Do, "container", s.Container)
	begun := time.Now()
	var err error
	switch s.Do {
	case pod.OpenGround:
		x.part(&x.o.Ground, events.FailedCreatePodSandBox, "Failed to create pod sandbox: ", x.openGround(ctx))
	case pod.PrepareVolumes:
		x.part(&x.o.Volumes, events.FailedMountVolume, "", x.a.Volumes.Prepare(ctx, x.desired()))
	case pod.GetImage:
		x.getImage(ctx, s)
	case pod.Start:
		x.start(ctx, s)
	case pod.BeginStop:
		x.beginStop(ctx, s)
	case pod.Terminate:
		err = x.terminate(ctx, s.ID)
	case pod.Kill:
		x.stopped(s.ID, func(st *pod.Stop) { st.Killed = time.Now() })
		err = x.signal(ctx, s.ID, syscall.SIGKILL)
	case pod.Resize:
		x.resize(ctx, s)
	case pod.Remove:
		err = x.remove(ctx, s.ID)
	case pod.Close:
		err = x.close(ctx)
	case pod.Delete:
		err = x.delete(ctx)
	}
	log.Debug("step taken", "took", time.Since(begun))
	if err != nil && ctx.Err() == nil {
		log.Error("step failed", "err", err)
		// Steps without a fault of their own are decided again: not at once.
		select {
		case <-time.After(startFirst):
		case <-ctx.Done():
		}
	}
}

// part notes the outcome of making a part of the pod ready.
func (x *actor) part(p *pod.Part, reason, prefix string, err error) {
	x.change(func(o *pod.Observed) {
		if err == nil {
			*p = pod.Part{Ready: true}
			return
		}
		p.Fault = p.Fault.Next(time.Now(), reason, err.Error(), partFirst, partMost)
	})
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	x.a.log.Warn("pod is not ready to start", "pod", x.uid, "reason", reason, "err", err)
	if x.lasts(p) {
		x.a.event(x.desired(), "", v1.EventTypeWarning, reason, prefix+err.Error())
	}
}

func (x *actor) lasts(p *pod.Part) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return p.Fault.Lasts()
}

// openGround attaches the pod to the network and opens it in its runtime.
func (x *actor) openGround(ctx context.Context) error {
	p := x.desired()
	rt, err := x.runtime()
	if err != nil {
		return err
	}
	// What runs was asked when it began.
	if !slices.ContainsFunc(x.runs(), func(r pod.Run) bool { return r.State == runtime.Running }) {
		if err := x.a.mayRun(ctx, p, rt); err != nil {
			return err
		}
	}
	ids, err := x.a.users.of(p, rt)
	if err != nil {
		return err
	}
	netns := ""
	if !p.Spec.HostNetwork {
		n, err := translate.Network(p)
		if err != nil {
			return err
		}
		if err := x.a.node.WaitRange(ctx); err != nil {
			return fmt.Errorf("wait for this node's range of pod addresses: %w", err)
		}
		if ids.Size > 0 {
			// It must be made in the pod's user namespace.
			n.NetNS, err = rt.(runtime.UserNamespaces).OpenNamespaces(ctx, runtime.Pod{ID: x.uid, IDs: ids})
			if err != nil {
				return err
			}
		}
		at, err := x.a.Network.Attach(ctx, n)
		if err != nil {
			return fmt.Errorf("attach to the pod network: %w", err)
		}
		netns = at.NetNS
		x.change(func(o *pod.Observed) { o.IPs, x.netns = at.IPs, at.NetNS })
	}
	hostname, err := x.a.Volumes.Hostname(p)
	if err != nil {
		return err
	}
	asked := translate.Pod(p, hostname, netns)
	asked.IDs = ids
	ground, err := rt.Open(ctx, asked)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	x.change(func(o *pod.Observed) { o.GroundName = ground })
	return nil
}

// runtime returns the pod's runtime, or why it has none.
func (x *actor) runtime() (runtime.Runtime, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.rt == nil {
		// Its RuntimeClass may have come since.
		rt, why := x.a.runtimeOf(x.o.Pod)
		if rt == nil {
			return nil, errors.New(why)
		}
		x.rt = rt
	}
	return x.rt, nil
}

// runtimes are those that may have something of the pod: its own or, when it is
// not known which that is, all.
func (x *actor) runtimes() map[runtime.Runtime]bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.rt == nil {
		return x.a.distinct()
	}
	return map[runtime.Runtime]bool{x.rt: true}
}

// start runs one attempt of a container and then its postStart hook.
func (x *actor) start(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, kind := containerOf(p, s.Container)
	hooked := c.Lifecycle != nil && c.Lifecycle.PostStart != nil
	x.container(s.ID, func(k *pod.Container) { k.Starting, k.Hook = true, hooked })
	defer x.container(s.ID, func(k *pod.Container) { k.Starting, k.Hook = false, false })

	if why, err := x.launch(ctx, p, c, s); err != nil {
		if ctx.Err() != nil {
			return
		}
		x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedToStartContainer, "Error: "+err.Error())
		if why == pod.ReasonStart {
			x.restarted(s)
			x.change(func(o *pod.Observed) {
				o.Runs = append(o.Runs, pod.NotStarted(s.ID, time.Now(), translate.Labels(p, c, o.Containers[c.Name].ImageID, o.GroundName, s.Round), err.Error()))
			})
			return
		}
		x.container(s.ID, func(k *pod.Container) {
			k.Fault = k.Fault.Next(time.Now(), why, err.Error(), startFirst, startMost)
		})
		return
	}
	x.restarted(s)
	x.a.event(p, c.Name, v1.EventTypeNormal, events.CreatedContainer, "Container created")
	x.a.event(p, c.Name, v1.EventTypeNormal, events.StartedContainer, "Container started")
	if kind != initContainer {
		x.a.Probes.Add(x.pod(), c, s.ID, p.Status.PodIP)
	}
	x.container(s.ID, func(k *pod.Container) { k.Starting, k.Fault = false, nil })
	if !hooked {
		return
	}
	if err := hook.Run(ctx, c.Lifecycle.PostStart, c, s.ID, p.Status.PodIP, x.a.exec); err != nil && ctx.Err() == nil {
		x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedPostStartHook, "PostStartHook failed")
		x.a.log.Warn("postStart hook failed", "pod", x.uid, "container", c.Name, "err", err)
		x.beginStop(ctx, pod.Step{Container: c.Name, ID: s.ID, Grace: graceOf(p), Why: "FailedPostStartHook"})
	}
}

// launch asks the runtime to run an attempt. On failure it also says with
// what reason the API is to show it.
func (x *actor) launch(ctx context.Context, p *v1.Pod, c *v1.Container, s pod.Step) (reason string, err error) {
	id := s.ID
	rt, err := x.runtime()
	if err != nil {
		return pod.ReasonCreate, err
	}
	x.mu.Lock()
	img, ground := x.images[c.Name], x.o.GroundName
	x.mu.Unlock()
	args, vars, err := x.program(ctx, p, c, img.Config)
	if err != nil {
		return pod.ReasonConfig, err
	}
	mounts, err := x.a.Volumes.Mounts(p, c, id.Attempt, vars, podIPs(p))
	if err != nil {
		return pod.ReasonConfig, err
	}
	devices, err := x.a.Volumes.Devices(p, c)
	if err != nil {
		return pod.ReasonConfig, err
	}
	target, err := x.target(p, c.Name)
	if err != nil {
		return pod.ReasonConfig, err
	}
	w, err := translate.Workload(translate.Input{
		Pod: p, Container: c, Attempt: id.Attempt, Round: s.Round, Image: img.Image, ImageID: imageID(img.Image), Ground: ground, Layers: img.layers,
		Args: args, Env: env.Merge(img.Config.Env, vars), Mounts: mounts, Devices: devices, JoinPID: target,
		Process: x.process(), OnMachine: x.onMachine(c),
	}, x.a.machine)
	if err != nil {
		return pod.ReasonConfig, err
	}
	if err := os.MkdirAll(filepath.Dir(w.Log), 0o755); err != nil {
		return pod.ReasonCreate, fmt.Errorf("make log directory: %w", err)
	}
	// The pod may have been resized since it was opened, and must not have
	// less than its container.
	early := rt.UpdatePod(ctx, x.uid, translate.PodResources(p))
	st, err := rt.Start(ctx, w)
	switch {
	case err == nil:
		x.setRun(st)
		return "", nil
	case errors.Is(err, runtime.ErrRunsAsRoot):
		return pod.ReasonConfig, err
	case errors.Is(err, runtime.ErrInvalid):
		return pod.ReasonStart, err
	}
	return pod.ReasonRun, errors.Join(early, err)
}

// target is the run whose processes the container asks to see, nil if it asks
// for none.
func (x *actor) target(p *v1.Pod, container string) (*runtime.ID, error) {
	i := slices.IndexFunc(p.Spec.EphemeralContainers, func(e v1.EphemeralContainer) bool { return e.Name == container })
	if i < 0 || p.Spec.EphemeralContainers[i].TargetContainerName == "" {
		return nil, nil
	}
	name := p.Spec.EphemeralContainers[i].TargetContainerName
	for _, r := range x.runs() {
		if r.Name == name && r.State == runtime.Running {
			return &r.ID, nil
		}
	}
	return nil, fmt.Errorf("target container %q does not run", name)
}

// program says what a container runs, and the variables that the pod gives to
// it.
func (x *actor) program(ctx context.Context, p *v1.Pod, c *v1.Container, img image.Config) (args, vars []string, err error) {
	services, err := x.a.services.List(labels.Everything())
	if err != nil {
		return nil, nil, fmt.Errorf("list services: %w", err)
	}
	vars, err = env.Expand(ctx, env.Input{
		Pod: p, Container: c, Objects: x.a.Volumes, Services: services,
		Allocatable: x.a.node.Node().Status.Allocatable,
		VolumePath:  func(name string) (string, error) { return x.a.Volumes.VolumePath(p.UID, name) },
	})
	if err != nil {
		return nil, nil, err
	}
	args, err = env.Command(c, img, vars)
	return args, vars, err
}

// exec runs a program in one of the pod's containers, for probes and hooks.
func (a *Agent) exec(ctx context.Context, id runtime.ID, argv []string) (int, []byte, error) {
	out := &output{}
	code, err := workloads{a}.Exec(ctx, id, runtime.Exec{Args: argv, Streams: runtime.Streams{Stdout: out, Stderr: out}})
	return code, out.bytes(), err
}

// output keeps what a program writes, up to a bound.
type output struct {
	mu sync.Mutex
	b  []byte
}

const maxOutput = 10 << 10

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b = append(o.b, p[:min(len(p), maxOutput-len(o.b))]...)
	return len(p), nil
}

func (o *output) bytes() []byte {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.b)
}

func podIPs(p *v1.Pod) []string {
	var ips []string
	for _, ip := range p.Status.PodIPs {
		ips = append(ips, ip.IP)
	}
	return ips
}

// restarted notes a restart for the back-off.
func (x *actor) restarted(s pod.Step) {
	if s.ID.Attempt == 0 {
		return
	}
	x.container(s.ID, func(k *pod.Container) {
		ended := time.Now()
		for i := range x.o.Runs {
			if r := &x.o.Runs[i]; r.Name == s.ID.Name && r.Attempt == s.ID.Attempt-1 {
				ended = r.FinishedAt
				if c, _ := containerOf(x.o.Pod, s.Container); r.OtherImage(c) {
					k.Crash = pod.Crash{}
				}
			}
		}
		k.Crash = k.Crash.Next(ended, time.Now())
	})
}

// pod is the pod as the API has it.
func (x *actor) pod() *v1.Pod {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.o.Pod
}

// stopped changes how far the end of a run has come.
func (x *actor) stopped(id runtime.ID, f func(s *pod.Stop)) {
	x.change(func(o *pod.Observed) {
		s := o.Stops[id]
		f(&s)
		o.Stops[id] = s
	})
}

// beginStop notes that a run is to end and runs its preStop hook, which
// Terminate cuts short when the grace is over.
func (x *actor) beginStop(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, _ := containerOf(p, s.Container)
	hooked := c != nil && c.Lifecycle != nil && c.Lifecycle.PreStop != nil && s.Grace > 0
	x.a.Probes.Quiet(s.ID)
	x.stopped(s.ID, func(st *pod.Stop) {
		if st.Begun.IsZero() {
			*st = pod.Stop{Begun: time.Now(), Grace: s.Grace, Hook: hooked, Restart: s.Restart}
		}
	})
	why := s.Why
	if c != nil {
		why = withName(s.Why, c.Name)
	}
	x.a.event(p, s.Container, v1.EventTypeNormal, events.KillingContainer, why)
	if !hooked {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.Grace)
	defer cancel()
	if err := hook.Run(ctx, c.Lifecycle.PreStop, c, s.ID, p.Status.PodIP, x.a.exec); err != nil {
		x.a.event(p, c.Name, v1.EventTypeWarning, events.FailedPreStopHook, "PreStopHook failed")
		x.a.log.Warn("preStop hook failed", "pod", x.uid, "container", c.Name, "err", err)
	}
	x.stopped(s.ID, func(st *pod.Stop) { st.Hook = false })
}

func (x *actor) terminate(ctx context.Context, id runtime.ID) error {
	x.cancel(pod.BeginStop, id)
	sig := syscall.SIGTERM
	for _, r := range x.runs() {
		if r.ID == id && r.StopSignal != 0 {
			sig = r.StopSignal
		}
	}
	if err := x.signal(ctx, id, sig); err != nil {
		return err
	}
	x.stopped(id, func(s *pod.Stop) { s.Terminated = time.Now() })
	return nil
}

func (x *actor) signal(ctx context.Context, id runtime.ID, sig syscall.Signal) error {
	rt, err := x.runtime()
	if err != nil {
		return err
	}
	if err := rt.Signal(ctx, id, sig); err != nil && !errors.Is(err, runtime.ErrNotFound) && !errors.Is(err, runtime.ErrNotRunning) {
		return fmt.Errorf("send %s to %s: %w", sig, id, err)
	}
	return nil
}

// resize applies the container's resources to what runs, and notes why not.
func (x *actor) resize(ctx context.Context, s pod.Step) {
	p := x.desired()
	c, _ := containerOf(p, s.Container)
	err := x.apply(ctx, p, c, s)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		x.a.log.Warn("cannot resize a container", "pod", x.uid, "container", c.Name, "err", err)
	}
	x.container(s.ID, func(k *pod.Container) {
		if err != nil {
			k.Unresized = k.Unresized.Next(time.Now(), v1.PodReasonError, err.Error(), startFirst, startMost)
			return
		}
		k.Resources, k.Unresized = pod.ResourceKey(p, c), nil
	})
}

func (x *actor) apply(ctx context.Context, p *v1.Pod, c *v1.Container, s pod.Step) error {
	rt, err := x.runtime()
	if err != nil {
		return err
	}
	own, whole := translate.ContainerResources(p, c), translate.PodResources(p)
	// The kernel would kill processes to get below what they use.
	if s.LessMemory {
		used, err := rt.Stats(ctx, s.ID)
		if err != nil {
			return err
		}
		if used.Memory >= own.Memory {
			return fmt.Errorf("memory limit (%d) below current usage (%d); set it higher", own.Memory, used.Memory)
		}
	}
	// The pod must not have less than its container: it grows before and
	// shrinks after it.
	early := rt.UpdatePod(ctx, x.uid, whole)
	if err := rt.Update(ctx, s.ID, own); err != nil {
		return errors.Join(early, err)
	}
	// It can shrink only after the last of its containers.
	if err := rt.UpdatePod(ctx, x.uid, whole); err != nil && !x.othersUnderWay(s) {
		return err
	}
	return nil
}

// remove forgets a run and its log.
func (x *actor) remove(ctx context.Context, id runtime.ID) error {
	rt, err := x.runtime()
	if err != nil {
		return err
	}
	if err := rt.Remove(ctx, id); err != nil {
		return fmt.Errorf("remove %s: %w", id, err)
	}
	p := x.pod()
	if err := removeLog(translate.Log(x.a.DataDir, p.Namespace, p.Name, x.uid, id.Name, id.Attempt)); err != nil {
		return fmt.Errorf("remove log: %w", err)
	}
	x.change(func(o *pod.Observed) {
		for i := range o.Runs {
			if o.Runs[i].ID == id {
				o.Runs = append(o.Runs[:i:i], o.Runs[i+1:]...)
				break
			}
		}
		delete(o.Stops, id)
	})
	return nil
}

// removeLog removes a log and what was rotated out of it.
func removeLog(path string) error {
	files, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, f := range files {
		if name := filepath.Base(path); f.Name() == name || strings.HasPrefix(f.Name(), name+".") {
			err = errors.Join(err, os.Remove(filepath.Join(filepath.Dir(path), f.Name())))
		}
	}
	return err
}

// close takes everything of the pod from the machine; its logs go once the
// API does not have it any more.
func (x *actor) close(ctx context.Context) error {
	p := x.pod()
	if err := x.cancelOthers(ctx, key(pod.Close, runtime.ID{})); err != nil {
		return err
	}
	for rt := range x.runtimes() {
		if err := rt.Close(ctx, x.uid); err != nil {
			return fmt.Errorf("close: %w", err)
		}
	}
	x.a.users.release(x.uid)
	if err := x.a.Volumes.Remove(ctx, p.UID); err != nil {
		return fmt.Errorf("remove volumes: %w", err)
	}
	if !p.Spec.HostNetwork {
		if err := x.a.Network.Detach(ctx, x.uid); err != nil {
			return fmt.Errorf("detach from the pod network: %w", err)
		}
	}
	if err := x.a.Images.Release(ctx, x.uid); err != nil {
		return fmt.Errorf("release images: %w", err)
	}
	if x.evicted() { // its logs may be what fills the disk
		if err := x.removeLogs(); err != nil {
			return err
		}
	}
	x.change(func(o *pod.Observed) {
		o.Closed = true
		o.Ground, o.Volumes = pod.Part{}, pod.Part{}
	})
	return nil
}

// delete ends the graceful deletion that the API began.
func (x *actor) delete(ctx context.Context) error {
	p := x.pod()
	now := int64(0)
	uid := p.UID
	err := x.a.client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{
		GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: (*types.UID)(&uid)},
	})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s/%s: %w", p.Namespace, p.Name, err)
	}
	// The watch will say so too; this is sooner.
	x.change(func(o *pod.Observed) { o.Gone = true })
	return nil
}
