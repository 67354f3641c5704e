// Package probe runs the startup, readiness and liveness probes of
// containers. It never waits on a clock that a container could beat: the
// first attempt is made at once, and until a container has answered for the
// first time it is asked again after milliseconds, so that Ready follows the
// program and not the period.
package probe

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	k8sprobe "k8s.io/kubernetes/pkg/probe"
	grpcprobe "k8s.io/kubernetes/pkg/probe/grpc"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"
	"k8s.io/kubernetes/third_party/forked/golang/expansion"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/runtime"
)

// PeriodAnnotation on a pod replaces the period of its probes by a Go
// duration, which may be shorter than the second that the API allows.
// web.probes.tutti.dev/period is for the probes of the container web alone.
const PeriodAnnotation = api.AnnotationProbePeriod

const (
	minPeriod = 10 * time.Millisecond
	// The first attempts are this far apart, doubling up to the period. A
	// probe that runs a program costs a process, so it starts slower.
	firstPause     = 20 * time.Millisecond
	firstExecPause = 100 * time.Millisecond
	// An attempt that could not be made at all is repeated this often before
	// it counts as failed.
	maxErrors = 3
	maxOutput = 10 << 10
)

// Config is what a Manager needs of its surroundings. Only Log may be nil.
type Config struct {
	// Exec runs a program in a container and returns its exit code and what
	// it wrote; it must return soon after ctx ends.
	Exec func(ctx context.Context, id runtime.ID, argv []string) (code int, output []byte, err error)
	// Event reports something to the pod's owner; type is Normal or Warning.
	Event func(pod *v1.Pod, container, eventType, reason, message string)
	// Wake is called, outside of any lock, after a result of the pod changed.
	Wake func(pod types.UID)
	Log  *slog.Logger
}

// Result is what is known of one run of a container.
type Result struct {
	// Started is true once the startup probe has succeeded, or there is none.
	Started bool
	// Ready is true when the container is started and its readiness probe
	// holds, or there is none.
	Ready bool
	// LivenessFailed and StartupFailed ask for a restart. They stay until
	// Remove.
	LivenessFailed bool
	StartupFailed  bool
	// Message is the last failure.
	Message string
}

// Manager runs the probes of every container added to it. Between attempts it
// holds one timer per probe and no goroutine.
type Manager struct {
	cfg  Config
	http httpprobe.Prober
	tcp  tcpprobe.Prober
	grpc grpcprobe.Prober

	mu         sync.Mutex
	containers map[runtime.ID]*container
}

// NewManager returns a Manager that probes nothing yet.
func NewManager(cfg Config) *Manager {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Manager{
		cfg:        cfg,
		http:       httpprobe.New(false),
		tcp:        tcpprobe.New(),
		grpc:       grpcprobe.New(),
		containers: map[runtime.ID]*container{},
	}
}

// container is one run of a container; its fields below mu change.
type container struct {
	m      *Manager
	pod    *v1.Pod
	spec   *v1.Container
	id     runtime.ID
	podIP  string
	period time.Duration // 0: that of each probe
	ctx    context.Context
	cancel context.CancelFunc

	mu      sync.Mutex
	result  Result
	startup *worker
	others  []*worker // readiness, liveness
}

// Add starts the probes of a container that has just been started, or found
// running: then the pod's status says whether it was ready, and it remains so
// until a probe says otherwise. podIP is the address to probe. Adding a run
// that is there already changes nothing.
func (m *Manager) Add(pod *v1.Pod, spec *v1.Container, id runtime.ID, podIP string) {
	m.mu.Lock()
	if _, ok := m.containers[id]; ok {
		m.mu.Unlock()
		return
	}
	c := &container{m: m, pod: pod, spec: spec, id: id, podIP: podIP, period: periodOf(pod, spec.Name)}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	m.containers[id] = c
	m.mu.Unlock()

	since := time.Now()
	known := previous(pod, id)
	c.mu.Lock()
	defer c.mu.Unlock()
	if known != nil {
		c.result.Started = known.Started != nil && *known.Started
		c.result.Ready = known.Ready
		if known.State.Running != nil && !known.State.Running.StartedAt.IsZero() {
			since = known.State.Running.StartedAt.Time
		}
	}
	if p := spec.ReadinessProbe; p != nil {
		c.others = append(c.others, c.newWorker(readiness, p, since))
	}
	if p := spec.LivenessProbe; p != nil {
		c.others = append(c.others, c.newWorker(liveness, p, since))
	}
	if p := spec.StartupProbe; p != nil && !c.result.Started {
		c.startup = c.newWorker(startup, p, since)
		c.startup.schedule(c.startup.firstDelay())
		return
	}
	c.begin()
}

