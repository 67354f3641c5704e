package probe

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/runtime"
)

const limit = 20 * time.Second

var id = runtime.ID{Pod: "uid", Name: "c"}

// fixture is a Manager whose events and wakes a test can wait for.
type fixture struct {
	*Manager
	t      *testing.T
	woken  chan struct{}
	mu     sync.Mutex
	events []string
	asked  []string
}

// newFixture answers exec probes from a script by the program's name; the
// last answer repeats. An answer is "ok", "fail", "error" or "hang".
func newFixture(t *testing.T, script map[string][]string) *fixture {
	f := &fixture{t: t, woken: make(chan struct{}, 100)}
	f.Manager = NewManager(Config{
		Exec: func(ctx context.Context, _ runtime.ID, argv []string) (int, []byte, error) {
			f.mu.Lock()
			answer := script[argv[0]][0]
			if len(script[argv[0]]) > 1 {
				script[argv[0]] = script[argv[0]][1:]
			}
			f.asked = append(f.asked, argv[0]+" "+answer)
			f.mu.Unlock()
			switch answer {
			case "ok":
				return 0, nil, nil
			case "error":
				return 0, nil, fmt.Errorf("no such container")
			case "hang":
				<-ctx.Done()
				return 0, nil, ctx.Err()
			}
			return 1, []byte("it is bad"), nil
		},
		Event: func(_ *v1.Pod, _, _, reason, message string) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.events = append(f.events, reason+": "+message)
		},
		Wake: func(types.UID) { f.woken <- struct{}{} },
	})
	t.Cleanup(func() { f.Remove(id) })
	return f
}

// until waits, wake by wake, for a result.
func (f *fixture) until(what string, holds func(Result) bool) {
	f.t.Helper()
	timeout := time.After(limit)
	for !holds(f.Result(id)) {
		select {
		case <-f.woken:
		case <-timeout:
			f.t.Fatalf("not %s after %s: %+v, asked %q, events %q", what, limit, f.Result(id), f.asked, f.events)
		}
	}
}

func (f *fixture) log() (asked, events []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.asked...), append([]string(nil), f.events...)
}

func pod(period string) *v1.Pod {
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: "uid", Name: "p"}}
	if period != "" {
		p.Annotations = map[string]string{PeriodAnnotation: period}
	}
	return p
}

func exec(program string) *v1.Probe {
	return &v1.Probe{
		ProbeHandler:  v1.ProbeHandler{Exec: &v1.ExecAction{Command: []string{program}}},
		PeriodSeconds: 10, TimeoutSeconds: 1, FailureThreshold: 3, SuccessThreshold: 1,
	}
}

func ready(r Result) bool { return r.Ready }

// The period of ten seconds would fail these: readiness must follow the
// program.
func TestReadinessFollowsTheProgram(t *testing.T) {
	var healthy atomic.Bool
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !healthy.Load() {
			healthy.Store(true)
			w.WriteHeader(http.StatusServiceUnavailable)
		}
	}))
	defer web.Close()

	listen := func() net.Listener {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	tcp := listen()
	defer tcp.Close()
	rpc := listen()
	server := grpc.NewServer()
	healthpb.RegisterHealthServer(server, health.NewServer())
	go server.Serve(rpc)
	defer server.Stop()

	port := func(addr string) int {
		_, p, _ := net.SplitHostPort(addr)
		n, _ := strconv.Atoi(p)
		return n
	}
	named := v1.ContainerPort{Name: "main", ContainerPort: int32(port(tcp.Addr().String()))}
	for name, handler := range map[string]v1.ProbeHandler{
		"http": {HTTPGet: &v1.HTTPGetAction{Port: intstr.FromInt(port(strings.TrimPrefix(web.URL, "http://")))}},
		"tcp":  {TCPSocket: &v1.TCPSocketAction{Port: intstr.FromString("main")}},
		"grpc": {GRPC: &v1.GRPCAction{Port: int32(port(rpc.Addr().String())), Service: ptr.To("")}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t, nil)
			start := time.Now()
			f.Add(pod(""), &v1.Container{
				Name: "c", Ports: []v1.ContainerPort{named},
				ReadinessProbe: &v1.Probe{ProbeHandler: handler, PeriodSeconds: 60, TimeoutSeconds: 5, FailureThreshold: 3, SuccessThreshold: 1},
			}, id, "127.0.0.1")
			f.until("ready", ready)
			t.Logf("ready after %s", time.Since(start))
		})
	}
}

