package e2e

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"tutti.dev/tutti/internal/agent/translate"
)

// watched makes a pod that asks for a little of the processors and is asked
// each second whether it lives and is ready: it is restarted, or unready, when
// it or the agent does not get its turn.
func watched(n node, ns string) {
	n.t.Helper()
	const probe = "{httpGet: {path: /up, port: 8080}, periodSeconds: 1, timeoutSeconds: 5, failureThreshold: 3}"
	n.ok(n.Apply(pod(ns, "watched", restarting(one("command: [sh, -c, 'touch /tmp/up; exec httpd -f -p 8080 -h /tmp']\nresources: {requests: {cpu: 100m}}\n"+
		"livenessProbe: "+probe+"\nreadinessProbe: "+probe))+"terminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/watched", "condition=Ready")
}

// undisturbed says that the watched pod is the one that it was and has been
// ready since, and that the node is ready.
func (n node) undisturbed(ns, container string) {
	n.t.Helper()
	if got := containerOf(n, ns, "watched"); got != container {
		n.t.Errorf("the watched pod was restarted: %s, was %s", got, container)
	}
	const since = `{.status.conditions[?(@.type=="Ready")].status} {.status.conditions[?(@.type=="Ready")].lastTransitionTime}`
	ready, started := strings.Fields(n.field(ns, "pod/watched", since)), n.field(ns, "pod/watched", "{.status.containerStatuses[0].state.running.startedAt}")
	if a, errA := time.Parse(time.RFC3339, ready[1]); ready[0] != "True" || errA != nil {
		n.t.Errorf("the watched pod: %v", ready)
	} else if b, errB := time.Parse(time.RFC3339, started); errB != nil || a.Sub(b) > 5*time.Second {
		n.t.Errorf("the watched pod was not ready in between: started %s, ready since %s", started, ready[1])
	}
	if got := n.field("", "node", `{.items[0].status.conditions[?(@.type=="Ready")].status}`); got != "True" {
		n.t.Errorf("the node's readiness is %s", got)
	}
	if events := n.kubectl("get", "events", "--field-selector=reason=NodeNotReady", "-A", "-o", "name"); events != "" {
		n.t.Errorf("the node was not ready in between: %s", events)
	}
}

// failedProbes counts them. Three in a row are what undisturbed does not allow.
func (n node) failedProbes(ns string) int {
	sum := 0
	for _, count := range strings.Fields(n.kubectl("-n", ns, "get", "events", "--field-selector=reason=Unhealthy", "-o", "jsonpath={.items[*].count}")) {
		c, err := strconv.Atoi(count)
		if err != nil {
			n.t.Fatal(err)
		}
		sum += c
	}
	return sum
}

// What a pod may do at worst. Each is given its time, looked at, and deleted.
type hostilePod struct {
	name, spec string
	// until is what kubectl wait waits for, if it shows by that.
	until string
}

var hostile = []hostilePod{
	// When it cannot fork, the shell gives up.
	{name: "process-hog", until: "jsonpath={.status.phase}=Failed", spec: one(`command: [sh, -c, "while :; do sleep 1000 & done"]`)},
	{name: "memory-hog", until: "jsonpath={.status.containerStatuses[0].lastState.terminated.reason}=OOMKilled",
		spec: restarting(one("command: [sh, -c, 'sleep 1; exec tail /dev/zero']\nresources: {limits: {memory: 64Mi}}"))},
	{name: "deaf", until: "condition=Ready", spec: one(`command: [sh, -c, "trap '' TERM HUP INT QUIT; while :; do sleep 1; done"]`)},
	{name: "log-flood", until: "condition=Ready", spec: one(`command: [sh, -c, "yes all work and no play makes jack a dull boy"]`)},
	{name: "huge-environment", until: "jsonpath={.status.phase}=Succeeded",
		spec: one("command: [sh, -c, 'exit 0']\nenv:\n" + environment(2, 100_000))},
	{name: "too-huge-environment", until: "jsonpath={.status.phase}=Failed",
		spec: one("command: [sh, -c, 'exit 0']\nenv:\n" + environment(1, 200_000))},
	{name: "disk-filler", until: "jsonpath={.status.reason}=Evicted", spec: one(`
command: [sh, -c, "dd if=/dev/zero of=/dir/f bs=1M count=256; sleep 100000"]
volumeMounts: [{name: dir, mountPath: /dir}]`) + "volumes: [{name: dir, emptyDir: {sizeLimit: 100Mi}}]\n"},
}

// Of files there can be many, and deep down.
var hostileFiles = []hostilePod{
	{name: "many-files", until: "jsonpath={.status.reason}=Evicted", spec: one(`
command: [sh, -c, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); : >/dir/$i; done; dd if=/dev/zero of=/dir/f bs=1M count=16; sleep 100000"]
volumeMounts: [{name: dir, mountPath: /dir}]`) + "volumes: [{name: dir, emptyDir: {sizeLimit: 10Mi}}]\n"},
	{name: "deep", until: "condition=Ready", spec: one(`
command: [sh, -c, "d=dddddddddddddddddddddddddddddddddddddddd; cd /; i=0; while [ $i -lt 500 ]; do i=$((i+1)); mkdir $d && cd $d; done; touch /tmp/done; sleep 100000"]
readinessProbe: {exec: {command: [cat, /tmp/done]}, periodSeconds: 1}`)},
}

// environment is that many variables of that many bytes.
func environment(variables, size int) string {
	var b strings.Builder
	for i := range variables {
		fmt.Fprintf(&b, "- {name: V%d, value: %s}\n", i, strings.Repeat("x", size))
	}
	return b.String()
}

// assault lets hostile pods loose in a namespace of their own, on a machine
// whose pods may have 2 GiB of memory together. Others' probes keep passing,
// the node stays ready, and when the pods are deleted nothing is left of them.
func assault(t *testing.T, f func(n node, ns string)) {
	n := empty(t)
	n.explainFailure()
	has, err := memory()
	if err != nil {
		t.Fatal(err)
	}
	const forPods = 2 << 30
	n.ok(n.Tutti("up", fmt.Sprintf("--system-reserved=memory=%d", has-forPods)))
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	n.limited(forPods)
	victim := n.namespace("victim")
	watched(n, victim)
	container := containerOf(n, victim, "watched")
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	n.kubectl("create", "namespace", "hostile")
	n.kubectl("-n", "hostile", "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	begun, failed := time.Now(), n.failedProbes(victim)
	f(n, "hostile")
	n.undisturbed(victim, container)
	t.Logf("it took %v; %d probes of the watched pod failed", time.Since(begun).Round(time.Second/10), n.failedProbes(victim)-failed)

	begun = time.Now()
	n.kubectl("delete", "namespace", "hostile", "--timeout=120s")
	n.undisturbed(victim, container)
	n.leavesNothing(before)
	if dirs, _ := filepath.Glob(filepath.Join(n.Dir, "logs", "hostile_*")); len(dirs) > 0 {
		t.Errorf("logs are left: %v", dirs)
	}
	pods, err := os.ReadDir(filepath.Join(n.Dir, "pods"))
	if err != nil || len(pods) != 1 {
		t.Errorf("directories of %d pods are left, %v", len(pods), err)
	}
	t.Logf("nothing was left after %v", time.Since(begun).Round(time.Second/10))
}

// loose starts hostile pods, all at once, and waits until each shows what it
// does.
func (n node) loose(ns string, list []hostilePod) {
	n.t.Helper()
	var all []string
	for _, h := range list {
		all = append(all, pod(ns, h.name, h.spec+"terminationGracePeriodSeconds: 1\n"))
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))
	for _, h := range list {
		n.wait(ns, "pod/"+h.name, h.until)
	}
}

// The worst pods at once, and exec sessions besides.
func TestHostilePods(t *testing.T) {
	assault(t, func(n node, ns string) {
		n.sessions(ns, 100)
		n.loose(ns, hostile)
		// A log does not grow for ever.
		logs, _ := filepath.Glob(filepath.Join(n.Dir, "logs", ns+"_log-flood_*", "main", "*"))
		var size int64
		for _, l := range logs {
			if info, err := os.Stat(l); err == nil {
				size += info.Size()
			}
		}
		if size == 0 || size > 60<<20 {
			t.Errorf("the log has %d bytes", size)
		}
		if log := n.kubectl("-n", ns, "logs", "process-hog", "--tail=1"); !strings.Contains(log, "can't fork") {
			t.Errorf("the process hog ended with %q", log)
		}
		// The last: what is short of memory takes no such pods for a while.
		n.memoryHogs(ns)
	})
}

func TestHostileFiles(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes long")
	}
	assault(t, func(n node, ns string) { n.loose(ns, hostileFiles) })
}

func TestThousandsOfSessions(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes long")
	}
	assault(t, func(n node, ns string) { n.sessions(ns, 2000) })
}

