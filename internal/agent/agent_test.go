package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	nodelisters "k8s.io/client-go/listers/node/v1"
	"k8s.io/client-go/rest"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/security/apparmor"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/probe"
	"tutti.dev/tutti/internal/agent/translate"
	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/runtime"
)

// machine stands in for everything below the agent: runtime, images, network
// and volumes, in memory. It notes what it is asked for.
type machine struct {
	mu       sync.Mutex
	open     map[string]bool
	runs     map[runtime.ID]runtime.Status
	watchers map[chan runtime.Status]bool
	log      []string
	ignore   map[syscall.Signal]bool // signals that programs do not heed
	failing  map[string]error        // by container: what Start says
	images   map[string]bool
	volumes  error
	listed   func() // called when List has its answer
	probes   map[runtime.ID]probe.Result
	wake     func(types.UID)
}

func newMachine() *machine {
	return &machine{
		open: map[string]bool{}, runs: map[runtime.ID]runtime.Status{}, watchers: map[chan runtime.Status]bool{},
		ignore: map[syscall.Signal]bool{}, failing: map[string]error{}, images: map[string]bool{"app": true, "better": true}, probes: map[runtime.ID]probe.Result{},
	}
}

func (m *machine) note(format string, args ...any) {
	m.log = append(m.log, fmt.Sprintf(format, args...))
}

func (m *machine) notes() []string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.log)
}

func (m *machine) set(s runtime.Status) {
	m.runs[s.ID] = s
	for w := range m.watchers {
		w <- s
	}
}

// exit ends a run as if by itself.
func (m *machine) exit(id runtime.ID, code int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	s := m.runs[id]
	s.State, s.ExitCode, s.FinishedAt = runtime.Exited, code, time.Now()
	m.set(s)
}

// disconnect ends all watches, as a lost connection does.
func (m *machine) disconnect() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for w := range m.watchers {
		close(w)
		delete(m.watchers, w)
	}
}

func (m *machine) Open(_ context.Context, p runtime.Pod) (string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.open[p.ID] = true
	return "ground", nil
}

func (m *machine) Close(_ context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("close")
	delete(m.open, id)
	for r := range m.runs {
		if r.Pod == id {
			delete(m.runs, r)
		}
	}
	return nil
}

func (m *machine) Start(_ context.Context, w runtime.Workload) (runtime.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if s, ok := m.runs[w.ID]; ok {
		return s, nil
	}
	if err := m.failing[w.Name]; err != nil {
		m.note("fail %s", w.Name)
		return runtime.Status{}, err
	}
	if !m.open[w.Pod] {
		return runtime.Status{}, errors.New("pod is not open")
	}
	m.note("start %s %d", w.Name, w.Attempt)
	if w.JoinPID != nil {
		m.note("%s sees %s %d", w.Name, w.JoinPID.Name, w.JoinPID.Attempt)
	}
	s := runtime.Status{ID: w.ID, State: runtime.Running, StartedAt: time.Now(), Labels: w.Labels, StopSignal: w.StopSignal, Log: w.Log}
	m.set(s)
	return s, nil
}

func (m *machine) Signal(_ context.Context, id runtime.ID, sig syscall.Signal) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("%s %s", sig, id.Name)
	s, ok := m.runs[id]
	if ok && s.State == runtime.Running && !m.ignore[sig] {
		s.State, s.ExitCode, s.FinishedAt = runtime.Exited, 128+int(sig), time.Now()
		m.set(s)
	}
	return nil
}

func (m *machine) UpdatePod(_ context.Context, id string, r runtime.Resources) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.open[id] {
		return runtime.ErrNotFound
	}
	return nil
}

func (m *machine) Update(_ context.Context, id runtime.ID, r runtime.Resources) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("update %s memory=%d", id.Name, r.Memory)
	return nil
}

func (m *machine) Remove(_ context.Context, id runtime.ID) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.runs, id)
	return nil
}

func (m *machine) workloads() []runtime.Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []runtime.Status
	for _, s := range m.runs {
		list = append(list, s)
	}
	return list
}

