package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// podKind is a pod that needs no help: it is created, waited for, and looked
// at.
type podKind struct {
	name   string
	spec   string
	until  string            // what kubectl wait waits for
	logs   string            // regular expression for the log of container main
	fields map[string]string // JSONPath → regular expression for its value
}

var podKinds = []podKind{
	{
		name:   "exit-0",
		spec:   one(`command: [sh, -c, "echo done"]`),
		until:  "jsonpath={.status.phase}=Succeeded",
		logs:   "^done\n$",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.reason}": "^Completed$"},
	},
	{
		name:  "exit-7",
		spec:  one(`command: [sh, -c, "exit 7"]`),
		until: "jsonpath={.status.phase}=Failed",
		fields: map[string]string{
			"{.status.containerStatuses[0].state.terminated.exitCode}": "^7$",
			"{.status.containerStatuses[0].state.terminated.reason}":   "^Error$",
		},
	},
	{
		name: "killed",
		// Kubernetes makes one dollar of two.
		spec:   one(`command: [sh, -c, "sleep 0.1; kill -KILL $$$$; sleep 100"]`) + "shareProcessNamespace: true\n",
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.exitCode}": "^137$"},
	},
	{
		name:  "no-such-program",
		spec:  one(`command: [/no/such/program]`),
		until: "jsonpath={.status.phase}=Failed",
		fields: map[string]string{
			"{.status.containerStatuses[0].state.terminated.reason}":  "^(StartError|ContainerCannotRun)$",
			"{.status.containerStatuses[0].state.terminated.message}": "/no/such/program",
		},
	},
	{
		name:   "out-of-memory",
		spec:   one("command: [tail, /dev/zero]\nresources: {limits: {memory: 24Mi}}"),
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.reason}": "^OOMKilled$"},
	},
	{
		name: "init-in-order",
		spec: `
restartPolicy: Never
volumes: [{name: shared, emptyDir: {}}]
initContainers:
- {name: first, image: "busybox:1", command: [sh, -c, "echo first >>/shared/f"], volumeMounts: [{name: shared, mountPath: /shared}]}
- {name: second, image: "busybox:1", command: [sh, -c, "echo second >>/shared/f"], volumeMounts: [{name: shared, mountPath: /shared}]}
containers:
- {name: main, image: "busybox:1", command: [cat, /shared/f], volumeMounts: [{name: shared, mountPath: /shared}]}
`,
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^first\nsecond\n$",
	},
	{
		name: "init-fails",
		spec: `
restartPolicy: Never
initContainers:
- {name: first, image: "busybox:1", command: [sh, -c, "exit 3"]}
containers:
- {name: main, image: "busybox:1", command: [sh, -c, "echo never"]}
`,
		until: "jsonpath={.status.phase}=Failed",
		fields: map[string]string{
			"{.status.initContainerStatuses[0].state.terminated.exitCode}": "^3$",
			"{.status.containerStatuses[0].state.waiting.reason}":          "^PodInitializing$",
		},
	},
	{
		name: "sidecar",
		spec: `
restartPolicy: Never
terminationGracePeriodSeconds: 5
volumes: [{name: shared, emptyDir: {medium: Memory}}]
initContainers:
- name: side
  image: busybox:1
  restartPolicy: Always
  command: [sh, -c, "touch /shared/up; trap 'exit 0' TERM; while :; do sleep 0.1; done"]
  startupProbe: {exec: {command: [test, -e, /shared/up]}, periodSeconds: 1}
  volumeMounts: [{name: shared, mountPath: /shared}]
containers:
- {name: main, image: "busybox:1", command: [sh, -c, "test -e /shared/up && echo side is up"], volumeMounts: [{name: shared, mountPath: /shared}]}
`,
		until:  "jsonpath={.status.phase}=Succeeded",
		logs:   "^side is up\n$",
		fields: map[string]string{"{.status.initContainerStatuses[0].restartCount}": "^0$"},
	},
	{
		name: "environment",
		spec: one(`
command: [sh, -c, "echo $PLAIN $EXPANDED $NAME $IP $CONFIG $SECRET $LIMIT $ALL_word $(PLAIN)"]
resources: {limits: {memory: 32Mi}}
envFrom: [{prefix: ALL_, configMapRef: {name: settings}}]
env:
- {name: PLAIN, value: plain}
- {name: EXPANDED, value: "<$(PLAIN)>"}
- {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
- {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
- {name: CONFIG, valueFrom: {configMapKeyRef: {name: settings, key: word}}}
- {name: SECRET, valueFrom: {secretKeyRef: {name: secrets, key: word}}}
- {name: LIMIT, valueFrom: {resourceFieldRef: {resource: limits.memory}}}`),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `^plain <plain> environment 10\.42\.\d+\.\d+ from-config from-secret 33554432 from-config plain\n$`,
	},
	{
		name: "volumes",
		spec: `
restartPolicy: Never
securityContext: {fsGroup: 2000}
volumes:
- {name: config, configMap: {name: settings}}
- {name: secret, secret: {secretName: secrets, defaultMode: 0400}}
- {name: memory, emptyDir: {medium: Memory}}
- name: all
  projected:
    sources:
    - {configMap: {name: settings, items: [{key: word, path: deep/word}]}}
    - {downwardAPI: {items: [{path: name, fieldRef: {fieldPath: metadata.name}}]}}
    - {serviceAccountToken: {path: token, audience: somebody}}
    - {secret: {name: secrets, items: [{key: word, path: secret}]}}
containers:
- name: main
  image: busybox:1
  command:
  - sh
  - -ec
  - |
    cat /config/word /secret/word /single /all/deep/word /all/secret /all/name; echo
    stat -L -c %a /secret/word
    touch /memory/x; grep -c ' /memory tmpfs' /proc/mounts
    cut -d. -f2 /all/token | tr -d '\n' >/memory/t; test -s /memory/t
    stat -c %g /memory
    ! touch /config/x 2>/dev/null
    test -s /var/run/secrets/kubernetes.io/serviceaccount/token
  volumeMounts:
  - {name: config, mountPath: /config, readOnly: true}
  - {name: config, mountPath: /single, subPath: word}
  - {name: secret, mountPath: /secret}
  - {name: memory, mountPath: /memory}
  - {name: all, mountPath: /all}
`,
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `^from-configfrom-secretfrom-configfrom-configfrom-secretvolumes\n4[04]0\n1\n2000\n$`,
		fields: map[string]string{
			`{.status.containerStatuses[0].volumeMounts[?(@.mountPath=="/config")].recursiveReadOnly}`: "^Disabled$",
		},
	},
	{
		name: "restricted",
		spec: `
restartPolicy: Never
securityContext: {runAsUser: 1000, runAsGroup: 1000, supplementalGroups: [3000], runAsNonRoot: true, seccompProfile: {type: RuntimeDefault}}
containers:
- name: main
  image: busybox:1
  command: [sh, -c, "id -u; id -g; id -G; grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status; touch /x 2>/dev/null || echo read-only"]
  securityContext: {allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
`,
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `(?s)^1000\n1000\n1000 (2000 3000|3000 2000)\nCapEff:\t0{16}\nNoNewPrivs:\t1\nSeccomp:\t2\nread-only\n$`,
	},
	{
		name:   "root-refused",
		spec:   one("command: [id]\nsecurityContext: {runAsNonRoot: true}"),
		until:  "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CreateContainerConfigError",
		fields: map[string]string{"{.status.containerStatuses[0].state.waiting.message}": "root"},
	},
	{
		name:   "config-missing",
		spec:   one("command: [id]\nenv: [{name: X, valueFrom: {configMapKeyRef: {name: nowhere, key: x}}}]"),
		until:  "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CreateContainerConfigError",
		fields: map[string]string{"{.status.containerStatuses[0].state.waiting.message}": "nowhere"},
	},
	{
		name:   "image-missing",
		spec:   "restartPolicy: Never\ncontainers: [{name: main, image: 'localhost:1/nobody/nothing:1'}]",
		until:  "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ImagePullBackOff",
		fields: map[string]string{"{.status.containerStatuses[0].state.waiting.message}": "localhost:1/nobody/nothing:1"},
	},
	{
		name:   "image-never-pulled",
		spec:   "restartPolicy: Never\ncontainers: [{name: main, image: 'nobody/nothing:1', imagePullPolicy: Never}]",
		until:  "jsonpath={.status.containerStatuses[0].state.waiting.reason}=ErrImageNeverPull",
		fields: map[string]string{"{.status.phase}": "^Pending$"},
	},
	{
		name:   "back-off",
		spec:   restarting(one(`command: [sh, -c, "exit 1"]`)),
		until:  "jsonpath={.status.containerStatuses[0].state.waiting.reason}=CrashLoopBackOff",
		fields: map[string]string{"{.status.containerStatuses[0].lastState.terminated.exitCode}": "^1$"},
	},
	{
		name:   "liveness",
		spec:   restarting(one("command: [sleep, '1000']\nlivenessProbe: {exec: {command: ['false']}, periodSeconds: 1, failureThreshold: 2}")) + "terminationGracePeriodSeconds: 1\n",
		until:  "jsonpath={.status.containerStatuses[0].lastState.terminated.exitCode}=137",
		fields: map[string]string{"{.status.containerStatuses[0].restartCount}": "^[1-9]"},
	},
	{
		name:  "http-and-tcp-probes",
		spec:  restarting(one("command: [httpd, -f, -p, '8080', -h, /etc]\nports: [{name: web, containerPort: 8080}]\nreadinessProbe: {httpGet: {path: /group, port: web}, periodSeconds: 1}\nlivenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}\nstartupProbe: {tcpSocket: {port: web}, periodSeconds: 1}")),
		until: "condition=Ready",
	},
	{
		name:   "termination-message",
		spec:   one(`command: [sh, -c, "echo because >/dev/termination-log; exit 1"]`),
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.message}": "^because\n?$"},
	},
	{
		name:   "deadline",
		spec:   one("command: [sleep, '1000']") + "activeDeadlineSeconds: 1\nterminationGracePeriodSeconds: 1\n",
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.reason}": "^DeadlineExceeded$"},
	},
	{
		name: "restart-all",
		spec: `
restartPolicy: Never
volumes: [{name: d, emptyDir: {}}]
initContainers:
- {name: first, image: "busybox:1", command: [sh, -c, "echo round >>/d/rounds"], volumeMounts: [{name: d, mountPath: /d}]}
containers:
- name: main
  image: busybox:1
  command: [sh, -c, "test $(wc -l </d/rounds) = 2 || exit 42; echo second round"]
  restartPolicy: Never
  restartPolicyRules: [{action: RestartAllContainers, exitCodes: {operator: In, values: [42]}}]
  volumeMounts: [{name: d, mountPath: /d}]
- name: other
  image: busybox:1
  command: [sh, -c, "until test $(wc -l </d/rounds) = 2; do sleep 0.1; done"]
  volumeMounts: [{name: d, mountPath: /d}]
`,
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^second round\n$",
		fields: map[string]string{
			"{.status.initContainerStatuses[0].restartCount}":                   "^1$",
			`{.status.containerStatuses[?(@.name=="main")].restartCount}`:       "^1$",
			`{.status.conditions[?(@.type=="AllContainersRestarting")].status}`: "^False$",
		},
	},
	{
		name:   "pod-out-of-memory",
		spec:   one("command: [tail, /dev/zero]") + "resources: {limits: {memory: 24Mi}}\n",
		until:  "jsonpath={.status.phase}=Failed",
		fields: map[string]string{"{.status.containerStatuses[0].state.terminated.reason}": "^OOMKilled$"},
	},
	{
		name: "ephemeral-volume",
		spec: one("command: [sh, -c, 'echo kept >/d/f; cat /d/f']\nvolumeMounts: [{name: d, mountPath: /d}]") +
			"volumes: [{name: d, ephemeral: {volumeClaimTemplate: {spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}}}}]\n",
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^kept\n$",
	},
	{
		name:  "working-directory",
		spec:  one("command: [pwd]\nworkingDir: /etc"),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  "^/etc\n$",
	},
	{
		name:  "full-hostname",
		spec:  one("command: [hostname]") + "hostname: box\nsubdomain: web\nsetHostnameAsFQDN: true\n",
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `^box\.web\.pod-kinds\.svc\.cluster\.local\n$`,
	},
	{
		name:  "overridden-hostname",
		spec:  one("command: [hostname]") + "hostnameOverride: shop.example.com\n",
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `^shop\.example\.com\n$`,
	},
	{
		name:  "hosts-and-hostname",
		spec:  one(`command: [sh, -c, "hostname; grep -c hosts-and-hostname /etc/hosts; grep -E '^search' /etc/resolv.conf"]`),
		until: "jsonpath={.status.phase}=Succeeded",
		logs:  `^hosts-and-hostname\n1\nsearch pod-kinds\.svc\.cluster\.local svc\.cluster\.local cluster\.local.*\n$`,
	},
}