func TestForkBomb(t *testing.T) {
	if testing.Short() {
		t.Skip("it slows everything on the machine down")
	}
	assault(t, func(n node, ns string) { n.forkBomb(ns) })
}

// memory is how many bytes the machine has.
func memory() (int64, error) {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	var kib int64
	_, err = fmt.Sscanf(string(data), "MemTotal: %d kB", &kib)
	return kib << 10, err
}

// limited says that all pods together are held to so many bytes of memory, and
// that the scheduler may promise what of that is not to be kept free.
func (n node) limited(bytes int64) {
	n.t.Helper()
	sum := sha256.Sum256([]byte(n.Dir))
	group := fmt.Sprintf("/sys/fs/cgroup/tutti-%x/pods/memory.max", sum[:4])
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil { // version 1
		group = fmt.Sprintf("/sys/fs/cgroup/memory/tutti-%x/pods/memory.limit_in_bytes", sum[:4])
	}
	data, err := os.ReadFile(group)
	if err != nil {
		n.t.Fatal(err)
	}
	limit, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		n.t.Fatal(err)
	}
	told, err := resource.ParseQuantity(n.field("", "node", "{.items[0].status.allocatable.memory}"))
	if err != nil {
		n.t.Fatal(err)
	}
	const keptFree = 100 << 20
	if limit != bytes || told.Value() != bytes-keptFree {
		n.t.Errorf("pods are held to %d bytes, want %d; allocatable are %d, want %d less", limit, bytes, told.Value(), keptFree)
	}
}