func (m *machine) Watch(ctx context.Context) (<-chan runtime.Status, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := make(chan runtime.Status, 1000)
	m.watchers[c] = true
	context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.watchers[c] {
			delete(m.watchers, c)
			close(c)
		}
	})
	return c, nil
}

func (m *machine) Exec(context.Context, runtime.ID, runtime.Exec) (int, error) { return 0, nil }
func (m *machine) Attach(context.Context, runtime.ID, runtime.Streams) error   { return nil }
func (m *machine) Stats(context.Context, runtime.ID) (runtime.Stats, error) {
	return runtime.Stats{}, nil
}

// The same machine as runtime, network, images, volumes and probes.
type (
	machineRuntime struct{ *machine }
	machineNetwork struct{ *machine }
	machineImages  struct{ *machine }
	machineVolumes struct{ *machine }
	machineProbes  struct{ *machine }
)

func (m machineRuntime) List(context.Context) ([]runtime.Status, error) {
	list := m.workloads()
	m.mu.Lock()
	listed := m.listed
	m.mu.Unlock()
	if listed != nil {
		listed()
	}
	return list, nil
}

func (m machineNetwork) SetRange(context.Context, netip.Prefix) error { return nil }
func (m machineNetwork) Attach(_ context.Context, p network.Pod) (network.Attachment, error) {
	return network.Attachment{ID: p.ID, NetNS: "/netns/" + p.ID, IPs: []netip.Addr{netip.MustParseAddr("10.42.0.7")}}, nil
}
func (m machineNetwork) Detach(context.Context, string) error { return nil }
func (m machineNetwork) List(context.Context) ([]network.Attachment, error) {
	return nil, nil
}

func (m machineNetwork) Flows() ([]api.Flow, error) { return nil, nil }

func (m machineImages) Get(_ context.Context, name string) (image.Image, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.images[name] {
		return image.Image{}, image.ErrNotFound
	}
	return image.Image{Name: "docker.io/library/" + name + ":latest", Digest: "sha256:1", Config: image.Config{Cmd: []string{"/app"}}}, nil
}
func (m machineImages) Pull(ctx context.Context, name string, _ []image.Auth) (image.Image, error) {
	img, err := m.Get(ctx, name)
	if err != nil {
		err = errors.New("no such image in any registry")
	}
	return img, err
}
func (m machineImages) Reclaim(context.Context, func(int64) bool) (int64, error) { return 0, nil }

func (m machineImages) Hold(context.Context, image.Image, string) ([]string, error) {
	return []string{"/layer"}, nil
}
func (m machineImages) Release(context.Context, string) error         { return nil }
func (m machineImages) Holders() []string                             { return nil }
func (m machineImages) List(context.Context) ([]image.Image, error)   { return nil, nil }
func (m machineVolumes) Hostname(p *v1.Pod) (string, error)           { return p.Name, nil }
func (m machineVolumes) VolumePath(types.UID, string) (string, error) { return "", nil }
func (m machineVolumes) Remove(context.Context, types.UID) error      { return nil }
func (m machineVolumes) Prepare(context.Context, *v1.Pod) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.volumes
}
func (m machineVolumes) Mounts(*v1.Pod, *v1.Container, int, []string, []string) ([]runtime.Mount, error) {
	return nil, nil
}
func (m machineVolumes) MountImage(_ types.UID, name string, layers []string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.note("mount image at %s from %s", name, layers)
	return nil
}
func (m machineVolumes) Devices(*v1.Pod, *v1.Container) ([]runtime.Device, error) { return nil, nil }
func (m machineVolumes) TerminationMessage(_ context.Context, _ *v1.Pod, c *v1.Container, _ int, _ string, _ bool) (string, error) {
	return "last words of " + c.Name, nil
}
func (m machineVolumes) GetConfigMap(context.Context, string, string) (*v1.ConfigMap, error) {
	return nil, apierrors.NewNotFound(v1.Resource("configmaps"), "x")
}
func (m machineVolumes) GetSecret(context.Context, string, string) (*v1.Secret, error) {
	return nil, apierrors.NewNotFound(v1.Resource("secrets"), "x")
}

