package container

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

var apart = runtime.IDs{First: 7 << 16, Size: 1 << 16}

// mapping skips a test on machines that have no user namespaces for a reason:
// Linux can mount tmpfs with other owners since 6.3.
func mapping(t *testing.T, m *machine) {
	t.Helper()
	err := m.CanMapIDs()
	if err == nil {
		return
	}
	var u unix.Utsname
	if uerr := unix.Uname(&u); uerr != nil {
		t.Fatal(uerr)
	}
	var major, minor int
	if _, serr := fmt.Sscanf(unix.ByteSliceToString(u.Release[:]), "%d.%d", &major, &minor); serr != nil || major > 6 || major == 6 && minor >= 3 {
		t.Fatal(err)
	}
	if !strings.HasSuffix(err.Error(), "Linux 6.3 can for tmpfs, ext4, xfs and btrfs); use another machine, or leave hostUsers out") {
		t.Fatal(err)
	}
	t.Skip(err)
}

func TestContractInUserNamespace(t *testing.T) {
	mapping(t, newMachine(t))
	k := kind()
	k.Pod = runtime.Pod{IDs: apart}
	runtimetest.Run(t, k)
}

// Root in a pod with a user namespace is another user outside: as a process,
// as the owner of what it writes, and in what it may do.
func TestUserNamespace(t *testing.T) {
	m := newMachine(t)
	mapping(t, m)
	b := runtimetest.NewBenchWith(t, m.Runtime, runtime.Pod{
		IDs: apart, Hostname: "apart", Sysctls: map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_unprivileged_port_start": "81"},
	})
	disk, memory := t.TempDir(), t.TempDir()
	if err := mount.Tmpfs(memory, 1<<20, 0o777); err != nil {
		t.Fatal(err)
	}
	defer mount.Unmount(memory)
	secret := filepath.Join(disk, "secret")
	if err := os.WriteFile(secret, []byte("only root may\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	w := b.Workload("main", `id -u; cat /proc/self/uid_map /data/secret; stat -c %u:%g / /bin/busybox /data/secret /memory
hostname; cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_unprivileged_port_start
touch /written /data/written /memory/written /dev/shm/written && chown 1000:1000 /data/written && echo wrote
hostname mine && ifconfig lo up && echo own
sysctl -w vm.swappiness=1 || echo refused
mknod /dev/sda b 8 0 || echo refused
echo all; sleep 1000`)
	w.Capabilities = append(w.Capabilities, "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_MKNOD")
	w.Mounts = []runtime.Mount{{Source: disk, Target: "/data"}, {Source: memory, Target: "/memory"}}
	s := b.Start(w)
	b.AwaitLog(w, "all\n")
	said := b.Log(w)
	var lines []string
	for line := range strings.Lines(said) {
		if !strings.Contains(line, ": ") { // what was refused, in the words of programs
			lines = append(lines, strings.Join(strings.Fields(line), " "))
		}
	}
	want := fmt.Sprintf("0; 0 %d %d; only root may; 0:0; 0:0; 0:0; 0:0; apart; 1; 81; wrote; own; refused; refused; all", apart.First, apart.Size)
	if got := strings.Join(lines, "; "); got != want {
		t.Errorf("it says %q, want %q", got, want)
	}

	outside, err := os.ReadFile(fmt.Sprintf("/proc/%d/uid_map", s.PID))
	if err != nil || strings.Join(strings.Fields(string(outside)), " ") != fmt.Sprintf("0 %d %d", apart.First, apart.Size) {
		t.Errorf("uid_map %q: %v", outside, err)
	}
	for path, want := range map[string]uint32{
		fmt.Sprintf("/proc/%d", s.PID):                        apart.First,
		filepath.Join(m.attemptDir(w.ID), "upper", "written"): apart.First,
		filepath.Join(m.podDir(w.Pod), "shm", "written"):      apart.First,
		filepath.Join(disk, "written"):                        1000, // a volume keeps the pod's own numbers
		filepath.Join(memory, "written"):                      0,
		secret:                                                0,
	} {
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil || stat.Uid != want {
			t.Errorf("%s belongs to %d, want %d: %v", path, stat.Uid, want, err)
		}
	}
	// Another container is in the same namespaces; a root of its own is open
	// to the pod's users only.
	two := b.Start(b.Workload("two", "sleep 1000"))
	for _, kind := range []string{"user", "net", "ipc", "uts"} {
		one, err1 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", s.PID, kind))
		other, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", two.PID, kind))
		if err1 != nil || err2 != nil || one != other {
			t.Errorf("%s namespaces %s and %s: %v %v", kind, one, other, err1, err2)
		}
	}
	if info, err := os.Stat(m.openDir(w.ID)); err != nil || info.Mode().Perm() != 0o710 {
		t.Errorf("%s: %v %v", m.openDir(w.ID), info, err)
	}
	if left, err := mount.Below(filepath.Join(m.attemptDir(w.ID), mappedDir)); err != nil || len(left) > 0 {
		t.Errorf("layers are left mounted: %q %v", left, err)
	}

	// Where owners cannot be mapped, it says so.
	bad := b.Workload("bad", "true")
	bad.Mounts = []runtime.Mount{{Source: "/proc", Target: "/data"}}
	const says = "cannot start as specified: what is to be mounted on /data is on a file system that cannot be mounted with other owners (hostUsers: false); use another volume, or leave hostUsers out"
	if _, err := m.Runtime.Start(b.Ctx, bad); err == nil || !strings.HasSuffix(err.Error(), says) {
		t.Errorf("mount of proc: %v", err)
	}
	bad = b.Workload("far", "true")
	bad.User = "70000"
	if _, err := m.Runtime.Start(b.Ctx, bad); err == nil || !strings.Contains(err.Error(), "cannot start as specified: user 70000 with groups [0] is outside the pod's user namespace; use numbers below 65536, or leave hostUsers out") {
		t.Errorf("a user without a number outside: %v", err)
	}

	if err := m.Close(b.Ctx, b.Pod.ID); err != nil {
		t.Fatal(err)
	}
	if left, err := filepath.Glob(filepath.Join(openRoots(m.CgroupRoot), "*")); err != nil || len(left) > 0 {
		t.Errorf("left: %q %v", left, err)
	}
}

func TestWhatLacksForUserNamespaces(t *testing.T) {
	for _, c := range []struct {
		err  error
		says string
	}{
		{noUserNamespaces(unix.ENOSPC), "this machine's kernel gives no user namespaces (no space left on device); raise user.max_user_namespaces, or leave hostUsers out"},
		{noMapping("/data", unix.TMPFS_MAGIC), "this machine cannot mount /data with other owners (file system type 0x1021994; Linux 6.3 can for tmpfs, ext4, xfs and btrfs); use another machine, or leave hostUsers out"},
	} {
		if c.err.Error() != c.says {
			t.Errorf("%q, want %q", c.err, c.says)
		}
	}
}