// memoryHogs take together what all pods may have, and more, though none of
// them has a limit. The kernel ends them, or eviction does.
func (n node) memoryHogs(ns string) {
	n.t.Helper()
	var all []string
	for i := range 3 {
		all = append(all, pod(ns, fmt.Sprint("hog", i), one("command: [tail, /dev/zero]")+"terminationGracePeriodSeconds: 0\n"))
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))
	for i := range 3 {
		n.wait(ns, fmt.Sprint("pod/hog", i), "jsonpath={.status.phase}=Failed")
		if why := n.field(ns, fmt.Sprint("pod/hog", i), "{.status.reason}{.status.containerStatuses[0].state.terminated.reason}"); !strings.Contains(why, "OOMKilled") && !strings.Contains(why, "Evicted") {
			n.t.Errorf("a memory hog ended with %q", why)
		}
	}
}

// forkBomb lets one go off until it has the processes that a pod may have, and
// ends it as a person would. It would not last long, whatever becomes of the
// test.
func (n node) forkBomb(ns string) {
	n.t.Helper()
	n.ok(n.Apply(pod(ns, "bomb", one(`command: [sh, -c, "bomb() { bomb | bomb & }; bomb; while :; do sleep 1000; done"]`)+
		"activeDeadlineSeconds: 60\nterminationGracePeriodSeconds: 1\n")))
	uid, begun := n.field(ns, "pod/bomb", "{.metadata.uid}"), time.Now()
	most := 0
	n.until("a fork bomb goes off", func() (bool, string) {
		// Of version 1 and 2. To look at each process would take long now.
		groups, _ := filepath.Glob("/sys/fs/cgroup/pids/*/pods/besteffort/pod" + uid + "/pids.current")
		unified, _ := filepath.Glob("/sys/fs/cgroup/*/pods/besteffort/pod" + uid + "/pids.current")
		for _, g := range append(groups, unified...) {
			var now int
			if data, err := os.ReadFile(g); err == nil {
				fmt.Sscan(string(data), &now)
			}
			most = max(most, now)
		}
		return most >= translate.PodPids*9/10, fmt.Sprint(most, " processes")
	})
	if most > translate.PodPids {
		n.t.Errorf("the pod had %d processes", most)
	}
	n.t.Logf("%d processes after %v", most, time.Since(begun).Round(time.Second/10))
	// It goes on for some ten seconds, in which the node says that it lives.
	renewed := func() string { return n.field("kube-node-lease", "lease", "{.items[0].spec.renewTime}") }
	last := renewed()
	n.until("the node renews its lease", func() (bool, string) {
		now := renewed()
		return now != last, now
	})
	begun = time.Now()
	n.kubectl("-n", ns, "delete", "pod", "bomb", fmt.Sprintf("--timeout=%v", patience))
	n.t.Logf("the fork bomb ended in %v", time.Since(begun).Round(time.Second/10))
}

