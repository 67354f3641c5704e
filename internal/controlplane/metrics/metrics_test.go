package metrics

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var begin = time.Unix(1700000000, 0)

func at(seconds float64) time.Time { return begin.Add(time.Duration(seconds * float64(time.Second))) }

func TestParse(t *testing.T) {
	const answer = `# HELP container_cpu_usage_seconds_total [STABLE] Cumulative cpu time consumed by the container in core-seconds
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{container="a",namespace="ns",pod="p"} 1.25 1700000010500
container_cpu_usage_seconds_total{container="b",namespace="ns",pod="p"} 0.5 1700000010600
container_cpu_usage_seconds_total{container="a",namespace="ns",pod="startless"} 0.5 1700000010600
# TYPE container_memory_working_set_bytes gauge
container_memory_working_set_bytes{container="a",namespace="ns",pod="p"} 3.3554432e+07 1700000010500
container_memory_working_set_bytes{container="b",namespace="ns",pod="p"} 0 1700000010600
# TYPE container_start_time_seconds gauge
container_start_time_seconds{container="a",namespace="ns",pod="p"} 1.7000000005e+09
container_start_time_seconds{container="b",namespace="ns",pod="p"} 1.7e+09
# TYPE node_cpu_usage_seconds_total counter
node_cpu_usage_seconds_total 12345.67 1700000010700
# TYPE node_memory_working_set_bytes gauge
node_memory_working_set_bytes 1e+09 1700000010700
# TYPE pod_cpu_usage_seconds_total counter
pod_cpu_usage_seconds_total{namespace="ns",pod="p"} 1.75 1700000010600
`
	s, err := parse(strings.NewReader(answer), at(11))
	if err != nil {
		t.Fatal(err)
	}
	if want := (usage{at: at(10.7), cpu: 12345670 * time.Millisecond, memory: 1e9}); s.node != want || !s.taken.Equal(at(11)) {
		t.Errorf("node %+v, want %+v", s.node, want)
	}
	pod := s.pods[types.NamespacedName{Namespace: "ns", Name: "p"}]
	if want := (usage{at: at(10.5), started: at(0.5), cpu: 1250 * time.Millisecond, memory: 32 << 20}); pod["a"] != want {
		t.Errorf("a %+v, want %+v", pod["a"], want)
	}
	if want := (usage{at: at(10.6), started: at(0), cpu: 500 * time.Millisecond}); pod["b"] != want {
		t.Errorf("b %+v, want %+v", pod["b"], want)
	}
	if len(s.pods) != 1 {
		t.Errorf("%d pods, want 1: %+v", len(s.pods), s.pods)
	}
	for what, answer := range map[string]string{"nothing": "", "no metrics": "<html>", "no node": "# TYPE x counter\nx 1\n"} {
		if _, err := parse(strings.NewReader(answer), at(0)); err == nil {
			t.Errorf("%s is a sample", what)
		}
	}
}

