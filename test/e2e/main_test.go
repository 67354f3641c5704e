// Package e2e drives the real bin/tutti on throwaway machines, as a person
// would: by its commands, kubectl and HTTP.
package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// patience is how long a test waits for a fact that normally comes within
// seconds: CI's machines are small and busy.
var patience = 90 * time.Second

// node is a machine in the hands of one test: what fails, fails the test.
type node struct {
	*machine.Machine
	t *testing.T
}

var (
	sharedOnce    sync.Once
	sharedMachine *machine.Machine
	sharedErr     error
)

func TestMain(m *testing.M) {
	code := m.Run()
	if sharedMachine != nil {
		if err := sharedMachine.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "close the shared machine:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// shared returns the machine that tests share which do no harm to it, with
// tutti running and the image busybox:1.
func shared(t *testing.T) node {
	t.Helper()
	sharedOnce.Do(func() {
		if sharedMachine, sharedErr = machine.New(); sharedErr != nil {
			return
		}
		if sharedErr = sharedMachine.Up(); sharedErr != nil {
			return
		}
		sharedErr = importBusybox(sharedMachine)
	})
	if sharedErr != nil {
		if sharedMachine != nil {
			(node{sharedMachine, t}).logs()
		}
		t.Fatal(sharedErr)
	}
	n := node{sharedMachine, t}
	n.explainFailure()
	return n
}

// empty returns a machine of the test's own on which nothing runs yet.
func empty(t *testing.T) node {
	t.Helper()
	m, err := machine.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close the machine: %v", err)
		}
	})
	return node{m, t}
}

// running returns a machine of the test's own with tutti and busybox:1.
func running(t *testing.T) node {
	t.Helper()
	n := empty(t)
	n.explainFailure()
	n.up()
	if err := importBusybox(n.Machine); err != nil {
		t.Fatal(err)
	}
	return n
}

// up starts tutti and waits until it says that it is ready.
func (n node) up() {
	n.t.Helper()
	if err := n.Up(); err != nil {
		n.t.Fatal(err)
	}
}

// kill ends one of the machine's processes as nobody can prevent.
func (n node) kill(find func() (machine.Process, error)) {
	n.t.Helper()
	p, err := find()
	if err == nil {
		err = p.Kill()
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// explainFailure shows, if the test fails, what the machine says of itself.
func (n node) explainFailure() {
	n.t.Cleanup(func() {
		if !n.t.Failed() {
			return
		}
		n.logs()
		n.t.Log(n.Kubectl("get", "pods", "--all-namespaces", "-o", "wide", "--request-timeout=5s"))
		n.t.Log(tail(n.Kubectl("get", "events", "--all-namespaces", "--sort-by=.metadata.creationTimestamp", "--request-timeout=5s").String(), 30))
	})
}

func (n node) logs() {
	logs, _ := filepath.Glob(filepath.Join(n.Dir, "log", "*.log"))
	keepers, _ := filepath.Glob(filepath.Join(n.Dir, "keeper", "*.log"))
	for _, f := range append(logs, keepers...) {
		if data, err := os.ReadFile(f); err == nil {
			var lines strings.Builder
			for line := range strings.Lines(string(data)) {
				if !strings.Contains(line, "level=INFO") && !strings.Contains(line, "level=DEBUG") {
					lines.WriteString(line[:min(len(line), 500)])
				}
			}
			n.t.Logf("%s, without what is normal, ends with\n%s", filepath.Base(f), tail(lines.String(), 30))
		}
	}
}

func tail(text string, n int) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// ok returns what the program printed; it must have exited 0.
func (n node) ok(r machine.Result) string {
	n.t.Helper()
	if r.Err != nil {
		n.t.Fatal(r)
	}
	return r.Stdout
}

func (n node) kubectl(args ...string) string {
	n.t.Helper()
	return n.ok(n.Kubectl(args...))
}

// namespace makes a namespace that goes with the test.
func (n node) namespace(name string) string {
	n.t.Helper()
	n.kubectl("create", "namespace", name)
	n.t.Cleanup(func() { n.Kubectl("delete", "namespace", name, "--wait=false", "--request-timeout=10s") })
	n.kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	return name
}

// wait is kubectl wait.
func (n node) wait(namespace, object, condition string) {
	n.t.Helper()
	r := n.Kubectl("-n", namespace, "wait", object, "--for="+condition, fmt.Sprintf("--timeout=%v", patience))
	if r.Err != nil {
		n.t.Fatalf("%v\n%s", r, n.Kubectl("-n", namespace, "get", object, "-o", "yaml").Stdout)
	}
}

// field reads one field by its JSONPath.
func (n node) field(namespace, object, path string) string {
	n.t.Helper()
	return n.kubectl("-n", namespace, "get", object, "-o", "jsonpath="+path)
}

// until waits for a fact for which kubectl wait has no words.
func (n node) until(what string, f func() (done bool, state string)) {
	n.t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		done, state := f()
		if done {
			return
		}
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not after %v: %s", what, patience, state)
		}
	}
}

