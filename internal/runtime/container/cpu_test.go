package container

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

func TestCPU(t *testing.T) {
	m := newMachine(t)
	bench := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{NetNS: netns(t)})
	info, _ := m.Keeper.Info(bench.Ctx)
	cpu := func() (own, kids float64) {
		d, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", info.PID))
		f := strings.Fields(string(d))
		var a, b, c, e float64
		fmt.Sscan(f[13], &a); fmt.Sscan(f[14], &b); fmt.Sscan(f[15], &c); fmt.Sscan(f[16], &e)
		return (a + b) * 10, (c + e) * 10
	}
	o1, k1 := cpu()
	for i := range 100 {
		w := bench.Workload(fmt.Sprintf("w%d", i), "exit 0")
		if os.Getenv("NOSEC") != "" { w.Seccomp = "" }
		bench.Start(w)
		bench.Wait(w.ID)
	}
	o2, k2 := cpu()
	t.Logf("ms/start keeper %v children %v", (o2-o1)/100, (k2-k1)/100)
}
