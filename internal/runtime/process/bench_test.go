package process

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// BenchmarkStart measures from the call of Start to its return, when the
// program has been executed, for each root.
func BenchmarkStart(b *testing.B) {
	for _, kind := range []runtimetest.Kind{images, machines(runtime.ReadOnlyRoot), machines(runtime.SharedRoot), machines(runtime.OverlayRoot)} {
		name := "image"
		if kind.Workload != nil {
			var w runtime.Workload
			kind.Workload(&w)
			name = string(w.Machine)
		}
		b.Run(name, func(b *testing.B) {
			m := runtimetest.NewMachine(b, kind)
			bench := m.Bench(runtime.Pod{NetNS: runtimetest.NetNS(b)})
			var took []time.Duration
			for i := 0; b.Loop(); i++ {
				w := bench.Workload(fmt.Sprintf("w%d", i), "exec sleep 1000")
				start := time.Now()
				bench.Start(w)
				took = append(took, time.Since(start))
				b.StopTimer()
				if err := m.Runtime.Signal(bench.Ctx, w.ID, 9); err != nil {
					b.Fatal(err)
				}
				bench.Wait(w.ID)
				if err := m.Runtime.Remove(bench.Ctx, w.ID); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Microseconds())/1000, "p50-ms")
		})
	}
}