// leavesNothing waits until the machine has nothing that it had not before.
func (n node) leavesNothing(before []string) {
	n.t.Helper()
	n.until("nothing left", func() (bool, string) {
		after, err := n.State()
		if err != nil {
			n.t.Fatal(err)
		}
		var left []string
		count := map[string]int{}
		for _, l := range before {
			count[carried(l)]++
		}
		for _, l := range after {
			l = carried(l)
			// The group of all pods of a class stays.
			if count[l]--; count[l] < 0 && !strings.HasPrefix(l, "nft ") && !strings.HasSuffix(l, "/besteffort") && !strings.HasSuffix(l, "/burstable") {
				left = append(left, l)
			}
		}
		return len(left) == 0, strings.Join(left[:min(len(left), 20)], "\n")
	})
}

// carried takes from a link or route whether somebody is at its other end: a
// bridge without pods is none the less there.
func carried(line string) string {
	if strings.HasPrefix(line, "link ") {
		line, _, _ = strings.Cut(line, ": <")
	}
	return strings.TrimSuffix(line, " linkdown")
}

// importBusybox makes the image busybox:1.
func importBusybox(m *machine.Machine) error { return importImage(m, "busybox:1") }

// importImage makes an image of Debian's static busybox with these programs,
// each as name=file, beside its tools. Two at once make the same bytes.
func importImage(m *machine.Machine, name string, programs ...string) error {
	base := filepath.Join(filepath.Dir(m.Dir), strings.ReplaceAll(name, ":", "-"))
	script := `set -e
root=$1 archive=$1.tar
shift
mkdir -p "$root/bin" "$root/etc" "$root/tmp"
cp "$(command -v busybox)" "$root/bin/busybox"
for tool in $(busybox --list); do [ "$tool" = busybox ] || ln -s busybox "$root/bin/$tool"; done
for program; do cp "${program#*=}" "$root/bin/${program%%=*}"; done
printf '%s\n' root:x:0:0:root:/:/bin/sh user:x:1000:1000:user:/:/bin/sh >"$root/etc/passwd"
printf '%s\n' root:x:0: user:x:1000: extra:x:2000:user >"$root/etc/group"
chmod 1777 "$root/tmp"
tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$root" -cf "$archive" .
rm -rf "$root"`
	if out, err := exec.Command("sh", append([]string{"-c", script, "sh", base}, programs...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("make the image %s: %s: %w", name, out, err)
	}
	if r := m.Tutti("image", "import", base+".tar", name); r.Err != nil {
		return fmt.Errorf("import %s: %s", name, r)
	}
	return nil
}

// pod is a pod's manifest; spec is YAML, not indented.
func pod(namespace, name, spec string) string {
	return "apiVersion: v1\nkind: Pod\nmetadata:\n  name: " + name + "\n  namespace: " + namespace + "\n  labels:\n    app: " + name + "\nspec:\n" + indent(spec, "  ")
}

func indent(text, by string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.Trim(text, "\n") + "\n") {
		b.WriteString(by + line)
	}
	return b.String()
}

// decode reads JSON that a command printed.
func decode[T any](t *testing.T, text string) T {
	t.Helper()
	var v T
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v in %s", err, text)
	}
	return v
}