// begin marks the container started and starts the other probes. The caller
// holds c.mu.
func (c *container) begin() {
	c.result.Started = true
	if c.spec.ReadinessProbe == nil {
		c.result.Ready = true
	}
	for _, w := range c.others {
		w.schedule(w.firstDelay())
	}
}

// previous is what the pod's status said of this very run.
func previous(pod *v1.Pod, id runtime.ID) *v1.ContainerStatus {
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses} {
		for i := range list {
			if list[i].Name == id.Name && strings.HasSuffix(list[i].ContainerID, "://"+id.String()) {
				return &list[i]
			}
		}
	}
	return nil
}

// periodOf is the period that the pod's annotations give to a container's
// probes, 0 if they do not.
func periodOf(pod *v1.Pod, container string) time.Duration {
	for _, key := range []string{container + "." + PeriodAnnotation, PeriodAnnotation} {
		if d, err := parsePeriod(pod.Annotations[key]); err == nil {
			return d
		}
	}
	return 0
}

func parsePeriod(value string) (time.Duration, error) {
	d, err := time.ParseDuration(value)
	if err == nil && d < minPeriod {
		err = fmt.Errorf("%s is less than %s", d, minPeriod)
	}
	return d, err
}

// CheckPeriods says what is wrong with the pod's annotations for periods. The
// error is meant for the pod's owner.
func CheckPeriods(pod *v1.Pod) error {
	for key, value := range pod.Annotations {
		container, ok := strings.CutSuffix(key, PeriodAnnotation)
		if !ok {
			continue
		}
		if _, err := parsePeriod(value); err != nil {
			return fmt.Errorf("annotation %s is %q; give a duration of at least %s, such as 100ms", key, value, minPeriod)
		}
		named := container == ""
		for c := range podutil.ContainerIter(&pod.Spec, podutil.InitContainers|podutil.Containers) {
			named = named || c.Name+"." == container
		}
		if !named {
			return fmt.Errorf("annotation %s is for a container that the pod does not have; use one of its names, or %s for all", key, PeriodAnnotation)
		}
	}
	return nil
}

// Quiet ends the startup and liveness probes of a run whose pod is being
// deleted: it is stopping, and must not be restarted for not answering.
// Readiness goes on. Unknown runs are ignored.
func (m *Manager) Quiet(id runtime.ID) {
	m.mu.Lock()
	c := m.containers[id]
	m.mu.Unlock()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.result.LivenessFailed, c.result.StartupFailed = false, false
	if c.startup != nil {
		c.startup.stop()
	}
	for _, w := range c.others {
		if w.kind == liveness {
			w.stop()
		}
	}
}

// Remove ends the probes of a run and forgets its result.
func (m *Manager) Remove(id runtime.ID) {
	m.mu.Lock()
	c := m.containers[id]
	delete(m.containers, id)
	m.mu.Unlock()
	if c == nil {
		return
	}
	c.cancel()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.startup != nil {
		c.startup.stop()
	}
	for _, w := range c.others {
		w.stop()
	}
}

