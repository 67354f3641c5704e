package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/test/e2e/machine"
)

// While pods of every kind come and go, server and keeper are killed, stopped
// for a moment and replaced at random moments. Pods that are to stay do not
// notice, no run is lost or done twice, nothing acknowledged is lost; and once
// what came has gone, the machine is as it was before.
//
// TUTTI_CHAOS_KILLS says how many blows; TUTTI_CHAOS_SEED repeats a plan.
func TestChaos(t *testing.T) {
	blows := 200
	if testing.Short() {
		blows = 4
	}
	blows = int(setting(t, "TUTTI_CHAOS_KILLS", uint64(blows)))
	seed := setting(t, "TUTTI_CHAOS_SEED", rand.Uint64())
	t.Logf("TUTTI_CHAOS_SEED=%d TUTTI_CHAOS_KILLS=%d", seed, blows)

	s := &storm{node: running(t), program: make(chan string, 2)}
	s.settlers()
	// What is counted must have been through the same before and after: one
	// calm round on a server that found its data directory.
	s.strike(blow{what: killServer})
	s.churn(func() { s.rounds(2) })
	before := s.measure(nil)

	plan := plan(seed, blows)
	s.churn(func() {
		for i, b := range plan {
			t.Logf("%d/%d %v", i+1, blows, b)
			time.Sleep(b.after)
			s.strike(b)
		}
	})
	s.unmoved()
	s.measure(&before)
}

