package container

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// BenchmarkStart measures from the call of Start to its return, when the
// program has been executed, for a container as the agent starts it.
func BenchmarkStart(b *testing.B) {
	for _, seccomp := range []string{"default", ""} {
		b.Run("seccomp="+seccomp, func(b *testing.B) {
			m := newMachine(b)
			bench := runtimetest.NewBenchWith(b, m.Runtime, runtime.Pod{NetNS: runtimetest.NetNS(b)})
			var took []time.Duration
			for i := 0; b.Loop(); i++ {
				w := bench.Workload(fmt.Sprintf("w%d", i), "exec sleep 1000")
				w.Seccomp = seccomp
				start := time.Now()
				bench.Start(w)
				took = append(took, time.Since(start))
				b.StopTimer()
				if err := m.Signal(bench.Ctx, w.ID, 9); err != nil {
					b.Fatal(err)
				}
				bench.Wait(w.ID)
				if err := m.Remove(bench.Ctx, w.ID); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(took[len(took)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

// BenchmarkOpenClose measures a pod's ground alone.
func BenchmarkOpenClose(b *testing.B) {
	m := newMachine(b)
	bench := runtimetest.NewBenchWith(b, m.Runtime, runtime.Pod{})
	pod := runtime.Pod{Hostname: "bench", NetNS: runtimetest.NetNS(b)}
	var open time.Duration
	n := 0
	for ; b.Loop(); n++ {
		pod.ID = fmt.Sprintf("%s-%d", bench.Pod.ID, n)
		pod.Cgroup = "burstable/pod" + pod.ID
		start := time.Now()
		if _, err := m.Open(bench.Ctx, pod); err != nil {
			b.Fatal(err)
		}
		open += time.Since(start)
		if err := m.Close(bench.Ctx, pod.ID); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(open.Microseconds())/1000/float64(n), "open-ms")
}

// BenchmarkExec measures a probe that runs a program.
func BenchmarkExec(b *testing.B) {
	m := newMachine(b)
	bench := runtimetest.NewBenchWith(b, m.Runtime, runtime.Pod{NetNS: runtimetest.NetNS(b)})
	w := bench.Workload("main", "exec sleep 1000")
	bench.Start(w)
	for b.Loop() {
		if code, err := m.Exec(bench.Ctx, w.ID, runtime.Exec{Args: []string{"true"}}); err != nil || code != 0 {
			b.Fatal(code, err)
		}
	}
}

// BenchmarkKeeperMemory reports what the keeper occupies, idle and with 50
// workloads.
func BenchmarkKeeperMemory(b *testing.B) {
	m := newMachine(b)
	bench := runtimetest.NewBenchWith(b, m.Runtime, runtime.Pod{NetNS: runtimetest.NetNS(b)})
	info, err := m.Keeper.Info(bench.Ctx)
	if err != nil {
		b.Fatal(err)
	}
	report := func(when string) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", info.PID))
		if err != nil {
			b.Fatal(err)
		}
		for _, field := range []string{"Rss", "Pss", "Anonymous"} {
			_, rest, _ := strings.Cut(string(data), "\n"+field+":")
			var kib float64
			fmt.Sscan(rest, &kib)
			b.ReportMetric(kib/1024, when+"-"+strings.ToLower(field)+"-MiB")
		}
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", info.PID))
		if err != nil {
			b.Fatal(err)
		}
		_, rest, _ := bytes.Cut(stat, []byte("Threads:"))
		var threads float64
		fmt.Sscan(string(rest), &threads)
		b.ReportMetric(threads, when+"-threads")
	}
	for b.Loop() {
		report("idle")
		start := time.Now()
		for i := range 50 {
			bench.Start(bench.Workload(fmt.Sprintf("w%d", i), "exec sleep 1000"))
		}
		b.ReportMetric(float64(time.Since(start).Microseconds())/50000, "ms/start")
		report("50")
		if err := m.Close(bench.Ctx, bench.Pod.ID); err != nil {
			b.Fatal(err)
		}
		if _, err := m.Open(bench.Ctx, bench.Pod); err != nil {
			b.Fatal(err)
		}
	}
}
