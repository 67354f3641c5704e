package e2e

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// vm is the name of the node that a virtual machine is.
const vm = "n2"

// boot runs the virtual machine of test/vm/disk beside n: Debian's kernel and
// systemd, control groups of version 2 only. tutti agent, a service there, is
// started with the flags.
func (n node) boot(flags string) {
	n.t.Helper()
	parts := os.Getenv("TUTTI_V2")
	seed := filepath.Join(n.t.TempDir(), "seed.tar")
	if err := n.seed(seed, flags); err != nil {
		n.t.Fatal(err)
	}
	if err := n.Tap("vm0"); err != nil {
		n.t.Fatal(err)
	}
	console := filepath.Join(n.t.TempDir(), "console")
	log, err := os.Create(console)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	// Without KVM, which machines that are virtual themselves rarely have.
	qemu := n.CommandOutside(context.WithoutCancel(n.t.Context()), "nice", "-n", "5", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-M", "q35", "-cpu", "max", "-smp", "2", "-m", "1536",
		"-nographic", "-nodefaults", "-serial", "stdio", "-kernel", parts+"/kernel", "-initrd", parts+"/initramfs",
		"-drive", "file="+parts+"/disk,format=raw,if=virtio,cache=unsafe,snapshot=on", "-drive", "file="+seed+",format=raw,if=virtio,readonly=on",
		"-netdev", "tap,id=net,ifname=vm0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=net",
		"-append", "console=ttyS0 quiet panic=-1 systemd.show_status=0 systemd.default_timeout_start_sec=900")
	qemu.Stdout, qemu.Stderr = log, log
	if err := qemu.Start(); err != nil {
		n.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- qemu.Wait() }()
	n.t.Cleanup(func() {
		syscall.Kill(-qemu.Process.Pid, syscall.SIGKILL)
		<-ended
		if text, err := os.ReadFile(console); err == nil && n.t.Failed() {
			n.t.Logf("the virtual machine's console ends with\n%s", tail(string(text), 60))
		}
	})
}

// seed is the archive of what the machine gets at its first start.
func (n node) seed(file, flags string) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	out := tar.NewWriter(f)
	add := func(name string, mode int64, size int64, from io.Reader) error {
		if err := out.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: size, ModTime: time.Now()}); err != nil {
			return err
		}
		_, err := io.Copy(out, from)
		return err
	}
	program, err := os.Open(n.Binary())
	if err != nil {
		return err
	}
	defer program.Close()
	info, err := program.Stat()
	if err != nil {
		return err
	}
	if err := add("usr/local/bin/tutti", 0o755, info.Size(), program); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"etc/tutti.kubeconfig": n.ok(n.Tutti("node", "credentials", vm, "--address", "192.0.2.20")),
		"etc/systemd/system/tutti.service": `[Unit]
Wants=network-online.target
After=network-online.target
[Service]
Type=notify
ExecStart=/usr/local/bin/tutti agent --kubeconfig /etc/tutti.kubeconfig ` + flags + `
Restart=on-failure
TimeoutStartSec=infinity
KillMode=process
Delegate=yes
TasksMax=infinity
OOMScoreAdjust=-900
StandardError=journal+console
`,
	} {
		if err := add(name, 0o600, int64(len(text)), strings.NewReader(text)); err != nil {
			return err
		}
	}
	err = out.WriteHeader(&tar.Header{Name: "etc/systemd/system/multi-user.target.wants/tutti.service", Typeflag: tar.TypeSymlink, Linkname: "../tutti.service"})
	if err != nil {
		return err
	}
	return out.Close()
}

// Thresholds that a pod can reach on a small machine, and of process ids only
// two together.
const short = "--eviction-hard=memory.available<400Mi,nodefs.inodesFree<50%,pid.available<800"

// v2Pods are what is on the machine from its first start and must be there
// after its second.
func v2Pods(ns string) string {
	// They wait for the machine, however long it takes to boot.
	const waits = "terminationGracePeriodSeconds: 1\ntolerations: [{operator: Exists, effect: NoExecute}]\n"
	const stays = "nodeName: " + vm + "\n" + waits
	sleeps := func(fields string) string {
		return strings.ReplaceAll(restarting(one("command: [sleep, '1000000']\n"+fields)), "busybox:1", inCluster)
	}
	return strings.Join([]string{
		`{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: crun}, handler: crun}
`,
		`{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {name: diary, namespace: ` + ns + `}, spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}}
`,
		pod(ns, "guaranteed", sleeps("resources: {limits: {cpu: 500m, memory: 64Mi}}")+stays),
		pod(ns, "burstable", sleeps("resources: {requests: {cpu: 250m, memory: 300Mi}, limits: {memory: 512Mi}}")+stays),
		pod(ns, "besteffort", sleeps("")+stays),
		pod(ns, "crun", sleeps("resources: {limits: {cpu: 200m, memory: 48Mi}}")+stays+"runtimeClassName: crun\n"),
		pod(ns, "root", sleeps("securityContext: {privileged: true}\nvolumeMounts: [{name: root, mountPath: /host}]")+stays+
			"hostPID: true\nvolumes: [{name: root, hostPath: {path: /}}]\n"),
		pod(ns, "diary", strings.Replace(sleeps("volumeMounts: [{name: data, mountPath: /data}]"), "[sleep, '1000000']", "[sh, -c, 'echo started >>/data/diary; exec sleep 1000000']", 1)+
			"nodeSelector: {kubernetes.io/hostname: "+vm+"}\n"+waits+"volumes: [{name: data, persistentVolumeClaim: {claimName: diary}}]\n"),
		pod(ns, "hungry", on(vm, one("command: [tail, /dev/zero]\nresources: {limits: {memory: 32Mi}}"))),
		pod(ns, "hungry-crun", on(vm, one("command: [tail, /dev/zero]\nresources: {limits: {memory: 32Mi}}"))+"runtimeClassName: crun\n"),
	}, "---\n")
}

