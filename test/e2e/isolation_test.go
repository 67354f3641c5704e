package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// isolated are pods that ask for more or less isolation than usual.
var isolated = []podKind{
	{
		name: "only-these-groups",
		spec: one("command: [id, -G]") + "securityContext: {runAsUser: 1000, supplementalGroups: [3000], supplementalGroupsPolicy: Strict}\n",
		// Without the policy the image adds group 2000: see pod "restricted".
		until:  "jsonpath={.status.phase}=Succeeded",
		logs:   "^1000 3000\n$",
		fields: map[string]string{"{.status.containerStatuses[0].user.linux}": `^{"gid":1000,"supplementalGroups":\[1000,3000\],"uid":1000}$`},
	},
	{
		name: "own-users",
		spec: `
hostUsers: false
restartPolicy: Never
hostname: apart
securityContext: {fsGroup: 2000, sysctls: [{name: kernel.shm_rmid_forced, value: "1"}, {name: net.ipv4.ip_local_port_range, value: "40000 50000"}]}
volumes:
- {name: config, configMap: {name: settings, defaultMode: 0440}}
- {name: secret, secret: {secretName: secrets, defaultMode: 0400}}
- {name: disk, emptyDir: {}}
- {name: memory, emptyDir: {medium: Memory}}
initContainers:
- {name: first, image: "busybox:1", command: [sh, -c, "echo from-init >/disk/f && chown 1000 /disk/f && echo from-init >/memory/f"], volumeMounts: [{name: disk, mountPath: /disk}, {name: memory, mountPath: /memory}]}
containers:
- name: main
  image: busybox:1
  command:
  - sh
  - -ec
  - |
    id -u
    awk '{print $1, $3, ($2 >= 65536)}' /proc/self/uid_map /proc/self/gid_map
    cat /config/word /secret/word; echo
    cat /disk/f /memory/f
    stat -c %u:%g / /bin/busybox /config/word /secret/word /disk/f /memory/f /etc/hosts
    hostname; grep -c apart /etc/hosts
    cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range
    test -s /var/run/secrets/kubernetes.io/serviceaccount/token
    nslookup kubernetes.default.svc.cluster.local >/dev/null && echo network
    echo last words >/dev/termination-log
  volumeMounts:
  - {name: config, mountPath: /config}
  - {name: secret, mountPath: /secret}
  - {name: disk, mountPath: /disk}
  - {name: memory, mountPath: /memory}
`,
		until: "jsonpath={.status.containerStatuses[0].state.terminated}",
		logs: `^0\n0 65536 1\n0 65536 1\nfrom-configfrom-secret\nfrom-init\nfrom-init\n` +
			`0:0\n0:0\n0:2000\n0:2000\n1000:2000\n0:2000\n0:0\napart\n1\n1\n40000\t50000\nnetwork\n$`,
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.message}": "^last words\n?$"},
	},
	{
		name: "unmasked-proc",
		spec: one("command: [sh, -c, 'grep -c \" /proc/\" /proc/self/mounts; true']\nsecurityContext: {procMount: Unmasked}") + "hostUsers: false\n",
		// Nothing covers a part of /proc.
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^0\n$",
	},
	{
		name:  "shared-processes-of-own-users",
		spec:  one("command: [sh, -c, 'ps -o pid,comm | grep -c init; id -u']") + "hostUsers: false\nshareProcessNamespace: true\n",
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^1\n0\n$",
	},
	{
		name:  "seccomp-of-this-machine",
		spec:  one("command: [sh, -c, 'mkdir /tmp/x 2>/dev/null || echo denied; touch /tmp/y && echo allowed; grep Seccomp: /proc/self/status']\nsecurityContext: {seccompProfile: {type: Localhost, localhostProfile: deny/mkdir.json}}"),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^denied\nallowed\nSeccomp:\t2\n$",
	},
	{
		name:   "seccomp-missing",
		spec:   one("command: ['true']\nsecurityContext: {seccompProfile: {type: Localhost, localhostProfile: deny/nothing.json}}"),
		until:  "jsonpath={.status.containerStatuses[0].state.terminated.reason}=StartError",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.message}": `cannot start as specified: there is no seccomp profile .* on this machine; put it there`},
	},
	{
		name:   "unsafe-sysctl",
		spec:   one("command: ['true']") + "securityContext: {sysctls: [{name: net.core.somaxconn, value: '100'}]}\n",
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.reason}": "^SysctlForbidden$", "{.status.message}": "net.core.somaxconn"},
	},
	{
		// Without SELinux there is nothing that a label could do, as with a kubelet.
		name:  "selinux-label",
		spec:  one("command: [echo, runs]") + "securityContext: {seLinuxOptions: {level: 's0:c1,c2'}}\n",
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^runs\n$",
	},
	{
		name:  "privileged",
		spec:  one("command: [sh, -c, \"grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status\"]\nsecurityContext: {privileged: true, seccompProfile: {type: RuntimeDefault}}"),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^NoNewPrivs:\t0\nSeccomp:\t0\n$",
	},
	{
		name:  "root-without-new-privileges",
		spec:  one("command: [sh, -c, \"id -u; grep -E '^NoNewPrivs:' /proc/self/status\"]\nsecurityContext: {allowPrivilegeEscalation: false}"),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^0\nNoNewPrivs:\t1\n$",
	},
}

