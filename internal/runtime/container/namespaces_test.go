package container

import (
	"errors"
	"os"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// A pod may have the machine's namespaces, but not change what is the machine's.
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
	m := newMachine(t)

	hosts := runtimetest.NewBenchWith(t, m.Runtime, runtime.Pod{Hostname: "unused", HostPID: true, HostIPC: true})
	w := hosts.Workload("one", "hostname; for n in net ipc pid; do readlink /proc/self/ns/$n; done; sleep 4321 & exit 0")
	out := hosts.Output(w)
	if want := strings.Join([]string{host, self("net"), self("ipc"), self("pid"), ""}, "\n"); out != want {
		t.Errorf("the machine's namespaces: %q, want %q", out, want)
	}

	bad := runtime.Pod{ID: hosts.Pod.ID + "x", NetNS: runtimetest.NetNS(t), Hostname: "h", Cgroup: "burstable/bad" + hosts.Pod.ID, Sysctls: map[string]string{"vm.swappiness": "1"}}
	if _, err := m.Open(hosts.Ctx, bad); !errors.Is(err, runtime.ErrInvalid) {
		t.Errorf("a sysctl of the machine: %v", err)
	}
	if err := m.Close(hosts.Ctx, bad.ID); err != nil {
		t.Error(err)
	}
}

func TestPrivileged(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
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