func (m machineProbes) Add(*v1.Pod, *v1.Container, runtime.ID, string) {}
func (m machineProbes) Quiet(runtime.ID)                               {}
func (m machineProbes) Remove(runtime.ID)                              {}
func (m machineProbes) Result(id runtime.ID) probe.Result {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.probes[id]
}

// setProbe is a probe's answer.
func (m *machine) setProbe(id runtime.ID, r probe.Result) {
	m.mu.Lock()
	m.probes[id] = r
	m.mu.Unlock()
	m.wake(types.UID(id.Pod))
}

const wait = 20 * time.Second

// bench is an agent over a machine and an API in memory.
type bench struct {
	*testing.T
	m      *machine
	dir    string
	client *fake.Clientset
	agent  *Agent
	stop   func()
}

func newBench(t *testing.T) *bench {
	b := &bench{T: t, m: newMachine(), dir: t.TempDir(), client: fake.NewClientset()}
	// As in the API, a status is written alone and only over the version that it
	// was decided on, all else leaves it, and each write makes a version.
	var (
		mu      sync.Mutex
		version int
	)
	b.client.PrependReactor("update", "pods", func(action clienttesting.Action) (bool, apiruntime.Object, error) {
		p := action.(clienttesting.UpdateAction).GetObject().DeepCopyObject().(*v1.Pod)
		mu.Lock()
		defer mu.Unlock()
		found, err := b.client.Tracker().Get(action.GetResource(), p.Namespace, p.Name)
		if err != nil {
			return true, nil, err
		}
		stored := found.DeepCopyObject().(*v1.Pod)
		if action.GetSubresource() == "status" {
			if p.ResourceVersion != stored.ResourceVersion {
				return true, nil, apierrors.NewConflict(action.GetResource().GroupResource(), p.Name, errors.New("it was changed"))
			}
			stored.Status = p.Status
			p = stored
		} else {
			p.Status = stored.Status
		}
		version++
		p.ResourceVersion = strconv.Itoa(version)
		return true, p, b.client.Tracker().Update(action.GetResource(), p, p.Namespace)
	})
	b.start()
	return b
}

// start runs an agent, after stop a new one over the same machine and API.
func (b *bench) start() {
	b.Helper()
	m := b.m
	a, err := newAgent(Config{
		NodeName: "here", NodeIP: netip.MustParseAddr("192.0.2.1"), DataDir: b.dir, Client: &rest.Config{},
		Runtimes: map[string]runtime.Runtime{"": machineRuntime{m}}, Images: machineImages{m}, Network: machineNetwork{m},
		Volumes: machineVolumes{m}, Probes: machineProbes{m},
	}, b.client)
	if err != nil {
		b.Fatal(err)
	}
	m.wake = a.wake
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- a.Run(ctx) }()
	b.agent = a
	b.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				b.Error(err)
			}
		case <-time.After(wait):
			b.Error("agent does not end")
		}
	})
	b.Cleanup(b.stop)
	// The control plane gives the node its range.
	b.until("node is registered", func() bool {
		n, err := b.client.CoreV1().Nodes().Get(ctx, "here", metav1.GetOptions{})
		if err != nil {
			return false
		}
		if n.Spec.PodCIDR == "" {
			n.Spec.PodCIDR = "10.42.0.0/24"
			_, err = b.client.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{})
		}
		return err == nil
	})
	select {
	case <-a.Ready():
	case <-time.After(wait):
		b.Fatal("node does not become ready")
	}
}

func (b *bench) until(what string, f func() bool) {
	b.Helper()
	for end := time.Now().Add(wait); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			p, _ := b.client.CoreV1().Pods("default").Get(context.Background(), "web", metav1.GetOptions{})
			b.Fatalf("timed out waiting until %s; machine: %q; status: %+v", what, b.m.notes(), p.Status)
		}
	}
}