// Result returns what is known of a run; the zero Result for one that was not
// added.
func (m *Manager) Result(id runtime.ID) Result {
	m.mu.Lock()
	c := m.containers[id]
	m.mu.Unlock()
	if c == nil {
		return Result{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.result
}

type kind string

const (
	startup   kind = "Startup"
	readiness kind = "Readiness"
	liveness  kind = "Liveness"
)

// worker is one probe of one run. Its fields are guarded by the container.
type worker struct {
	c     *container
	kind  kind
	probe *v1.Probe
	since time.Time // when the container was started

	period  time.Duration
	timer   *time.Timer
	stopped bool
	asked   bool // at least one attempt was made

	pause     time.Duration // before the next quick attempt, 0 when over
	nextCount time.Time     // quick failures before this do not count
	last      bool          // outcome of the last attempt
	run       int32         // how many times in a row
}

func (c *container) newWorker(k kind, p *v1.Probe, since time.Time) *worker {
	w := &worker{c: c, kind: k, probe: p, since: since, period: c.period}
	if w.period == 0 {
		w.period = time.Duration(max(p.PeriodSeconds, 1)) * time.Second
	}
	// A container that answered before is not asked more often than it
	// wants; a live one is presumed alive.
	if k == startup || k == readiness && !c.result.Ready {
		w.pause = firstPause
		if p.Exec != nil {
			w.pause = firstExecPause
		}
	}
	return w
}

// firstDelay is what remains of the initial delay. Liveness has nothing to
// gain from an early attempt and waits for a whole period at least.
func (w *worker) firstDelay() time.Duration {
	delay := time.Until(w.since.Add(time.Duration(w.probe.InitialDelaySeconds) * time.Second))
	if w.kind == liveness && w.probe.InitialDelaySeconds == 0 {
		delay = w.period
	}
	return max(delay, 0)
}

// schedule sets the timer for the next attempt. The caller holds c.mu.
func (w *worker) schedule(after time.Duration) {
	if w.stopped {
		return
	}
	w.timer = time.AfterFunc(after, w.attempt)
}

func (w *worker) stop() {
	w.stopped = true
	if w.timer != nil {
		w.timer.Stop()
	}
}

// attempt asks once and draws the consequences.
func (w *worker) attempt() {
	c := w.c
	outcome, output, err := w.ask()
	if c.ctx.Err() != nil {
		return
	}
	ok := err == nil && (outcome == k8sprobe.Success || outcome == k8sprobe.Warning)

	c.mu.Lock()
	if w.stopped {
		c.mu.Unlock()
		return
	}
	before := c.result
	now := time.Now()
	if !w.asked {
		w.asked, w.nextCount = true, now
		if w.kind == startup {
			// The budget is failureThreshold whole periods.
			w.nextCount = now.Add(w.period)
		}
	}
	// Between two counted attempts a quick one that fails is only a question
	// asked too early.
	counts := ok || w.pause == 0 || !now.Before(w.nextCount)
	if counts {
		if w.last != ok {
			w.last, w.run = ok, 0
		}
		w.run++
		for !w.nextCount.After(now) {
			w.nextCount = w.nextCount.Add(w.period)
		}
	}
	message := output
	if err != nil {
		message = err.Error()
	}
	if !ok {
		c.result.Message = fmt.Sprintf("%s probe failed: %s", w.kind, message)
	}
	if counts && ok && w.run >= max(w.probe.SuccessThreshold, 1) {
		w.succeed()
	}
	if counts && !ok && w.run >= max(w.probe.FailureThreshold, 1) {
		w.fail()
	}
	if ok {
		w.pause = 0
	}
	w.schedule(w.next(now))
	after := c.result
	c.mu.Unlock()
	// A new message alone wakes nobody.
	before.Message = after.Message
	changed := after != before

	switch {
	case err != nil && counts:
		c.m.cfg.Event(c.pod, c.spec.Name, v1.EventTypeWarning, "Unhealthy",
			fmt.Sprintf("%s probe errored and resulted in %s state: %s", w.kind, outcome, err))
	case outcome == k8sprobe.Warning:
		c.m.cfg.Event(c.pod, c.spec.Name, v1.EventTypeWarning, "ProbeWarning", fmt.Sprintf("%s probe warning: %s", w.kind, output))
	case !ok && counts:
		c.m.cfg.Event(c.pod, c.spec.Name, v1.EventTypeWarning, "Unhealthy", fmt.Sprintf("%s probe failed: %s", w.kind, output))
	}
	if changed {
		c.m.cfg.Log.Debug("probe result changed", "pod", c.pod.UID, "container", c.spec.Name, "probe", w.kind, "ok", ok)
		c.m.cfg.Wake(c.pod.UID)
	}
}

// next is the time until the next attempt after one at now.
func (w *worker) next(now time.Time) time.Duration {
	if w.pause == 0 {
		return w.period
	}
	pause := w.pause
	if w.pause *= 2; w.pause >= w.period {
		w.pause = 0
	}
	// A counted attempt is never missed by a quick one that overshoots it.
	return min(pause, w.nextCount.Sub(now))
}

func (w *worker) succeed() {
	c := w.c
	switch w.kind {
	case startup:
		w.stop()
		c.begin()
	case readiness:
		c.result.Ready = true
	}
}

func (w *worker) fail() {
	c := w.c
	switch w.kind {
	case readiness:
		c.result.Ready = false
	case startup:
		c.result.StartupFailed = true
		w.stop()
	case liveness:
		c.result.LivenessFailed = true
		w.stop()
	}
}

func (w *worker) ask() (outcome k8sprobe.Result, output string, err error) {
	for range maxErrors {
		if outcome, output, err = w.askOnce(); err == nil || w.c.ctx.Err() != nil {
			return outcome, output, err
		}
	}
	return outcome, output, err
}

func (w *worker) askOnce() (k8sprobe.Result, string, error) {
	c, p, timeout := w.c, w.probe, time.Duration(max(w.probe.TimeoutSeconds, 1))*time.Second
	switch {
	case p.Exec != nil:
		return w.exec(p.Exec.Command, timeout)
	case p.HTTPGet != nil:
		req, err := httpprobe.NewRequestForHTTPGetAction(p.HTTPGet, c.spec, c.podIP, "probe")
		if err != nil {
			return k8sprobe.Unknown, "", fmt.Errorf("make the request: %w", err)
		}
		return c.m.http.Probe(req.WithContext(c.ctx), timeout)
	case p.TCPSocket != nil:
		port, err := k8sprobe.ResolveContainerPort(p.TCPSocket.Port, c.spec)
		if err != nil {
			return k8sprobe.Unknown, "", err
		}
		host := p.TCPSocket.Host
		if host == "" {
			host = c.podIP
		}
		return c.m.tcp.Probe(host, port, timeout)
	case p.GRPC != nil:
		service := ""
		if p.GRPC.Service != nil {
			service = *p.GRPC.Service
		}
		return c.m.grpc.Probe(c.podIP, service, int(p.GRPC.Port), timeout)
	}
	return k8sprobe.Unknown, "", fmt.Errorf("%s probe of container %s has no handler", w.kind, c.spec.Name)
}

func (w *worker) exec(command []string, timeout time.Duration) (k8sprobe.Result, string, error) {
	// Only variables with a literal value can be referred to, as in a kubelet.
	values := map[string]string{}
	for _, v := range w.c.spec.Env {
		values[v.Name] = v.Value
	}
	mapping := expansion.MappingFuncFor(values)
	argv := make([]string, len(command))
	for i, s := range command {
		argv[i] = expansion.Expand(s, mapping)
	}
	ctx, cancel := context.WithTimeout(w.c.ctx, timeout)
	defer cancel()
	code, out, err := w.c.m.cfg.Exec(ctx, w.c.id, argv)
	if len(out) > maxOutput {
		out = out[:maxOutput]
	}
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return k8sprobe.Failure, fmt.Sprintf("command timed out: %q timed out after %s", strings.Join(argv, " "), timeout), nil
	case err != nil:
		return k8sprobe.Unknown, "", fmt.Errorf("run %q: %w", strings.Join(argv, " "), err)
	case code != 0:
		return k8sprobe.Failure, string(out), nil
	}
	return k8sprobe.Success, string(out), nil
}
