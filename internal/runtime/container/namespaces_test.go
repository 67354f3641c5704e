package container

import (
	"errors"
	"os"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

func TestNamespaces(t *testing.T) {
	host, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	self := func(kind string) string {
		link, err := os.Readlink("/proc/self/ns/" + kind)
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	const script = "hostname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shm_rmid_forced; for n in net ipc pid; do readlink /proc/self/ns/$n; done; touch /dev/shm/shared; ls /dev/shm"
	m := newMachine(t)

	own := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{
		Hostname: "its-own", NetNS: netns(t), Sysctls: map[string]string{"kernel.shm_rmid_forced": "1"},
	})
	out := own.Output(own.Workload("one", script))
	if !strings.HasPrefix(out, "its-own\n0\n1\n") {
		t.Errorf("own namespaces: %q", out)
	}
	for _, kind := range []string{"net", "ipc", "pid"} {
		if strings.Contains(out, self(kind)) {
			t.Errorf("it shares the machine's %s namespace", kind)
		}
	}
	// The containers of a pod share what they should.
	two := own.Output(own.Workload("two", "ls /dev/shm; readlink /proc/self/ns/ipc"))
	if ipc := strings.TrimPrefix(two, "shared\n"); ipc == two || !strings.Contains(out, ipc) {
		t.Errorf("second container: %q, first: %q", two, out)
	}

	hosts := runtimetest.NewBenchWith(t, m.Runtime, layer, runtime.Pod{Hostname: "unused", HostPID: true, HostIPC: true})
	w := hosts.Workload("one", "hostname; for n in net ipc pid; do readlink /proc/self/ns/$n; done; sleep 4321 & exit 0")
	out = hosts.Output(w)
	if want := strings.Join([]string{host, self("net"), self("ipc"), self("pid"), ""}, "\n"); out != want {
		t.Errorf("the machine's namespaces: %q, want %q", out, want)
	}

	bad := runtime.Pod{ID: own.Pod.ID + "x", NetNS: own.Pod.NetNS, Hostname: "h", Cgroup: "burstable/bad" + own.Pod.ID, Sysctls: map[string]string{"vm.swappiness": "1"}}
	if _, err := m.Open(own.Ctx, bad); !errors.Is(err, runtime.ErrInvalid) {
		t.Errorf("a sysctl of the machine: %v", err)
	}
	if err := m.Close(own.Ctx, bad.ID); err != nil {
		t.Error(err)
	}
}

func TestPrivileged(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime, layer)
	const script = `grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status; mount -t tmpfs none /tmp && echo mounted; [ -c /dev/kmsg ] && echo devices; head -c 1 /dev/kmsg >/dev/null && echo read; v=$(cat /proc/sys/vm/swappiness); echo $v > /proc/sys/vm/swappiness && echo sys`
	plain := b.Workload("plain", script)
	plain.NoNewPrivileges = true
	if out := b.Output(plain); !strings.Contains(out, "Seccomp:\t2") || !strings.Contains(out, "NoNewPrivs:\t1") ||
		strings.Contains(out, "mounted\n") || strings.Contains(out, "devices\n") || strings.Contains(out, "sys\n") {
		t.Errorf("plain: %q", out)
	}
	privileged := b.Workload("privileged", script)
	privileged.Privileged = true
	if out := b.Output(privileged); !strings.Contains(out, "Seccomp:\t0") ||
		!strings.Contains(out, "mounted\n") || !strings.Contains(out, "devices\n") || !strings.Contains(out, "sys\n") {
		t.Errorf("privileged: %q", out)
	}
}