func TestPortThatOpensLate(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().(*net.TCPAddr)
	l.Close()
	f := newFixture(t, nil)
	f.Add(pod(""), &v1.Container{Name: "c", ReadinessProbe: &v1.Probe{
		ProbeHandler:  v1.ProbeHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(addr.Port)}},
		PeriodSeconds: 60, TimeoutSeconds: 1, FailureThreshold: 1, SuccessThreshold: 1,
	}}, id, "127.0.0.1")
	if f.Result(id).Ready || !f.Result(id).Started {
		t.Fatalf("at first: %+v", f.Result(id))
	}
	if l, err = net.Listen("tcp", addr.String()); err != nil {
		t.Skipf("the port was taken meanwhile: %v", err)
	}
	defer l.Close()
	f.until("ready", ready)
}

func TestNoProbes(t *testing.T) {
	f := newFixture(t, nil)
	f.Add(pod(""), &v1.Container{Name: "c"}, id, "127.0.0.1")
	if r := f.Result(id); !r.Ready || !r.Started {
		t.Fatalf("%+v", r)
	}
	f.Remove(id)
	if r := f.Result(id); r != (Result{}) {
		t.Fatalf("after Remove: %+v", r)
	}
}

func TestStartupGatesTheOthers(t *testing.T) {
	f := newFixture(t, map[string][]string{
		"startup": {"fail", "fail", "ok"}, "ready": {"ok"}, "live": {"ok", "fail"},
	})
	f.Add(pod("30ms"), &v1.Container{Name: "c",
		StartupProbe: exec("startup"), ReadinessProbe: exec("ready"), LivenessProbe: exec("live"),
	}, id, "127.0.0.1")
	f.until("started", func(r Result) bool { return r.Started })
	f.until("ready", ready)
	f.until("failed", func(r Result) bool { return r.LivenessFailed })
	asked, events := f.log()
	want := []string{"startup fail", "startup fail", "startup ok"}
	for i, w := range want {
		if asked[i] != w {
			t.Fatalf("asked %q", asked)
		}
	}
	var live []string
	for _, a := range asked {
		if strings.HasPrefix(a, "live") {
			live = append(live, a)
		}
	}
	if got := strings.Join(live, ","); got != "live ok,live fail,live fail,live fail" {
		t.Fatalf("liveness: %s", got)
	}
	if last := events[len(events)-1]; last != "Unhealthy: Liveness probe failed: it is bad" {
		t.Fatalf("events %q", events)
	}
	if m := f.Result(id).Message; m != "Liveness probe failed: it is bad" {
		t.Fatalf("message %q", m)
	}
	f.Quiet(id)
	if f.Result(id).LivenessFailed {
		t.Fatal("a pod that is being deleted is to be restarted")
	}
}

func TestStartupFails(t *testing.T) {
	f := newFixture(t, map[string][]string{"startup": {"error"}})
	p := exec("startup")
	p.FailureThreshold = 2
	f.Add(pod("20ms"), &v1.Container{Name: "c", StartupProbe: p}, id, "127.0.0.1")
	f.until("failed", func(r Result) bool { return r.StartupFailed })
	if r := f.Result(id); r.Started || r.Ready {
		t.Fatalf("%+v", r)
	}
	_, events := f.log()
	if !strings.Contains(events[0], "Startup probe errored") || !strings.Contains(events[0], "no such container") {
		t.Fatalf("events %q", events)
	}
}

func TestReadinessThresholdsAndTimeout(t *testing.T) {
	f := newFixture(t, map[string][]string{"ready": {"ok", "fail", "ok", "ok", "fail", "fail", "hang"}})
	p := exec("ready")
	p.SuccessThreshold, p.FailureThreshold = 2, 3
	f.Add(pod("10ms"), &v1.Container{Name: "c", ReadinessProbe: p}, id, "127.0.0.1")
	f.until("ready", ready)
	f.until("unready", func(r Result) bool { return !r.Ready })
	asked, events := f.log()
	if len(asked) < 7 || asked[6] != "ready hang" {
		t.Fatalf("asked %q", asked)
	}
	if last := events[len(events)-1]; !strings.Contains(last, `"ready" timed out after 1s`) {
		t.Fatalf("events %q", events)
	}
}

// A container found running after a restart stays ready until a probe says
// otherwise.
func TestFoundRunning(t *testing.T) {
	f := newFixture(t, map[string][]string{"ready": {"fail"}, "startup": {"fail"}})
	p := pod("1h")
	p.Status.ContainerStatuses = []v1.ContainerStatus{{
		Name: "c", ContainerID: "tutti://" + id.String(), Ready: true, Started: ptr.To(true),
		State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.Now()}},
	}}
	f.Add(p, &v1.Container{Name: "c", ReadinessProbe: exec("ready"), StartupProbe: exec("startup")}, id, "127.0.0.1")
	if r := f.Result(id); !r.Ready || !r.Started {
		t.Fatalf("%+v", r)
	}
	next := id
	next.Attempt++
	f.Add(p, &v1.Container{Name: "c", ReadinessProbe: exec("ready")}, next, "127.0.0.1")
	defer f.Remove(next)
	if f.Result(next).Ready {
		t.Fatal("another run of the container is ready before it answered")
	}
}