func TestCompare(t *testing.T) {
	const second = time.Second
	none := figure{}
	for name, test := range map[string]struct {
		older, newer usage
		want         figure
	}{
		"half a processor": {
			usage{at(0), at(-100), 50 * second, 10}, usage{at(10), at(-100), 55 * second, 20},
			figure{at(10), 10 * second, 5e8, 20}},
		"two processors": {
			usage{at(0), at(-100), 0, 0}, usage{at(2), at(-100), 4 * second, 20},
			figure{at(2), 2 * second, 2e9, 20}},
		"idle":                         {usage{at(0), at(-100), 7 * second, 0}, usage{at(10), at(-100), 7 * second, 20}, figure{at(10), 10 * second, 0, 20}},
		"a node has no start":          {usage{at: at(0), cpu: second}, usage{at: at(10), cpu: 2 * second}, figure{at(10), 10 * second, 1e8, 0}},
		"a node that was booted again": {usage{at: at(0), cpu: 9 * second}, usage{at: at(10), cpu: 2 * second}, none},
		"new since older":              {usage{}, usage{at(10), at(5), second, 20}, figure{at(10), 5 * second, 2e8, 20}},
		"new, and hardly started":      {usage{}, usage{at(10), at(9.5), second, 20}, none},
		"old, and not in older":        {usage{}, usage{at(10), at(-100), second, 20}, none},
		"started again":                {usage{at(0), at(-100), 50 * second, 10}, usage{at(10), at(6), second, 20}, figure{at(10), 4 * second, 25e7, 20}},
		"the same moment":              {usage{at(0), at(-100), 50 * second, 10}, usage{at(0), at(-100), 50 * second, 10}, none},
		"too long ago":                 {usage{at(0), at(-100), 50 * second, 10}, usage{at(31), at(-100), 50 * second, 10}, none},
		"not there":                    {usage{}, usage{}, none},
	} {
		if got, ok := compare(test.older, test.newer); got != test.want || ok != (test.want != none) {
			t.Errorf("%s: %+v %v, want %+v", name, got, ok, test.want)
		}
	}
}

func TestOfPod(t *testing.T) {
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", Labels: map[string]string{"app": "x"}},
		Status:     v1.PodStatus{StartTime: &metav1.Time{Time: at(-100)}},
	}
	of := func(u map[string]usage) *sample {
		return &sample{pods: map[types.NamespacedName]map[string]usage{{Namespace: "ns", Name: "p"}: u}}
	}
	older := of(map[string]usage{"old": {at(0), at(-50), 10 * time.Second, 1}})
	m := ofPod(pod, older, of(map[string]usage{
		"old": {at(10), at(-50), 11 * time.Second, 3 << 20}, "new": {at(10.5), at(6.5), 2 * time.Second, 2 << 20}}))
	if m == nil || len(m.Containers) != 2 || m.Containers[0].Name != "new" || m.Labels["app"] != "x" ||
		m.Containers[0].Usage.Cpu().MilliValue() != 500 || m.Containers[1].Usage.Cpu().MilliValue() != 100 ||
		m.Containers[1].Usage.Memory().String() != "3Mi" || !m.Timestamp.Equal(&metav1.Time{Time: at(10.5)}) || m.Window.Duration != 10*time.Second {
		t.Errorf("%+v", m)
	}
	for name, newer := range map[string]map[string]usage{
		"nothing":              nil,
		"a container too new":  {"old": {at(10), at(-50), 11 * time.Second, 1}, "new": {at(10), at(9.5), 0, 1}},
		"a namesake that went": {"old": {at(-90), at(-101), 11 * time.Second, 1}},
	} {
		if m := ofPod(pod, older, of(newer)); m != nil {
			t.Errorf("%s: %+v", name, m)
		}
	}
}

func TestNext(t *testing.T) {
	sampled := func(seconds float64) *sample { return &sample{taken: at(seconds)} }
	const second = time.Second
	for name, test := range map[string]struct {
		history
		after  time.Duration
		wanted bool
	}{
		"nothing known":                {history{}, 0, true},
		"one sample":                   {history{newer: sampled(-0.5)}, 1500 * time.Millisecond, true},
		"one sample, a while ago":      {history{newer: sampled(-5)}, 0, true},
		"one sample, long ago":         {history{newer: sampled(-100)}, 0, true},
		"two samples":                  {history{older: sampled(-9), newer: sampled(-7)}, 0, false},
		"two samples, not fresh":       {history{older: sampled(-20), newer: sampled(-10)}, 0, true},
		"two samples, long ago":        {history{older: sampled(-110), newer: sampled(-100)}, 0, true},
		"a failure":                    {history{failed: at(-9)}, 0, false},
		"a failure, a while ago":       {history{failed: at(-10)}, 0, true},
		"a failure after two samples":  {history{older: sampled(-25), newer: sampled(-15), failed: at(-5)}, 0, false},
		"a failure before two samples": {history{older: sampled(-12), newer: sampled(-2), failed: at(-20)}, 0, false},
	} {
		if after, wanted := test.next(at(0)); after != test.after || wanted != test.wanted {
			t.Errorf("%s: after %v %v, want %v %v", name, after, wanted, test.after, test.wanted)
		}
	}
	if h := (history{older: sampled(0), newer: sampled(2)}).add(sampled(15)); !h.older.taken.Equal(at(2)) || !h.newer.taken.Equal(at(15)) {
		t.Errorf("%+v", h)
	}
	if h := (history{older: sampled(0), newer: sampled(2)}).add(sampled(60)); h.older != nil || !h.newer.taken.Equal(at(60)) {
		t.Errorf("a window begins long ago: %+v", h)
	}
}