// setting reads a number from the environment.
func setting(t *testing.T, name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// what is done to tutti.
const (
	killServer   = "kill the server"
	killKeeper   = "kill the keeper"
	killBoth     = "kill both"
	killStarting = "kill the server while it starts"
	replace      = "replace the keeper's program"
	holdServer   = "hold the server"
	holdKeeper   = "hold the keeper"
)

// blow is one thing done to tutti: after waiting, for how long.
type blow struct {
	what        string
	after, long time.Duration
}

func (b blow) String() string { return fmt.Sprintf("%v later: %s (%v)", b.after, b.what, b.long) }

// plan makes a plan of n blows from a seed. The last tenth spares the server:
// the one that is measured at the end has lived through deaths of the keeper.
func plan(seed uint64, n int) []blow {
	dice := rand.New(rand.NewPCG(seed, 1))
	some := func(most time.Duration) time.Duration {
		return time.Duration(dice.Int64N(int64(most))).Truncate(time.Millisecond)
	}
	all := []string{killServer, killServer, killKeeper, killKeeper, killBoth, killStarting, replace, replace, holdServer, holdKeeper}
	sparing := []string{killKeeper, replace, holdServer, holdKeeper}
	plan := make([]blow, n)
	for i := range plan {
		from := all
		if i >= n-max(2, n/10) {
			from = sparing
		}
		plan[i] = blow{from[dice.IntN(len(from))], some(1500 * time.Millisecond), some(time.Second)}
	}
	return plan
}

// storm is a machine on which things happen.
type storm struct {
	node
	stay    map[string]string // the pods that are to stay, and their containers
	program chan string       // the keeper's programs, the next to be used first
	round   atomic.Int64      // of the churn
}

const (
	stays  = "stays"
	churns = "churns"
)

// settlers makes the pods that stay, and prepares what the churn uses.
func (s *storm) settlers() {
	n := s.node
	n.kubectl("create", "namespace", stays)
	n.kubectl("-n", stays, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.kubectl("-n", stays, "create", "configmap", "settings", "--from-literal=word=here")
	bystander(n, stays)
	const idle = `command: [sh, -c, "trap exit TERM; while :; do sleep 1; done"]` + "\n"
	for name, spec := range map[string]string{
		// One wrong word of its probes and it restarts.
		"probed": restarting(one(idle + `
livenessProbe: {exec: {command: ["true"]}, periodSeconds: 1, failureThreshold: 1, timeoutSeconds: 60}
readinessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 60}
ports: [{containerPort: 80, hostPort: 8099}]
`)),
		// Its terminal is lost when both that hold it die at once; it is not.
		"terminal": restarting(one(`command: [sh, -c, "while :; do read line && echo got $line || sleep 1; done"]` + "\ntty: true\nstdin: true\n")),
		"limited": restarting(one(`command: [sh, -c, "head -c 8000000 /dev/zero >/ram/ballast; exec sleep 100000"]
resources: {limits: {memory: 64Mi, cpu: 500m}}
volumeMounts: [{name: ram, mountPath: /ram}, {name: settings, mountPath: /settings/word, subPath: word}]
`)) + "\nvolumes:\n- {name: ram, emptyDir: {medium: Memory, sizeLimit: 16Mi}}\n- {name: settings, configMap: {name: settings}}\n",
		"together": "shareProcessNamespace: true\ninitContainers:\n- {name: side, image: \"busybox:1\", restartPolicy: Always, command: [sleep, \"100001\"]}\n" +
			restarting(one(idle)),
		// Nothing it says tells who has left.
		"silent": restarting(one("command: [sleep, \"100002\"]\nstdin: true\n")),
		"talker": restarting(one(`command: [sh, -c, "while :; do seq 1 2000; sleep 1; done"]` + "\n")),
	} {
		n.ok(n.Apply(pod(stays, name, spec+"\nterminationGracePeriodSeconds: 1\n")))
	}
	n.kubectl("-n", stays, "wait", "pod", "--all", "--for=condition=Ready", fmt.Sprintf("--timeout=%v", patience))
	s.stay = s.containers()

	// Two programs of different content that both work: what differs is a
	// byte of the header that nothing reads.
	data, err := os.ReadFile(filepath.Join(n.Repo, "internal", "keeper", "embedded", "tutti-keeper"))
	if err != nil {
		n.t.Fatal(err)
	}
	for i := range cap(s.program) {
		path := filepath.Join(s.home(), fmt.Sprintf("tutti-keeper-%d", i))
		writeProgram(n.t, path, otherBuild(n.t, data, byte(i+1)))
		s.program <- path
	}
}

// elfPadding is the last byte of the identification in an ELF header: unused.
const elfPadding = 15

// otherBuild is the same program with another digest.
func otherBuild(t *testing.T, program []byte, mark byte) []byte {
	t.Helper()
	if !bytes.HasPrefix(program, []byte("\x7fELF")) {
		t.Fatal("no ELF program")
	}
	other := slices.Clone(program)
	other[elfPadding] = mark
	return other
}

// writeProgram writes a program while nothing is forked: go.dev/issue/22315.
func writeProgram(t *testing.T, path string, data []byte) {
	t.Helper()
	syscall.ForkLock.RLock()
	err := os.WriteFile(path, data, 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
}

// home is a directory beside the data directory.
func (s *storm) home() string { return filepath.Dir(s.Dir) }

// containers tells each container that stays by its pod: its identifier and
// how often it was restarted.
func (s *storm) containers() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(s.kubectl("-n", stays, "get", "pods", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.status.initContainerStatuses[*].containerID} {.status.initContainerStatuses[*].restartCount} `+
			`{.status.containerStatuses[*].containerID} {.status.containerStatuses[*].restartCount}{"\n"}{end}`)) {
		name, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		all[name] = rest
	}
	return all
}

// unmoved checks that the pods that stay are the same and still serve.
func (s *storm) unmoved() {
	s.t.Helper()
	now := s.containers()
	for name, was := range s.stay {
		if now[name] != was {
			s.t.Errorf("pod %s was moved: it has %s, had %s\n%s", name, now[name], was,
				s.Kubectl("-n", stays, "describe", "pod", name).Stdout)
		}
	}
	unmoved(s.node, stays, containerOf(s.node, stays, "bystander"))
}

// strike does one thing to tutti. Afterwards the server is there.
func (s *storm) strike(b blow) {
	s.t.Helper()
	server := func() machine.Process { return s.find("the server", s.Server) }
	kill := func(p machine.Process) {
		if err := p.Kill(); err != nil && !errors.Is(err, syscall.ESRCH) {
			s.t.Fatal(err)
		}
	}
	up := func() {
		s.t.Helper()
		if err := s.Up(); err != nil {
			s.t.Fatalf("start after the server was killed: %v", err)
		}
	}
	hold := func(p machine.Process) {
		if syscall.Kill(p.PID, syscall.SIGSTOP) == nil {
			time.Sleep(b.long)
			_ = syscall.Kill(p.PID, syscall.SIGCONT)
		}
	}
	switch b.what {
	case killServer:
		kill(server())
		time.Sleep(b.long / 4)
		up()
	case killKeeper:
		kill(s.find("the keeper", s.Keeper))
	case killBoth:
		kill(server())
		if k, err := s.Keeper(); err == nil {
			kill(k)
		}
		up()
	case killStarting:
		kill(server())
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		starting := make(chan machine.Result, 1)
		go func() { starting <- machine.Finish(s.Command(ctx, s.Binary(), "up"), "") }()
		time.Sleep(2 * b.long)
		if p, err := s.Server(); err == nil {
			kill(p)
		}
		<-starting // it may have failed, being killed
		cancel()
		up()
	case replace:
		s.replaceKeeper()
	case holdServer:
		hold(server())
	case holdKeeper:
		hold(s.find("the keeper", s.Keeper))
	}
}

// find waits for a process: after a death it takes a moment until there is
// another.
func (s *storm) find(what string, find func() (machine.Process, error)) (p machine.Process) {
	s.t.Helper()
	s.until(what, func() (bool, string) {
		var err error
		p, err = find()
		return err == nil, fmt.Sprint(err)
	})
	return p
}

// replaceKeeper has the keeper execute another program in its place, as a
// newer tutti would.
func (s *storm) replaceKeeper() {
	s.t.Helper()
	next := <-s.program
	s.program <- next
	var asked machine.Process
	s.until("the keeper takes the call", func() (bool, string) {
		dir, err := os.Open(filepath.Join(s.Dir, "keeper"))
		if err != nil {
			return false, err.Error()
		}
		defer dir.Close()
		// A socket's path may have 107 bytes at most.
		socket, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), protocol.Socket))
		if err != nil {
			return false, err.Error()
		}
		if asked, err = s.Keeper(); err != nil {
			socket.Close()
			return false, err.Error()
		}
		conn := ttrpc.NewClient(socket)
		defer conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		// Nobody answers: who was asked is not any more.
		_, err = protocol.NewKeeperClient(conn).Upgrade(ctx, &protocol.UpgradeRequest{Binary: next})
		return errors.Is(err, ttrpc.ErrClosed), fmt.Sprint(err)
	})
	s.until("the keeper runs "+next, func() (bool, string) {
		now, err := s.Keeper()
		if err != nil {
			return false, err.Error()
		}
		if now.PID != asked.PID {
			return true, "" // the server has seen to it that its own keeper runs, or it was killed
		}
		exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", now.PID))
		return exe == next, fmt.Sprint(exe, err)
	})
}

// churn lets pods come and go while f runs, and then takes away all that
// came.
func (s *storm) churn(f func()) {
	s.t.Helper()
	s.kubectl("create", "namespace", churns)
	s.kubectl("-n", churns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	record := filepath.Join(s.home(), "record")
	if err := os.RemoveAll(record); err != nil {
		s.t.Fatal(err)
	}
	s.kubectl("-n", churns, "create", "configmap", "settings", "--from-literal=word=here")
	s.ok(s.Apply(database))
	s.round.Store(0)
	jobs := &jobs{storm: s, record: record}
	var acked []string
	wrote := 0
	stop := make(chan struct{})
	var all sync.WaitGroup
	defer all.Wait()
	ended := sync.OnceFunc(func() { close(stop) })
	defer ended()
	for name, once := range map[string]func(i int){
		"deployment": func(i int) {
			if i%5 == 4 {
				s.try("-n", churns, "delete", "deployment", "web", "--ignore-not-found", "--wait=false")
				return
			}
			s.apply(fmt.Sprintf(web, i%3+1, i))
		},
		"jobs": jobs.next,
		"database": func(i int) {
			if i%4 == 3 {
				s.try("-n", churns, "delete", "pod", "db-0", "--wait=false", fmt.Sprintf("--grace-period=%d", i/4%2), fmt.Sprintf("--force=%v", i/4%2 == 0))
				return
			}
			if s.try("-n", churns, "exec", "db-0", "--", "sh", "-c", fmt.Sprintf("echo %d >>/data/written && sync", i)) {
				wrote = i
			}
		},
		"services": func(i int) {
			kind := []string{"ClusterIP", "NodePort"}[i%2]
			s.apply(fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: s%d, namespace: %s}\nspec: {type: %s, selector: {app: web}, ports: [{port: %d}]}\n", i%3, churns, kind, 80+i%7))
			if i%3 == 2 {
				s.try("-n", churns, "delete", "service", "s0", "s1", "--ignore-not-found")
			}
		},
		"sessions": func(i int) {
			s.session(2*time.Second, "exec", "probed", "--", "sh", "-c", "seq 1 1000; sleep 1")
			s.session(time.Second, "logs", "-f", "--tail=10", "talker")
			s.session(time.Second, "attach", "-i", "terminal")
			s.session(time.Second, "attach", "-i", "silent")
		},
		"images": func(i int) {
			s.Tutti("image", "import", filepath.Join(s.home(), "busybox-1.tar"), fmt.Sprintf("churned:%d", i))
			s.Tutti("image", "rm", fmt.Sprintf("churned:%d", i))
		},
		"abrupt": func(i int) {
			s.apply(pod(churns, "abrupt", one("command: [sleep, \"100000\"]\nports: [{containerPort: 80, hostPort: 8098}]\nvolumeMounts: [{name: settings, mountPath: /settings}]\n")+
				"volumes:\n- {name: settings, configMap: {name: settings}}\n"))
			time.Sleep(time.Duration(i%5) * 100 * time.Millisecond)
			s.try("-n", churns, "delete", "pod", "abrupt", "--force", "--grace-period=0", "--ignore-not-found")
		},
		"writes": func(i int) {
			name := fmt.Sprintf("written-%d", i)
			if s.try("-n", churns, "create", "configmap", name) {
				acked = append(acked, name)
			}
		},
	} {
		all.Go(func() {
			for i := 0; ; i++ {
				once(i)
				if name == "deployment" {
					s.round.Add(1)
				}
				select {
				case <-stop:
					return
				case <-time.After(500 * time.Millisecond):
				}
			}
		})
	}
	f()
	ended()
	all.Wait()

	kept := strings.Fields(s.kubectl("-n", churns, "get", "configmaps", "-o", "jsonpath={.items[*].metadata.name}"))
	for _, name := range acked {
		if !slices.Contains(kept, name) {
			s.t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	jobs.check()
	s.ok(s.Apply(fmt.Sprintf(web, 3, s.round.Load())))
	s.kubectl("-n", churns, "rollout", "status", "deployment/web", fmt.Sprintf("--timeout=%v", patience))
	s.kubectl("-n", churns, "rollout", "status", "statefulset/db", fmt.Sprintf("--timeout=%v", patience))
	if wrote > 0 {
		if written := strings.Fields(s.kubectl("-n", churns, "exec", "db-0", "--", "cat", "/data/written")); !slices.Contains(written, fmt.Sprint(wrote)) {
			s.t.Errorf("%d was written to the volume and is lost: %v", wrote, written)
		}
	}
	s.t.Logf("%d rounds, %d writes acknowledged, %d jobs, %d written to the volume", s.round.Load(), len(acked), jobs.made, wrote)
	s.kubectl("delete", "namespace", churns, "--timeout=90s")
	s.until("no volume", func() (bool, string) {
		left := s.Kubectl("get", "persistentvolumes", "-o", "name").Stdout
		return left == "", left
	})
}

// rounds waits for a number of rounds of the churn.
func (s *storm) rounds(n int64) {
	s.until("rounds of churn", func() (bool, string) { return s.round.Load() >= n, fmt.Sprint(s.round.Load()) })
}

// try runs kubectl where a server may be missing.
func (s *storm) try(args ...string) bool {
	return s.Kubectl(append(args, "--request-timeout=10s")...).Err == nil
}

func (s *storm) apply(manifest string) bool {
	return s.RunInput(time.Minute, manifest, s.Binary(), "kubectl", "apply", "--request-timeout=10s", "-f", "-").Err == nil
}

// session runs kubectl in a pod that stays and cuts it off.
func (s *storm) session(length time.Duration, args ...string) {
	ctx, cancel := context.WithTimeout(context.Background(), length)
	defer cancel()
	machine.Finish(s.Command(ctx, s.Binary(), append([]string{"kubectl", "-n", stays}, args...)...), "line\n")
}

// web is a Deployment with what pods have; its replicas and its round vary.
const web = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: churns}
spec:
  replicas: %d
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 1
      shareProcessNamespace: true
      initContainers:
      - {name: first, image: "busybox:1", command: [touch, /scratch/made], volumeMounts: [{name: scratch, mountPath: /scratch}]}
      - {name: side, image: "busybox:1", restartPolicy: Always, command: [sleep, "100000"]}
      containers:
      - name: main
        image: busybox:1
        command: [sleep, "100000"]
        env: [{name: ROUND, value: "%d"}]
        readinessProbe: {exec: {command: [test, -e, /scratch/made]}, periodSeconds: 1}
        lifecycle: {preStop: {exec: {command: ["true"]}}}
        volumeMounts:
        - {name: scratch, mountPath: /scratch}
        - {name: ram, mountPath: /ram}
        - {name: settings, mountPath: /settings}
        - {name: settings, mountPath: /word, subPath: word}
      volumes:
      - {name: scratch, emptyDir: {}}
      - {name: ram, emptyDir: {medium: Memory}}
      - {name: settings, configMap: {name: settings}}
`

const database = `
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: churns}
spec:
  serviceName: db
  replicas: 1
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: main, image: "busybox:1", command: [sleep, "100000"], volumeMounts: [{name: data, mountPath: /data}]}
  volumeClaimTemplates:
  - metadata: {name: data}
    spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}
`

// jobs are runs that leave a record.
type jobs struct {
	*storm
	record string
	made   int
	names  []string
}

// next makes a job whose pod notes in the record, which outlives it, that it
// began and that it ended.
func (j *jobs) next(i int) {
	if i%4 != 0 {
		return
	}
	name := fmt.Sprintf("job-%d", i)
	if j.apply(fmt.Sprintf(`
apiVersion: batch/v1
kind: Job
metadata: {name: %s, namespace: %s}
spec:
  backoffLimit: 50
  template:
    spec:
      restartPolicy: Never
      containers:
      - name: main
        image: busybox:1
        command: [sh, -c, "echo $JOB $POD began >>/record/runs; sleep 0.%d; echo $JOB $POD ended >>/record/runs"]
        env:
        - {name: JOB, value: %s}
        - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
        volumeMounts: [{name: record, mountPath: /record}]
      volumes:
      - {name: record, hostPath: {path: %s, type: DirectoryOrCreate}}
`, name, churns, i%7, name, j.record)) {
		j.made++
		j.names = append(j.names, name)
	}
}

// check waits for every job that was made, and reads the record: no pod ran
// twice, and a job that is complete has a pod that came to its end.
func (j *jobs) check() {
	j.t.Helper()
	if j.made == 0 {
		return
	}
	j.kubectl("-n", churns, "wait", "job", "--for=condition=Complete", "--all", fmt.Sprintf("--timeout=%v", 2*patience))
	data, err := os.ReadFile(filepath.Join(j.record, "runs"))
	if err != nil {
		j.t.Fatal(err)
	}
	began, ended := map[string]int{}, map[string]int{}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) != 3 {
			j.t.Errorf("the record has a line %q", line)
			continue
		}
		if f[2] == "began" {
			began[f[1]]++
		} else {
			ended[f[0]]++
		}
	}
	for pod, n := range began {
		if n != 1 {
			j.t.Errorf("pod %s ran %d times", pod, n)
		}
	}
	for _, name := range j.names {
		if ended[name] == 0 {
			j.t.Errorf("%s is complete and none of its pods came to its end", name)
		}
	}
}

// count is what a machine has, once nothing moves.
type count struct {
	state       []string
	descriptors map[string]map[string]int // by process, by kind
	goroutines  map[string]int            // by process
	stacks      string                    // of the server's
}

// String counts by kind.
func (c *count) String() string {
	kinds := map[string]int{}
	for _, line := range c.state {
		kind, _, _ := strings.Cut(line, " ")
		kinds[kind]++
	}
	for process, all := range c.descriptors {
		for _, n := range all {
			kinds["descriptors of the "+process] += n
		}
	}
	for process, n := range c.goroutines {
		kinds["goroutines of the "+process] = n
	}
	return fmt.Sprint(kinds)
}

// Idle connections, timers and workers of a pool come and go: so many more
// are no leak.
const slack = 15

// measure counts what the machine has, or waits until that is no more than
// before.
func (s *storm) measure(before *count) (now count) {
	s.t.Helper()
	if before == nil {
		// Equal twice: nothing moves any more.
		var last []string
		s.until("the machine to come to rest", func() (bool, string) {
			time.Sleep(time.Second)
			state := s.everything()
			moved := machine.Left(last, state)
			last = state
			return len(moved) == 0, strings.Join(moved, "\n")
		})
		now = s.count()
		now.state, now.goroutines["keeper"] = last, s.keeperDump()
		return now
	}
	var state []string
	s.eventually("the machine is as it was before", func() (bool, string) {
		state = s.everything()
		left := machine.Left(before.state, state)
		return len(left) == 0, strings.Join(left, "\n")
	})
	s.eventually("server and keeper hold no more than before", func() (bool, string) {
		now = s.count()
		var more []string
		for process, kinds := range now.descriptors {
			for kind, n := range kinds {
				if was := before.descriptors[process][kind]; n > was+slack/3 {
					more = append(more, fmt.Sprintf("%d descriptors %s of %s, %d before", n, kind, process, was))
				}
			}
		}
		if was := before.goroutines["server"]; now.goroutines["server"] > was+slack {
			more = append(more, fmt.Sprintf("%d goroutines of the server, %d before\n%s", now.goroutines["server"], was, now.stacks))
		}
		return len(more) == 0, strings.Join(more, "\n")
	})
	now.goroutines["keeper"] = s.keeperDump()
	if n, was := now.goroutines["keeper"], before.goroutines["keeper"]; n > was+slack {
		s.t.Errorf("%d goroutines of the keeper, %d before; the dump is in its log", n, was)
	}
	now.state = state
	s.t.Logf("before: %v", before)
	s.t.Logf("after: %v", &now)
	return now
}

// eventually is until for several facts: a failure does not end the test.
func (s *storm) eventually(what string, f func() (bool, string)) {
	s.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(500 * time.Millisecond) {
		ok, state := f()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			s.t.Errorf("%s: not after %v:\n%s", what, patience, state)
			return
		}
	}
}

// everything is the machine's state, the namespaces that its processes are in
// and the files by which tutti knows what there is.
func (s *storm) everything() []string {
	s.t.Helper()
	lines, err := s.State()
	if err != nil {
		s.t.Fatal(err)
	}
	// What pods that stay do over and over, and what the whole host shares.
	lines = slices.DeleteFunc(lines, passing.MatchString)
	// The last blow decides which of its programs the keeper runs.
	for i, line := range lines {
		lines[i] = keepers.ReplaceAllString(line, "process tutti-keeper")
	}
	processes, err := s.Processes()
	if err != nil {
		s.t.Fatal(err)
	}
	namespaces := map[string]bool{}
	for _, p := range processes {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/ns/*", p.PID))
		for _, l := range links {
			if ns, err := os.Readlink(l); err == nil {
				namespaces[ns] = true
			}
		}
	}
	for ns := range namespaces {
		// Those that are not of a pod that stays have other numbers each time.
		kind, _, _ := strings.Cut(ns, ":")
		lines = append(lines, "namespace "+kind)
	}
	// As the machine sees it, and nothing that is mounted below.
	for _, dir := range []string{"pods", "memory", "keeper", "logs", "network", "volumes", "bin", "images"} {
		r := s.Run(30*time.Second, "find", filepath.Join(s.Dir, dir), "-xdev", "-mindepth", "1")
		for path := range strings.Lines(r.Stdout) {
			path = strings.TrimSpace(path)
			if rotated.MatchString(path) {
				continue
			}
			// Layers are numbered as they come.
			path = written.ReplaceAllString(path, "/..WRITTEN")
			lines = append(lines, "file "+layer.ReplaceAllString(path, "/snapshots/N"))
		}
	}
	slices.Sort(lines)
	return lines
}

var (
	// The log of a pod that stays is rotated when it is large.
	passing = regexp.MustCompile(`^(process (sleep (0\.1|1)|seq 1 2000|true)|file /run/.*)$`)
	keepers = regexp.MustCompile(`^process \S*/tutti-keeper-\S+ --dir \S+( --ready-fd 3)?$`)
	rotated = regexp.MustCompile(`/logs/.*\.log\.`)
	// Files that change as one are in a directory named for its time.
	written = regexp.MustCompile(`/\.\.\d{4}_[\d_.]+`)
	layer   = regexp.MustCompile(`/snapshots/\d+`)
	number  = regexp.MustCompile(`\d+`)
)

// count reads what server and keeper hold.
func (s *storm) count() count {
	s.t.Helper()
	c := count{descriptors: map[string]map[string]int{}, goroutines: map[string]int{}}
	for name, find := range map[string]func() (machine.Process, error){"server": s.Server, "keeper": s.Keeper} {
		p := s.find(name, find)
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.PID))
		if err != nil {
			s.t.Fatal(err)
		}
		kinds := map[string]int{}
		for _, f := range files {
			if to, err := os.Readlink(f); err == nil {
				kinds[number.ReplaceAllString(strings.TrimPrefix(to, s.Dir), "N")]++
			}
		}
		c.descriptors[name] = kinds
	}
	c.stacks = s.kubectl("get", "--raw", "/debug/pprof/goroutine?debug=1")
	n := 0
	if _, err := fmt.Sscanf(c.stacks, "goroutine profile: total %d", &n); err != nil {
		s.t.Fatalf("read the server's goroutines: %v in %.100s", err, c.stacks)
	}
	c.goroutines["server"] = n
	return c
}

// keeperDump kills the keeper so that it says what its goroutines do, and
// returns how many it had.
func (s *storm) keeperDump() int {
	s.t.Helper()
	log := filepath.Join(s.Dir, "keeper", "keeper.log")
	old, err := os.ReadFile(log)
	if err != nil {
		s.t.Fatal(err)
	}
	keeper := s.find("the keeper", s.Keeper)
	if err := syscall.Kill(keeper.PID, syscall.SIGQUIT); err != nil {
		s.t.Fatal(err)
	}
	s.until("the keeper's end", func() (bool, string) { return !keeper.Running(), "it runs" })
	dump, err := os.ReadFile(log)
	if err != nil {
		s.t.Fatal(err)
	}
	n := bytes.Count(dump[len(old):], []byte("\ngoroutine "))
	if n == 0 {
		s.t.Fatalf("the keeper did not say what it did: %s", dump[len(old):])
	}
	return n
}