// one is the specification of a pod with one container, main, of busybox; its
// other fields are YAML, not indented.
func one(fields string) string {
	return "restartPolicy: Never\ncontainers:\n- name: main\n  image: busybox:1\n" + indent(fields, "  ")
}

// restarting makes the containers of a specification restart.
func restarting(spec string) string {
	return strings.Replace(spec, "restartPolicy: Never", "restartPolicy: Always", 1)
}

func TestPodKinds(t *testing.T) {
	n := shared(t)
	ns := n.namespace("pod-kinds")
	n.kubectl("-n", ns, "create", "configmap", "settings", "--from-literal=word=from-config")
	n.kubectl("-n", ns, "create", "secret", "generic", "secrets", "--from-literal=word=from-secret")
	n.try(ns, podKinds)
}

// try creates all pods at once and then looks at each.
func (n node) try(ns string, kinds []podKind) {
	n.t.Helper()
	var all []string
	for _, k := range kinds {
		all = append(all, pod(ns, k.name, k.spec))
	}
	n.ok(n.Apply(strings.Join(all, "---\n")))
	for _, k := range kinds {
		n.t.Run(k.name, func(t *testing.T) {
			n := node{n.Machine, t}
			n.wait(ns, "pod/"+k.name, k.until)
			if k.logs != "" {
				if logs := n.kubectl("-n", ns, "logs", k.name, "-c", "main"); !regexp.MustCompile(k.logs).MatchString(logs) {
					t.Errorf("log is %q, want %s", logs, k.logs)
				}
			}
			for path, want := range k.fields {
				if got := n.field(ns, "pod/"+k.name, path); !regexp.MustCompile(want).MatchString(got) {
					t.Errorf("%s is %q, want %s", path, got, want)
				}
			}
		})
	}
}