func TestSampler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var taken atomic.Int64
		broken := errors.New("broken")
		var failing atomic.Bool
		s := newSampler(slog.New(slog.DiscardHandler), func(_ context.Context, node string) (*sample, error) {
			time.Sleep(100 * time.Millisecond) // of the bubble: no time passes outside
			taken.Add(1)
			if failing.Load() || node == "dead" {
				return nil, broken
			}
			return &sample{taken: time.Now()}, nil
		})
		ask := func(nodes ...string) map[string]history {
			t.Helper()
			found, err := s.histories(t.Context(), nodes)
			if err != nil {
				t.Fatal(err)
			}
			return found
		}
		expect := func(what string, samples int64, took time.Duration, f func()) {
			t.Helper()
			taken.Store(0)
			start := time.Now()
			f()
			if taken.Load() != samples || time.Since(start) != took {
				t.Errorf("%s: %d samples in %v, want %d in %v", what, taken.Load(), time.Since(start), samples, took)
			}
		}
		expect("three ask first", 2, 2100*time.Millisecond+100*time.Millisecond, func() {
			var all sync.WaitGroup
			for range 3 {
				all.Go(func() { ask("n") })
			}
			all.Wait()
		})
		expect("again at once", 0, 0, func() { ask("n") })
		time.Sleep(15 * time.Second)
		expect("a while later", 1, 100*time.Millisecond, func() {
			if h := ask("n")["n"]; h.newer.taken.Sub(h.older.taken) != 15100*time.Millisecond {
				t.Errorf("window %v", h.newer.taken.Sub(h.older.taken))
			}
		})
		time.Sleep(time.Hour)
		expect("an hour later", 2, 2200*time.Millisecond, func() {
			if h := ask("n")["n"]; h.newer.taken.Sub(h.older.taken) != 2100*time.Millisecond {
				t.Errorf("window %v", h.newer.taken.Sub(h.older.taken))
			}
		})
		expect("with one that does not answer", 1, 100*time.Millisecond, func() {
			if found := ask("n", "dead"); len(found) != 1 {
				t.Errorf("%v", found)
			}
		})
		time.Sleep(12 * time.Second)
		failing.Store(true)
		expect("it fails", 1, 100*time.Millisecond, func() {
			if len(ask("n")) != 1 {
				t.Error("what was seen 12 seconds ago is not shown")
			}
		})
		time.Sleep(20 * time.Second)
		expect("it fails again", 1, 100*time.Millisecond, func() {
			if len(ask("n")) != 0 {
				t.Error("what was seen 32 seconds ago is shown")
			}
		})
		failing.Store(false)
		time.Sleep(time.Minute)
		expect("one gives up", 1, time.Second, func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := s.histories(ctx, []string{"n"}); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
		expect("another goes on", 1, 1200*time.Millisecond, func() {
			if len(ask("n")) != 1 {
				t.Error("no figures")
			}
		})
		s.forget(func(node string) bool { return node == "dead" })
		if len(s.nodes) != 1 {
			t.Errorf("%d nodes are remembered", len(s.nodes))
		}
	})
}