func (b *bench) create(change func(p *v1.Pod)) *v1.Pod {
	b.Helper()
	grace := int64(30)
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "default", UID: types.UID("uid-" + b.Name()), Generation: 1},
		Spec: v1.PodSpec{
			NodeName: "here", RestartPolicy: v1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace,
			Containers: []v1.Container{{Name: "main", Image: "app", ImagePullPolicy: v1.PullIfNotPresent}},
		},
		Status: v1.PodStatus{Phase: v1.PodPending, QOSClass: v1.PodQOSBestEffort},
	}
	if change != nil {
		change(p)
	}
	p, err := b.client.CoreV1().Pods("default").Create(context.Background(), p, metav1.CreateOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func (b *bench) pod() *v1.Pod {
	p, err := b.client.CoreV1().Pods("default").Get(context.Background(), "web", metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func (b *bench) ready() {
	b.Helper()
	b.until("pod is ready", func() bool { return podutil.IsPodReady(b.pod()) })
}

func (b *bench) delete(grace int64) {
	b.Helper()
	p := b.pod()
	now := metav1.Now()
	p.DeletionTimestamp, p.DeletionGracePeriodSeconds, p.Finalizers = &now, &grace, []string{"test/keep"}
	if _, err := b.client.CoreV1().Pods("default").Update(context.Background(), p, metav1.UpdateOptions{}); err != nil {
		b.Fatal(err)
	}
}

func (b *bench) id(container string, attempt int) runtime.ID {
	return runtime.ID{Pod: "uid-" + b.Name(), Name: container, Attempt: attempt}
}

func container(name string) v1.Container {
	return v1.Container{Name: name, Image: "app", ImagePullPolicy: v1.PullIfNotPresent}
}

func TestPodBecomesReadyAndIsDeleted(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	s := b.pod().Status
	if s.Phase != v1.PodRunning || s.PodIP != "10.42.0.7" || s.HostIP != "192.0.2.1" || s.StartTime == nil {
		t.Errorf("status: %+v", s)
	}
	c := s.ContainerStatuses[0]
	if c.ContainerID != pod.ContainerID(b.id("main", 0)) || c.ImageID != "docker.io/library/app@sha256:1" || c.State.Running == nil || !c.Ready || !*c.Started {
		t.Errorf("container status: %+v", c)
	}
	b.delete(30)
	b.until("pod is deleted", func() bool { return b.pod() == nil })
	if got, want := b.m.notes(), []string{"start main 0", "terminated main", "close"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
	b.until("actor ends", func() bool {
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		return len(b.agent.actors) == 0 && len(b.agent.ended) == 0
	})
}

func TestKillAfterGrace(t *testing.T) {
	b := newBench(t)
	b.m.ignore[syscall.SIGTERM] = true
	b.create(nil)
	b.ready()
	b.delete(1) // shorter than the least
	b.until("pod is deleted", func() bool { return b.pod() == nil })
	if got, want := b.m.notes(), []string{"start main 0", "terminated main", "killed main", "close"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
}

func TestInitContainersSidecarsAndCompletion(t *testing.T) {
	b := newBench(t)
	always := v1.ContainerRestartPolicyAlways
	b.create(func(p *v1.Pod) {
		p.Spec.RestartPolicy = v1.RestartPolicyNever
		side := container("side")
		side.RestartPolicy = &always
		p.Spec.InitContainers = []v1.Container{container("first"), side, container("second")}
	})
	b.until("first runs", func() bool { return slices.Contains(b.m.notes(), "start first 0") })
	if s := b.pod().Status; s.Phase != v1.PodPending {
		t.Errorf("phase %s while initializing", s.Phase)
	}
	b.m.exit(b.id("first", 0), 0)
	b.until("second runs", func() bool { return slices.Contains(b.m.notes(), "start second 0") })
	b.m.exit(b.id("second", 0), 0)
	b.ready()
	b.m.exit(b.id("main", 0), 0)
	b.until("pod has succeeded", func() bool { return b.pod().Status.Phase == v1.PodSucceeded })
	want := []string{"start first 0", "start side 0", "start second 0", "start main 0", "terminated side"}
	if got := b.m.notes(); !slices.Equal(got[:len(want)], want) {
		t.Errorf("did %q, want %q", got, want)
	}
	if c := b.pod().Status.ContainerStatuses[0]; c.State.Terminated == nil || c.State.Terminated.Reason != "Completed" || c.State.Terminated.Message != "last words of main" {
		t.Errorf("container status: %+v", c)
	}
	b.until("pod is closed", func() bool { return slices.Contains(b.m.notes(), "close") })
}

func TestRestartAndBackOff(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	b.m.exit(b.id("main", 0), 1)
	b.until("restart", func() bool { return slices.Contains(b.m.notes(), "start main 1") })
	b.ready()
	b.m.exit(b.id("main", 1), 3)
	backsOff := func(delay string) func() bool {
		return func() bool {
			w := b.pod().Status.ContainerStatuses[0].State.Waiting
			return w != nil && w.Reason == pod.ReasonCrashLoop && strings.HasPrefix(w.Message, "back-off "+delay+" ")
		}
	}
	b.until("back-off shows", backsOff("10s"))
	c := b.pod().Status.ContainerStatuses[0]
	if c.RestartCount != 1 || c.LastTerminationState.Terminated == nil || c.LastTerminationState.Terminated.ExitCode != 3 {
		t.Errorf("container status: %+v", c)
	}
	if podutil.IsPodReady(b.pod()) {
		t.Error("pod is ready though its container waits")
	}
	// Another image does not wait for what the old one did, nor counts on.
	p := b.pod()
	p.Spec.Containers[0].Image = "better"
	if _, err := b.client.CoreV1().Pods("default").Update(context.Background(), p, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("the other image runs", func() bool { return slices.Contains(b.m.notes(), "start main 2") })
	b.ready()
	b.m.exit(b.id("main", 2), 3)
	b.until("back-off begins anew", backsOff("10s"))
}

func TestProgramThatCannotStart(t *testing.T) {
	b := newBench(t)
	b.m.failing["main"] = fmt.Errorf("%w: no such file", runtime.ErrInvalid)
	b.create(func(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyNever })
	b.until("pod has failed", func() bool { return b.pod().Status.Phase == v1.PodFailed })
	if c := b.pod().Status.ContainerStatuses[0]; c.State.Terminated == nil || c.State.Terminated.Reason != "StartError" || c.State.Terminated.ExitCode != 128 {
		t.Errorf("container status: %+v", c)
	}
}

func TestEphemeralContainerSeesItsTarget(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) {
		p.Spec.Containers = append(p.Spec.Containers, container("never"))
		p.Spec.Containers[1].Image = "none"
		for name, target := range map[string]string{"debugger": "main", "waiting": "never"} {
			p.Spec.EphemeralContainers = append(p.Spec.EphemeralContainers, v1.EphemeralContainer{
				EphemeralContainerCommon: v1.EphemeralContainerCommon(container(name)), TargetContainerName: target,
			})
		}
	})
	b.until("the debugger sees its target", func() bool { return slices.Contains(b.m.notes(), "debugger sees main 0") })
	b.until("the other waits for its own", func() bool {
		for _, c := range b.pod().Status.EphemeralContainerStatuses {
			if w := c.State.Waiting; c.Name == "waiting" && w != nil {
				return w.Reason == pod.ReasonConfig && w.Message == `target container "never" does not run`
			}
		}
		return false
	})
}

func TestMissingImage(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) { p.Spec.Containers[0].Image = "none" })
	waits := func(reason string) func() bool {
		return func() bool {
			list := b.pod().Status.ContainerStatuses
			return len(list) == 1 && list[0].State.Waiting != nil && list[0].State.Waiting.Reason == reason
		}
	}
	b.until("the failure shows", waits(pod.ReasonErrImagePull))
	b.until("the back-off shows", waits(pod.ReasonImageBackOff))
	if b.pod().Status.Phase != v1.PodPending {
		t.Error("pod is not pending")
	}
	b.delete(0)
	b.until("pod is deleted", func() bool { return b.pod() == nil })
}

func TestReadinessAndLiveness(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) {
		p.Spec.Containers[0].ReadinessProbe = &v1.Probe{}
		p.Spec.Containers[0].LivenessProbe = &v1.Probe{}
	})
	b.until("pod runs", func() bool { return b.pod().Status.Phase == v1.PodRunning })
	if podutil.IsPodReady(b.pod()) {
		t.Error("ready before its probe said so")
	}
	b.m.setProbe(b.id("main", 0), probe.Result{Started: true, Ready: true})
	b.ready()
	b.m.setProbe(b.id("main", 0), probe.Result{Started: true, Ready: true, LivenessFailed: true})
	b.until("restart", func() bool { return slices.Contains(b.m.notes(), "start main 1") })
}