func TestIsolation(t *testing.T) {
	n := shared(t)
	ns := n.namespace("isolation")
	n.kubectl("-n", ns, "create", "configmap", "settings", "--from-literal=word=from-config")
	n.kubectl("-n", ns, "create", "secret", "generic", "secrets", "--from-literal=word=from-secret")
	profile := filepath.Join(n.Dir, "seccomp", "deny", "mkdir.json")
	if err := os.MkdirAll(filepath.Dir(profile), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(profile, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	n.try(ns, isolated)

	if got := n.kubectl("get", "nodes", "-o", `jsonpath={.items[0].status.features.supplementalGroupsPolicy} {.items[0].status.runtimeHandlers[?(@.name=="container")].features}`); got != `true {"recursiveReadOnlyMounts":true,"userNamespaces":true}` {
		t.Errorf("the node says %s", got)
	}
}

// Root in a pod with hostUsers: false is nobody outside, and not who it is in
// another pod.
func TestUserNamespacesFromOutside(t *testing.T) {
	n := shared(t)
	ns := n.namespace("own-users")
	spec := restarting(one("command: [sh, -c, 'touch /mine; exec sleep 31007']")) + "hostUsers: false\nterminationGracePeriodSeconds: 0\n"
	n.ok(n.Apply(pod(ns, "one", spec) + "---\n" + pod(ns, "two", spec)))
	seen, pods := map[uint64]bool{}, map[string]bool{}
	for _, name := range []string{"one", "two"} {
		n.wait(ns, "pod/"+name, "condition=Ready")
		if got := n.kubectl("-n", ns, "exec", name, "--", "sh", "-c", "id -u; echo again >/dev/stdout"); got != "0\nagain\n" {
			t.Errorf("exec says %q", got)
		}
		uid := n.field(ns, "pod/"+name, "{.metadata.uid}")
		pods[uid] = true
		first, pid := outside(t, uid)
		if first < 65536 || first%65536 != 0 || seen[first] {
			t.Errorf("users of pod %s begin at %d; of others at %v", name, first, seen)
		}
		seen[first] = true
		for _, path := range []string{
			fmt.Sprintf("/proc/%d", pid),
			filepath.Join(n.Dir, "pods", uid, "containers", "main", "0", "upper", "mine"),
		} {
			if got := ownerOf(t, path); got != first {
				t.Errorf("%s belongs to %d, want %d", path, got, first)
			}
		}
	}
	n.kubectl("-n", ns, "delete", "pod", "one", "two")
	n.until("the pods' roots to go", func() (bool, string) {
		left, err := filepath.Glob("/run/tutti*/*_main_0")
		if err != nil {
			t.Fatal(err)
		}
		left = slices.DeleteFunc(left, func(dir string) bool {
			uid, _, _ := strings.Cut(filepath.Base(dir), "_")
			return !pods[uid]
		})
		return len(left) == 0, fmt.Sprint(left)
	})
}

// A pod with users of its own outlives server and keeper, apart and together,
// and after a reboot comes back with the users that it had and its volume.
func TestUserNamespacesOutliveFailures(t *testing.T) {
	n := running(t)
	const ns = "own-users"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	spec := restarting(one("command: [sh, -c, 'id -u >>/data/starts; exec sleep 31007']\nvolumeMounts: [{name: data, mountPath: /data}]")) +
		"volumes: [{name: data, emptyDir: {}}]\nhostUsers: false\nterminationGracePeriodSeconds: 0\n"
	n.ok(n.Apply(pod(ns, "old", spec)))
	n.wait(ns, "pod/old", "condition=Ready")
	uid, container := n.field(ns, "pod/old", "{.metadata.uid}"), containerOf(n, ns, "old")
	first, pid := outside(t, uid)

	for _, c := range []struct {
		name   string
		strike func()
		starts string // what the pod's volume says of its starts
	}{
		{"server", func() { n.kill(n.Server); n.up() }, "0\n"},
		{"keeper", func() { n.kill(n.Keeper) }, "0\n"},
		{"both", func() { n.kill(n.Server); n.kill(n.Keeper); n.up() }, "0\n"},
		{"machine", func() {
			if err := n.Reboot(); err != nil {
				t.Fatal(err)
			}
			n.up()
		}, "0\n0\n"},
	} {
		c.strike()
		n.until("exec after the end of the "+c.name, func() (bool, string) {
			r := n.Kubectl("-n", ns, "exec", "old", "--", "sh", "-c", "cat /data/starts; stat -c %u /data/starts /; touch /mine /data/mine && id -u")
			return r.Stdout == c.starts+"0\n0\n0\n", r.String()
		})
		switch now, at := outside(t, uid); {
		case now != first:
			t.Errorf("after the end of the %s the pod's users begin at %d, before at %d", c.name, now, first)
		case c.name != "machine" && (at != pid || containerOf(n, ns, "old") != container):
			t.Errorf("the end of the %s restarted the pod: process %d, was %d", c.name, at, pid)
		}
		// Another gets others.
		young := "after-" + c.name
		n.ok(n.Apply(pod(ns, young, spec)))
		n.wait(ns, "pod/"+young, "condition=Ready")
		if other, _ := outside(t, n.field(ns, "pod/"+young, "{.metadata.uid}")); other == first {
			t.Errorf("after the end of the %s another pod has the users from %d too", c.name, first)
		}
	}
}

func ownerOf(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return uint64(info.Sys().(*syscall.Stat_t).Uid)
}

// outside finds the sleep of a pod among the machine's processes, by the
// pod's control group, and says where its users begin.
func outside(t *testing.T, podUID string) (first uint64, pid int) {
	t.Helper()
	groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range groups {
		group, _ := os.ReadFile(file)
		command, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "cmdline"))
		if !strings.Contains(string(group), podUID) || !strings.Contains(string(command), "31007") {
			continue
		}
		mapping, err := os.ReadFile(filepath.Join(filepath.Dir(file), "uid_map"))
		fields := strings.Fields(string(mapping))
		if err != nil || len(fields) != 3 || fields[0] != "0" || fields[2] != "65536" {
			t.Fatalf("uid_map is %q: %v", mapping, err)
		}
		first, err = strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		pid, err = strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			t.Fatal(err)
		}
		return first, pid
	}
	t.Fatalf("no process of pod %s", podUID)
	return 0, 0
}
