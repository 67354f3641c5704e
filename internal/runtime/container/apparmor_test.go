package container

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/apparmor"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// Where the kernel has AppArmor, workloads are confined by it unless they ask
// not to be; where it has not, those that ask to be do not start.
func TestAppArmor(t *testing.T) {
	m := newMachine(t)
	b := runtimetest.NewBench(t, m.Runtime)
	workload := func(name, profile string) runtime.Workload {
		w := b.Workload(name, "cat /proc/self/attr/current 2>/dev/null | tr -d '\\000'; mount -t tmpfs none /tmp 2>/dev/null && echo mounted; true")
		w.AppArmor, w.Seccomp = profile, ""
		w.Capabilities = append(w.Capabilities, "CAP_SYS_ADMIN")
		return w
	}
	refused := func(profile, says string) {
		t.Helper()
		if _, err := m.Runtime.Start(b.Ctx, workload("refused", profile)); !errors.Is(err, runtime.ErrInvalid) || !strings.HasSuffix(err.Error(), says) {
			t.Errorf("profile %q: %v", profile, err)
		}
	}
	refused("no-such-profile", `cannot start as specified: AppArmor profile "no-such-profile" is not loaded on this machine; load it with apparmor_parser`)
	if !apparmor.HostSupports() {
		if got := b.Output(workload("plain", "")); got != "mounted\n" {
			t.Errorf("without AppArmor: %q", got)
		}
		refused("default", "cannot start as specified: the default AppArmor profile cannot be loaded, the kernel has no AppArmor or /sbin/apparmor_parser is missing; install the package apparmor, or leave appArmorProfile out")
		return
	}
	for i, c := range []struct {
		profile    string
		privileged bool
		want       string
	}{
		{"", false, "tutti-default (enforce)\n"},
		{"default", false, "tutti-default (enforce)\n"},
		{"tutti-default", false, "tutti-default (enforce)\n"}, // as any that is loaded
		{"unconfined", false, "unconfined\nmounted\n"},
		{"", true, "unconfined\nmounted\n"},
	} {
		w := workload(string(rune('a'+i)), c.profile)
		w.Privileged = c.privileged
		if got := b.Output(w); got != c.want {
			t.Errorf("profile %q, privileged %t: %q, want %q", c.profile, c.privileged, got, c.want)
		}
	}
	// A program that is run in it later is confined by the same.
	w := b.Workload("exec", "sleep 1000")
	b.Start(w)
	var out strings.Builder
	if _, err := m.Exec(b.Ctx, w.ID, runtime.Exec{Args: []string{"cat", "/proc/self/attr/current"}, Streams: runtime.Streams{Stdout: &out}}); err != nil || out.String() != "tutti-default (enforce)\n" {
		t.Errorf("exec: %q %v", out.String(), err)
	}
}