func TestAgentRestart(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	b.stop()
	b.start()
	b.until("actor is back", func() bool {
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		return len(b.agent.actors) == 1
	})
	b.m.disconnect()
	b.m.exit(b.id("main", 0), 0)
	b.until("restart", func() bool { return slices.Contains(b.m.notes(), "start main 1") })
	if got, want := b.m.notes(), []string{"start main 0", "start main 1"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
}

func TestPodGoneWhileAgentWasAway(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	b.stop()
	if err := b.client.CoreV1().Pods("default").Delete(context.Background(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.start()
	b.until("the pod's rest is removed", func() bool {
		return slices.Equal(b.m.notes(), []string{"start main 0", "terminated main", "close"})
	})
}

func TestRunLostByTheRuntime(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) { p.Spec.RestartPolicy = v1.RestartPolicyNever })
	b.ready()
	b.m.mu.Lock()
	delete(b.m.runs, b.id("main", 0))
	b.m.mu.Unlock()
	b.m.disconnect()
	b.until("pod has failed", func() bool { return b.pod().Status.Phase == v1.PodFailed })
	if c := b.pod().Status.ContainerStatuses[0].State.Terminated; c == nil || c.Reason != "ContainerStatusUnknown" || c.ExitCode != 137 {
		t.Errorf("terminated: %+v", c)
	}
}

// A run that starts between the runtime's answer and its being read is not
// in that answer: it must not pass for lost and be started a second time.
func TestRunStartedWhileListing(t *testing.T) {
	b := newBench(t)
	answered, read := make(chan struct{}), make(chan struct{})
	b.m.mu.Lock()
	b.m.listed = sync.OnceFunc(func() { close(answered); <-read })
	b.m.mu.Unlock()
	b.m.disconnect()
	<-answered
	b.create(nil)
	b.ready()
	close(read)
	b.m.disconnect() // the second List comes after the first was taken
	b.until("the runtime was listed again", func() bool {
		b.m.mu.Lock()
		defer b.m.mu.Unlock()
		return len(b.m.watchers) == 1
	})
	b.m.exit(b.id("main", 0), 3)
	b.until("the end is seen", func() bool {
		c := b.pod().Status.ContainerStatuses
		return len(c) == 1 && (c[0].State.Terminated != nil || c[0].LastTerminationState.Terminated != nil)
	})
	c := b.pod().Status.ContainerStatuses[0]
	ended := c.State.Terminated
	if ended == nil {
		ended = c.LastTerminationState.Terminated
	}
	if ended.ExitCode != 3 {
		t.Errorf("the run ended with %+v", ended)
	}
}

// A pod that was deleted by force may still be stopping when another of its
// name is here: whoever asks by name means that one.
func TestPodsAreThoseOfTheAPI(t *testing.T) {
	b := newBench(t)
	b.m.ignore[syscall.SIGTERM] = true
	b.create(nil)
	b.ready()
	if err := b.client.CoreV1().Pods("default").Delete(context.Background(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	b.until("the stop has begun", func() bool { return slices.Contains(b.m.notes(), "terminated main") })
	if pods := b.agent.Pods(); len(pods) != 0 {
		t.Errorf("the pod is still shown: %s %s", pods[0].Name, pods[0].UID)
	}
	if _, err := b.agent.NetNS(types.UID("nobody")); err == nil {
		t.Error("an unknown pod has a network")
	}
}

// What a pod asks for its safety is given or the pod does not run.
func TestIsolationIsNotIgnored(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) {
		p.Spec.SecurityContext = &v1.PodSecurityContext{AppArmorProfile: &v1.AppArmorProfile{Type: v1.AppArmorProfileTypeRuntimeDefault}}
	})
	if apparmor.NewValidator().ValidateHost() == nil {
		b.until("the pod runs with it", func() bool { return b.pod().Status.Phase == v1.PodRunning })
	} else {
		b.until("the pod is refused", func() bool {
			s := b.pod().Status
			return s.Phase == v1.PodFailed && s.Reason == "AppArmor" && strings.HasSuffix(s.Message, "Cannot enforce AppArmor: AppArmor is not enabled on the host")
		})
	}

	b = newBench(t)
	b.create(func(p *v1.Pod) { p.Spec.HostUsers = new(bool) })
	b.until("the fault shows", func() bool {
		b.agent.mu.Lock()
		defer b.agent.mu.Unlock()
		for _, x := range b.agent.actors {
			x.mu.Lock()
			defer x.mu.Unlock()
			return x.o.Ground.Fault != nil && x.o.Ground.Fault.Message == "the pod's RuntimeClass has no user namespaces; use the class container, or leave hostUsers out"
		}
		return false
	})
	if notes := b.m.notes(); len(notes) > 0 {
		t.Errorf("did %q", notes)
	}
}

// A pod that asks for what is not there is told so.
func TestWarnings(t *testing.T) {
	b := newBench(t)
	b.create(func(p *v1.Pod) {
		p.Spec.ImagePullSecrets = []v1.LocalObjectReference{{Name: "none"}}
		p.Spec.Containers[0].Image = "none"
	})
	b.until("the missing secret is told of", func() bool {
		all, err := b.client.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
		return err == nil && slices.ContainsFunc(all.Items, func(e v1.Event) bool {
			return e.Message == "Unable to retrieve some image pull secrets (none); attempting to pull the image may not succeed."
		})
	})

	classes := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	class := "kata"
	if err := classes.Add(&nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: class}, Handler: class}); err != nil {
		t.Fatal(err)
	}
	a := &Agent{Config: Config{Runtimes: map[string]runtime.Runtime{"": nil, "runc": nil, "container": nil}}, classes: nodelisters.NewRuntimeClassLister(classes)}
	if _, why := a.runtimeOf(&v1.Pod{Spec: v1.PodSpec{RuntimeClassName: &class}}); why != `failed to get sandbox runtime: this machine has no runtime "kata"; use a RuntimeClass of one that it has (container, runc), or none` {
		t.Errorf("got %q", why)
	}
}