func TestReadinessFollowsItsProbe(t *testing.T) {
	n := shared(t)
	ns := n.namespace("readiness")
	n.ok(n.Apply(pod(ns, "gate", one("command: [sleep, '1000']\nreadinessProbe: {exec: {command: [test, -e, /tmp/open]}, periodSeconds: 1}")+
		"terminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/gate", "jsonpath={.status.containerStatuses[0].started}=true")
	if ready := n.field(ns, "pod/gate", "{.status.containerStatuses[0].ready}"); ready != "false" {
		t.Errorf("ready is %q before the probe ever succeeded", ready)
	}
	n.kubectl("-n", ns, "exec", "gate", "--", "touch", "/tmp/open")
	n.wait(ns, "pod/gate", "condition=Ready")
	n.kubectl("-n", ns, "exec", "gate", "--", "rm", "/tmp/open")
	n.wait(ns, "pod/gate", "condition=Ready=false")
}

func TestLogs(t *testing.T) {
	n := shared(t)
	ns := n.namespace("logs")
	n.ok(n.Apply(pod(ns, "talk", restarting(one(
		`command: [sh, -c, "for i in 1 2 3 4 5; do echo line $i; sleep 0.3; done; echo to stderr >&2; exit 1"]`)))))
	n.wait(ns, "pod/talk", "jsonpath={.status.containerStatuses[0].started}=true")
	followed := n.kubectl("-n", ns, "logs", "-f", "talk")
	if want := "line 1\nline 2\nline 3\nline 4\nline 5\nto stderr\n"; !strings.HasPrefix(followed, want) {
		t.Errorf("followed %q, want %q", followed, want)
	}
	n.until("a restart", func() (bool, string) {
		count := n.field(ns, "pod/talk", "{.status.containerStatuses[0].restartCount}")
		return count != "0", count + " restarts"
	})
	if last := n.kubectl("-n", ns, "logs", "--previous", "--tail=1", "talk"); last != "to stderr\n" {
		t.Errorf("the previous log ends with %q", last)
	}
	stamped := n.kubectl("-n", ns, "logs", "--previous", "--timestamps", "talk")
	if !regexp.MustCompile(`(?m)^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\S* line 1$`).MatchString(stamped) {
		t.Errorf("no time in %q", stamped)
	}
}

func TestExec(t *testing.T) {
	n := shared(t)
	ns := n.namespace("exec")
	n.ok(n.Apply(pod(ns, "box", one("command: [sleep, '1000']")+"terminationGracePeriodSeconds: 0\n")))
	n.wait(ns, "pod/box", "condition=Ready")
	if r := n.Kubectl("-n", ns, "exec", "box", "--", "sh", "-c", "echo out; echo err >&2; exit 5"); r.Code != 5 || r.Stdout != "out\n" || !strings.HasPrefix(r.Stderr, "err\n") {
		t.Errorf("%v", r)
	}
	big := strings.Repeat("0123456789abcdef", 1<<14)
	if r := n.RunInput(patience, big, n.Binary(), "kubectl", "-n", ns, "exec", "-i", "box", "--", "cat"); r.Stdout != big {
		t.Errorf("%d of %d bytes came back: %v", len(r.Stdout), len(big), r.Err)
	}
	if r := n.Kubectl("-n", ns, "exec", "box", "--", "/no/such"); r.Err == nil {
		t.Error("a program that is not there was run")
	}
}

func TestTermination(t *testing.T) {
	n := shared(t)
	ns := n.namespace("termination")
	for _, c := range []struct {
		name, spec   string
		least, limit time.Duration
	}{
		{"polite", one(`command: [sh, -c, "trap 'exit 0' TERM; while :; do sleep 0.1; done"]`) + "terminationGracePeriodSeconds: 60\n", 0, 20 * time.Second},
		{"deaf", one(`command: [sh, -c, "trap '' TERM; while :; do sleep 0.1; done"]`) + "terminationGracePeriodSeconds: 3\n", 3 * time.Second, 20 * time.Second},
		{"hooked", one("command: [sh, -c, \"trap 'exit 0' TERM; while :; do sleep 0.1; done\"]\nlifecycle: {preStop: {exec: {command: [sleep, '3']}}}") +
			"terminationGracePeriodSeconds: 60\n", 3 * time.Second, 20 * time.Second},
	} {
		n.ok(n.Apply(pod(ns, c.name, c.spec)))
		n.wait(ns, "pod/"+c.name, "condition=Ready")
		begin := time.Now()
		n.kubectl("-n", ns, "delete", "pod", c.name, fmt.Sprintf("--timeout=%v", patience))
		if took := time.Since(begin); took < c.least || took > c.limit {
			t.Errorf("%s took %v, want %v to %v", c.name, took, c.least, c.limit)
		}
	}
}

// A ConfigMap's volume follows the ConfigMap, all files at once.
func TestConfigMapFollows(t *testing.T) {
	n := shared(t)
	ns := n.namespace("follow")
	n.kubectl("-n", ns, "create", "configmap", "c", "--from-literal=word=old")
	n.ok(n.Apply(pod(ns, "reader", one("command: [sleep, '1000']\nvolumeMounts: [{name: c, mountPath: /c}]")+
		"terminationGracePeriodSeconds: 0\nvolumes: [{name: c, configMap: {name: c}}]\n")))
	n.wait(ns, "pod/reader", "condition=Ready")
	n.kubectl("-n", ns, "patch", "configmap", "c", "-p", `{"data":{"word":"new"}}`)
	n.until("the new word in the volume", func() (bool, string) {
		word := n.kubectl("-n", ns, "exec", "reader", "--", "cat", "/c/word")
		return word == "new", word
	})
}