// stay are those of v2Pods that do not end.
var stay = []string{"guaranteed", "burstable", "besteffort", "crun", "root", "diary"}

// A machine with control groups of version 2 only, and a kernel and systemd as
// users have them, runs the agent of a control plane that is not on it.
func TestV2(t *testing.T) {
	if os.Getenv("TUTTI_V2") == "" {
		t.Skip("boots a virtual machine: make test-v2")
	}
	patience = 10 * time.Minute // its processor is emulated
	n := joinable(t)
	n.boot(short)
	ns := n.namespace(joined)
	n.wait("", "node/"+vm, "create")
	n.wait("", "node/"+vm, "condition=Ready")
	n.ok(n.Apply(v2Pods(ns)))
	for _, name := range stay {
		n.wait(ns, "pod/"+name, "condition=Ready")
	}
	in := func(name, script string) string {
		t.Helper()
		return n.kubectl("-n", ns, "exec", name, "--", "sh", "-c", script)
	}
	// group is a file of a pod's own control group, as the machine has it.
	group := func(name, class, file string) string {
		t.Helper()
		uid := n.field(ns, "pod/"+name, "{.metadata.uid}")
		return strings.TrimSpace(in("root", "cat /host/sys/fs/cgroup/"+filepath.Join("tutti/pods", class, "pod"+uid, file)))
	}
	is := func(what, got, want string) {
		t.Helper()
		if got != want {
			t.Errorf("%s is %q, want %q", what, got, want)
		}
	}

	is("the machine's control groups", in("root", "stat -f -c %t /host/sys/fs/cgroup"), "63677270\n")

	t.Run("limits", func(t *testing.T) {
		is("what guaranteed sees", in("guaranteed", "cd /sys/fs/cgroup; cat memory.max cpu.max memory.swap.max"), "67108864\n50000 100000\n0\n")
		is("its group", group("guaranteed", "", "memory.max")+" "+group("guaranteed", "", "cpu.max")+" "+group("guaranteed", "", "pids.max"), "67108864 50000 100000 1024")
		is("what burstable sees", in("burstable", "cd /sys/fs/cgroup; cat memory.max cpu.max"), "536870912\nmax 100000\n")
		is("what besteffort sees", in("besteffort", "cd /sys/fs/cgroup; cat memory.max cpu.max"), "max\nmax 100000\n")
		is("besteffort's processes", group("besteffort", "besteffort", "pids.max"), "1024")
		var before, after int
		const throttled = "awk '/nr_throttled/ {print $2}' /sys/fs/cgroup/cpu.stat"
		fmt.Sscan(in("guaranteed", throttled), &before)
		in("guaranteed", "timeout 3 sh -c 'while :; do :; done'; true")
		if fmt.Sscan(in("guaranteed", throttled), &after); after <= before {
			t.Errorf("a loop was held back %d times, before it %d times", after, before)
		}
	})
	t.Run("out of memory", func(t *testing.T) {
		for _, name := range []string{"hungry", "hungry-crun"} {
			n.wait(ns, "pod/"+name, "jsonpath={.status.containerStatuses[0].state.terminated.reason}=OOMKilled")
			is(name+"'s exit code", n.field(ns, "pod/"+name, "{.status.containerStatuses[0].state.terminated.exitCode}"), "137")
			n.until("an event about "+name, func() (bool, string) {
				got := n.kubectl("-n", ns, "get", "events", "--field-selector=reason=OOMKilled,involvedObject.name="+name, "-o", "jsonpath={.items[*].message}")
				return got == "Container main was killed: it wanted more memory than its limit", got
			})
		}
	})
	t.Run("quality of service", func(t *testing.T) {
		weight := func(name, class string) (w int) {
			t.Helper()
			if _, err := fmt.Sscan(group(name, class, "cpu.weight"), &w); err != nil {
				t.Fatal(err)
			}
			return w
		}
		guaranteed, burstable, besteffort := weight("guaranteed", ""), weight("burstable", "burstable"), weight("besteffort", "besteffort")
		if guaranteed <= burstable || burstable <= besteffort || besteffort != 1 {
			t.Errorf("weights %d, %d, %d", guaranteed, burstable, besteffort)
		}
		is("the weight of all besteffort pods", in("root", "cat /host/sys/fs/cgroup/tutti/pods/besteffort/cpu.weight"), "1\n")
		is("memory that is promised", group("guaranteed", "", "memory.min"), "0") // as with a kubelet, without MemoryQoS
		for name, want := range map[string]string{"guaranteed": "-997\n", "besteffort": "1000\n"} {
			is("whom the kernel takes first: "+name, in(name, "cat /proc/1/oom_score_adj"), want)
		}
	})
	t.Run("crun", func(t *testing.T) {
		uid := n.field(ns, "pod/crun", "{.metadata.uid}")
		if got := in("root", "find /host/var/lib/tutti/keeper/workloads/"+uid+"_main_0 -name status"); got == "" {
			t.Error("crun does not know the container")
		}
		is("what it sees", in("crun", "cd /sys/fs/cgroup; cat memory.max cpu.max"), "50331648\n20000 100000\n")
	})

	evicted := func(name, why, condition string) {
		t.Helper()
		n.wait(ns, "pod/"+name, "jsonpath={.status.reason}=Evicted")
		if got := n.field(ns, "pod/"+name, "{.status.phase} {.status.message}"); !strings.HasPrefix(got, "Failed The node was low on resource: "+why+". Threshold quantity: ") {
			t.Errorf("%s: %s", name, got)
		}
		n.wait("", "node/"+vm, "condition="+condition)
		n.ok(n.Apply(pod(ns, "late", on(vm, one("command: ['true']")))))
		n.wait(ns, "pod/late", "jsonpath={.status.reason}=Evicted")
		is("a pod that comes too late", n.field(ns, "pod/late", "{.status.message}"), "Pod was rejected: The node had condition: ["+condition+"]. ")
		n.kubectl("-n", ns, "delete", "pod", "late", name)
		for _, name := range stay {
			is(name, n.field(ns, "pod/"+name, "{.status.phase} {.status.containerStatuses[0].restartCount}"), "Running 0")
		}
	}
	// pressed is a pod that wants more and more, for the best effort.
	pressed := func(name, script string) {
		t.Helper()
		n.ok(n.Apply(pod(ns, name, on(vm, one("command: [sh, -c, "+fmt.Sprintf("%q", script)+"]"))+"terminationGracePeriodSeconds: 0\n")))
	}
	t.Run("memory pressure", func(t *testing.T) {
		pressed("fat", `busybox awk 'BEGIN { for (i = 0; i < 150; i++) { a[i] = sprintf("%8000000s", "x"); system("sleep 0.1") } system("sleep 100000") }'`)
		evicted("fat", "memory", "MemoryPressure")
		n.wait("", "node/"+vm, "condition=MemoryPressure=false")
	})
	t.Run("inode pressure", func(t *testing.T) {
		pressed("many", `i=0; while [ $i -lt 20000 ]; do : >/$i; i=$((i+1)); [ $((i % 200)) != 0 ] || sleep 0.1; done; sleep 100000`)
		evicted("many", "inodes", "DiskPressure")
		n.wait("", "node/"+vm, "condition=DiskPressure=false")
	})
	t.Run("process id pressure", func(t *testing.T) {
		const forks = `i=0; while [ $i -lt %d ]; do sleep 100000 & i=$((i+1)); done; wait`
		pressed("few", fmt.Sprintf(forks, 400))
		pressed("forks", fmt.Sprintf(forks, 900))
		evicted("forks", "pids", "PIDPressure")
		is("who has fewer processes", n.field(ns, "pod/few", "{.status.phase}"), "Running")
		n.kubectl("-n", ns, "delete", "pod", "few")
	})

	t.Run("reboot", func(t *testing.T) {
		known := func() string {
			return n.kubectl(append([]string{"-n", ns, "get", "pods", "-o", "jsonpath={range .items[*]}{.metadata.name} {.metadata.uid} {.status.podIP}{'\\n'}{end}"}, stay...)...)
		}
		before, boot := known(), n.field("", "node/"+vm, "{.status.nodeInfo.bootID}")
		// What asks is ended by what it asks for.
		n.Kubectl("-n", ns, "exec", "root", "--", "nsenter", "-t", "1", "-m", "-u", "-i", "-n", "-p", "--", "systemctl", "reboot")
		n.until("another boot", func() (bool, string) {
			got := n.Kubectl("get", "node", vm, "-o", "jsonpath={.status.nodeInfo.bootID}").Stdout
			return got != "" && got != boot, got
		})
		for _, name := range stay {
			n.wait(ns, "pod/"+name, "jsonpath={.status.containerStatuses[0].restartCount}=1")
			n.wait(ns, "pod/"+name, "condition=Ready")
		}
		is("pods and addresses", known(), before)
		is("the diary", in("diary", "cat /data/diary"), "started\nstarted\n")
		is("what guaranteed sees", in("guaranteed", "cd /sys/fs/cgroup; cat memory.max cpu.max"), "67108864\n50000 100000\n")
		if got := in("besteffort", `printf 'GET / HTTP/1.0\r\n\r\n' | nc kubernetes.default.svc.cluster.local 443`); !strings.Contains(got, "HTTP request to an HTTPS server") {
			t.Errorf("the API from a pod: %q", got)
		}
	})
}