// Logs are kept as long as the API has the pod: also when it lets go of it
// while nobody is here, and with all that was rotated out of them.
func TestLogsGoWithTheirPod(t *testing.T) {
	b := newBench(t)
	b.stop()
	lost := translate.Log(b.dir, "default", "lost", "uid-lost", "main", 0)
	if err := os.MkdirAll(filepath.Dir(lost), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{lost, lost + ".1", lost + ".4"} {
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	other := filepath.Join(filepath.Dir(lost), "10.log")
	if err := os.WriteFile(other, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := removeLog(lost); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Dir(lost)); err != nil || len(left) != 1 || left[0].Name() != "10.log" {
		t.Errorf("left: %v %v", left, err)
	}
	b.start()
	b.until("the logs are gone", func() bool {
		_, err := os.Stat(filepath.Dir(filepath.Dir(lost)))
		return errors.Is(err, os.ErrNotExist)
	})
}

func TestStopPods(t *testing.T) {
	b := newBench(t)
	b.create(nil)
	b.ready()
	ctx, cancel := context.WithTimeout(context.Background(), wait)
	defer cancel()
	if err := b.agent.StopPods(ctx, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if got, want := b.m.notes(), []string{"start main 0", "terminated main"}; !slices.Equal(got, want) {
		t.Errorf("did %q, want %q", got, want)
	}
	if b.pod().Status.Phase != v1.PodRunning {
		t.Error("the API was told of the stop")
	}
	b.stop()
	b.start()
	b.until("the pod runs again", func() bool { return slices.Contains(b.m.notes(), "start main 1") })
}