// sessions opens that many exec sessions, has them all open at once, and drops
// them. Each takes a process of its pod, which may not have thousands.
func (n node) sessions(ns string, count int) {
	n.t.Helper()
	const most = 500
	var all, targets []string
	for i := range (count + most - 1) / most {
		targets = append(targets, fmt.Sprint("target", i))
		all = append(all, pod(ns, targets[i], one("command: [sleep, '100000']")+"terminationGracePeriodSeconds: 0\n"))
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))
	for _, target := range targets {
		n.wait(ns, "pod/"+target, "condition=Ready")
	}
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(n.Dir, "admin.kubeconfig"))
	if err != nil {
		n.t.Fatal(err)
	}
	transport, err := rest.TLSConfigFor(config)
	if err != nil {
		n.t.Fatal(err)
	}
	var mu sync.Mutex
	var open []io.Closer
	var failed []error
	var wg sync.WaitGroup
	slots := make(chan struct{}, 16)
	begun := time.Now()
	for i := range count {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			c, err := n.session(config.Host, transport, ns, targets[i/most])
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed = append(failed, err)
				return
			}
			open = append(open, c)
		})
	}
	wg.Wait()
	server, err := n.Server()
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Logf("%d exec sessions are open after %v; the server has %s", len(open), time.Since(begun).Round(time.Second/10), resident(n.t, server.PID))
	if len(failed) > 0 {
		n.t.Errorf("%d of %d exec sessions failed, such as: %v", len(failed), count, failed[0])
	}
	running := func() int {
		processes, err := n.Processes()
		if err != nil {
			n.t.Fatal(err)
		}
		sum := 0
		for _, p := range processes {
			if slices.Equal(p.Args, []string{"cat", "-u"}) {
				sum++
			}
		}
		return sum
	}
	if got := running(); got != len(open) {
		n.t.Errorf("%d sessions are open, %d programs run", len(open), got)
	}
	for _, c := range open {
		c.Close()
	}
	n.until("sessions ended with their connections", func() (bool, string) {
		left := running()
		return left == 0, fmt.Sprint(left, " programs are left")
	})
}

// resident is how much memory a process has.
func resident(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, after, _ := strings.Cut(string(status), "VmRSS:")
	size, _, _ := strings.Cut(after, "\n")
	return strings.TrimSpace(size)
}

// session is one that echoes, opened as kubectl does, and proven to work.
func (n node) session(host string, transport *tls.Config, ns, pod string) (io.Closer, error) {
	base, err := url.Parse(host)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	raw, err := n.Dial(ctx, "tcp", base.Host)
	if err != nil {
		return nil, err
	}
	transport = transport.Clone()
	transport.ServerName, transport.NextProtos = base.Hostname(), []string{"http/1.1"}
	conn := tls.Client(raw, transport)
	config, err := websocket.NewConfig("wss://"+base.Host+"/api/v1/namespaces/"+ns+"/pods/"+pod+"/exec?command=cat&command=-u&stdin=true&stdout=true", host)
	if err != nil {
		return nil, err
	}
	config.Protocol = []string{"base64.channel.k8s.io"}
	if err := raw.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return nil, err
	}
	ws, err := websocket.NewClient(config, conn)
	if err != nil {
		raw.Close()
		return nil, err
	}
	// Channel 0 is the program's input, channel 1 its output.
	if err = websocket.Message.Send(ws, "0"+base64.StdEncoding.EncodeToString([]byte("hello"))); err == nil {
		var got string
		for err == nil && got != "1"+base64.StdEncoding.EncodeToString([]byte("hello")) {
			err = websocket.Message.Receive(ws, &got)
		}
	}
	if err != nil {
		ws.Close()
		return nil, fmt.Errorf("talk to cat: %w", err)
	}
	return ws, raw.SetDeadline(time.Time{})
}
