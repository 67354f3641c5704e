package e2e

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/websocket"
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

// What a pod may do at worst. Each is given its time, looked at, and deleted.
var hostile = []struct {
	name, spec string
	// until is what kubectl wait waits for, if it shows by that.
	until string
	long  bool
}{
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
	{name: "many-files", until: "jsonpath={.status.reason}=Evicted", long: true, spec: one(`
command: [sh, -c, "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); : >/dir/$i; done; dd if=/dev/zero of=/dir/f bs=1M count=16; sleep 100000"]
volumeMounts: [{name: dir, mountPath: /dir}]`) + "volumes: [{name: dir, emptyDir: {sizeLimit: 10Mi}}]\n"},
	{name: "deep", until: "condition=Ready", long: true, spec: one(`
command: [sh, -c, "d=dddddddddddddddddddddddddddddddddddddddd; cd /; i=0; while [ $i -lt 500 ]; do i=$((i+1)); mkdir $d && cd $d; done; sleep 100000"]`)},
}

// environment is that many variables of that many bytes.
func environment(variables, size int) string {
	var b strings.Builder
	for i := range variables {
		fmt.Fprintf(&b, "- {name: V%d, value: %s}\n", i, strings.Repeat("x", size))
	}
	return b.String()
}

// The worst pods at once: others' probes keep passing, the node stays ready,
// and when the pods are deleted nothing is left of them.
func TestHostilePods(t *testing.T) {
	n := running(t)
	ns := n.namespace("victim")
	watched(n, ns)
	container := containerOf(n, ns, "watched")
	before, err := n.State()
	if err != nil {
		t.Fatal(err)
	}
	n.kubectl("create", "namespace", "hostile")
	n.kubectl("-n", "hostile", "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.ok(n.Apply(pod("hostile", "target", one("command: [sleep, '100000']")+"terminationGracePeriodSeconds: 0\n")))
	n.wait("hostile", "pod/target", "condition=Ready")
	sessions := 100
	if !testing.Short() {
		sessions = 2000
	}
	n.sessions("hostile", "target", sessions)
	n.undisturbed(ns, container)

	var all []string
	for _, h := range hostile {
		if !h.long || !testing.Short() {
			all = append(all, pod("hostile", h.name, h.spec+"terminationGracePeriodSeconds: 1\n"))
		}
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))

	for _, h := range hostile {
		if !h.long || !testing.Short() {
			n.wait("hostile", "pod/"+h.name, h.until)
		}
	}
	// A log does not grow for ever.
	logs, _ := filepath.Glob(filepath.Join(n.Dir, "logs", "hostile_log-flood_*", "main", "*"))
	var size int64
	for _, l := range logs {
		if info, err := os.Stat(l); err == nil {
			size += info.Size()
		}
	}
	if size == 0 || size > 60<<20 {
		t.Errorf("the log has %d bytes", size)
	}
	if log := n.kubectl("-n", "hostile", "logs", "process-hog", "--tail=1"); !strings.Contains(log, "can't fork") {
		t.Errorf("the process hog ended with %q", log)
	}
	n.undisturbed(ns, container)
	if !testing.Short() {
		n.forkBomb("hostile")
		n.undisturbed(ns, container)
	}

	n.kubectl("delete", "namespace", "hostile", "--timeout=120s")
	n.undisturbed(ns, container)
	n.leavesNothing(before)
	if dirs, _ := filepath.Glob(filepath.Join(n.Dir, "logs", "hostile_*")); len(dirs) > 0 {
		t.Errorf("logs are left: %v", dirs)
	}
	pods, err := os.ReadDir(filepath.Join(n.Dir, "pods"))
	if err != nil || len(pods) != 1 {
		t.Errorf("directories of %d pods are left, %v", len(pods), err)
	}
}

// forkBomb lets one go off until it has the processes that a pod may have. It
// forks for some seconds, whatever becomes of the test, and ends by itself.
func (n node) forkBomb(ns string) {
	n.t.Helper()
	n.ok(n.Apply(pod(ns, "bomb", one(`command: [timeout, -s, KILL, "15", sh, -c, "bomb() { bomb | bomb & }; bomb; while :; do sleep 1000; done"]`))))
	uid := n.field(ns, "pod/bomb", "{.metadata.uid}")
	most := 0
	n.until("a fork bomb goes off", func() (bool, string) {
		// Of version 1 and 2. To look at each process would take long now.
		groups, _ := filepath.Glob("/sys/fs/cgroup/pids/*/besteffort/pod" + uid + "/pids.current")
		unified, _ := filepath.Glob("/sys/fs/cgroup/*/besteffort/pod" + uid + "/pids.current")
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
	n.wait(ns, "pod/bomb", "jsonpath={.status.phase}=Failed")
}

// sessions opens that many exec sessions to a pod, has them all open at once,
// and drops them.
func (n node) sessions(ns, pod string, count int) {
	n.t.Helper()
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
	for range count {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			c, err := n.session(config.Host, transport, ns, pod)
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
