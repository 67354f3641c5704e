package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"maps"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// importTool makes an image of one static program of dist/tools.
func (n node) importTool(name, image string) {
	n.t.Helper()
	if _, err := os.Stat(filepath.Join(n.Repo, "dist", "tools", name)); err != nil {
		n.t.Fatalf("run make tools: %v", err)
	}
	n.ok(n.Run(2*time.Minute, "sh", "-c", `tar -C dist/tools -c "$1" | bin/tutti image import - "$2"`, "sh", name, image))
}

// servingCertificate makes a certificate for a name, signed by itself: the
// certificate is its own authority.
func servingCertificate(t *testing.T, name string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

func website(version, namespace, name, spec string) string {
	return fmt.Sprintf("apiVersion: tests.tutti.dev/%s\nkind: Website\nmetadata: {name: %s, namespace: %s}\nspec: {%s}\n", version, name, namespace, spec)
}

// An operator built with controller-runtime owns a resource: schema, CEL,
// webhooks in its pods, conversion, status, scale, children, finalizer, leader.
func TestOperator(t *testing.T) {
	n := shared(t)
	n.importTool("operator", "operator:1")
	ns := n.namespace("operator")
	host := "operator." + ns + ".svc"
	certificate, key := servingCertificate(t, host)
	n.ok(n.Apply(fmt.Sprintf("apiVersion: v1\nkind: Secret\ntype: kubernetes.io/tls\nmetadata: {name: operator-certs, namespace: %s}\ndata: {tls.crt: %s, tls.key: %s}\n",
		ns, base64.StdEncoding.EncodeToString(certificate), base64.StdEncoding.EncodeToString(key))))
	manifest, err := os.ReadFile(filepath.Join(n.Repo, "test", "tools", "operator", "deploy.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		// The objects have a finalizer that only the operator removes, and the namespace waits for them.
		n.Kubectl("delete", "mutatingwebhookconfiguration/tests-operator", "validatingwebhookconfiguration/tests-operator", "--ignore-not-found")
		n.Kubectl("-n", ns, "delete", "websites", "--all", "--timeout=20s")
		n.Kubectl("delete", "crd/websites.tests.tutti.dev", "clusterrole/tests-operator", "clusterrolebinding/tests-operator", "--timeout=20s")
	})
	n.ok(n.Apply(strings.NewReplacer("NAMESPACE", ns, "AUTHORITY", base64.StdEncoding.EncodeToString(certificate)).Replace(string(manifest))))
	n.wait(ns, "crd/websites.tests.tutti.dev", "condition=Established")
	n.wait(ns, "deployment/operator", "condition=Available")
	n.wait(ns, "deployment/operator", "jsonpath={.status.readyReplicas}=2")

	// What is refused, by whom, in which words.
	n.ok(n.Apply(website("v1", ns, "hello", "greeting: hello")))
	for _, c := range []struct{ what, spec, want string }{
		{"schema: unknown field", "greeting: hi, colour: red", `unknown field "spec.colour"`},
		{"schema: length", "tier: plain", "spec.greeting in body should be at least 1 chars long"},
		{"schema: minimum", "greeting: hi, replicas: -1", "should be greater than or equal to 0"},
		{"schema: enum", "greeting: hi, tier: golden", `Unsupported value: "golden"`},
		{"schema: pattern", "greeting: <b>", "should match '^[^<>]*$'"},
		{"CEL", "greeting: hi, replicas: 4", "replicas must be at most maxReplicas"},
		{"webhook", "greeting: hello", `admission webhook "validate.tests.tutti.dev" denied the request: the greeting "hello" is taken by hello`},
	} {
		if r := n.Apply(website("v1", ns, "other", c.spec)); r.Err == nil || !strings.Contains(r.Stderr, c.want) {
			t.Errorf("%s: %v, want %q", c.what, r, c.want)
		}
	}
	if r := n.Kubectl("-n", ns, "patch", "website", "hello", "--type=merge", "-p", `{"spec":{"tier":"fancy"}}`); r.Err == nil || !strings.Contains(r.Stderr, "tier cannot be changed") {
		t.Errorf("CEL on a change: %v", r)
	}
	if r := n.Apply(website("v1", ns, "slow", "greeting: slowly, tier: fancy, replicas: 0")); r.Err != nil || !strings.Contains(r.Stderr, "Warning: fancy pages are slow") {
		t.Errorf("a warning of the webhook: %v", r)
	}

	// Defaults of the schema and of the webhook, the status, the children, what is printed.
	n.wait(ns, "website/hello", "condition=Ready")
	if got := n.field(ns, "website/hello", "{.spec.tier} {.spec.replicas} {.spec.maxReplicas} {.spec.title} {.status.readyReplicas} {.status.selector}"); got != "plain 1 3 hello 1 website=hello" {
		t.Errorf("defaults and status: %q", got)
	}
	if by := n.field(ns, "website/hello", `{.metadata.annotations.tests\.tutti\.dev/defaulted-by}`); !strings.HasPrefix(by, "operator-") {
		t.Errorf("defaulted by %q", by)
	}
	n.until("an event", func() (bool, string) {
		r := n.Kubectl("-n", ns, "events", "--for", "website/hello")
		return strings.Contains(r.Stdout, "1 pods serve the page"), r.String()
	})
	if got := strings.Fields(n.kubectl("-n", ns, "get", "web", "hello")); !slices.Equal(got, []string{"NAME", "TIER", "WANTED", "READY", "hello", "plain", "1", "1"}) {
		t.Errorf("kubectl get: %q", got)
	}
	if got := n.kubectl("-n", ns, "get", "websites", "-o", "name", "--field-selector=spec.tier=fancy"); got != "website.tests.tutti.dev/slow\n" {
		t.Errorf("chosen by a field: %q", got)
	}
	if got := n.kubectl("explain", "website.spec.greeting"); !strings.Contains(got, "What the page says.") {
		t.Errorf("kubectl explain: %q", got)
	}
	n.kubectl("-n", ns, "scale", "website/hello", "--replicas=2")
	n.wait(ns, "website/hello", "jsonpath={.status.readyReplicas}=2")

	// Another version of it, there and back.
	old := n.Kubectl("-n", ns, "get", "websites.v1beta1.tests.tutti.dev/hello", "-o", "jsonpath={.apiVersion} {.spec.text}")
	if old.Stdout != "tests.tutti.dev/v1beta1 hello" || !strings.Contains(old.Stderr, "v1beta1 Website is old") {
		t.Errorf("converted: %v", old)
	}
	n.ok(n.Apply(website("v1beta1", ns, "ancient", "text: ave, replicas: 0")))
	if got := n.field(ns, "website/ancient", "{.apiVersion} {.spec.greeting}"); got != "tests.tutti.dev/v1 ave" {
		t.Errorf("converted: %q", got)
	}
	if r := n.Apply(website("v1beta1", ns, "never", "text: inconvertible")); r.Err == nil || !strings.Contains(r.Stderr, "this text cannot be a greeting") {
		t.Errorf("a conversion that fails: %v", r)
	}

	// Children are repaired.
	n.kubectl("-n", ns, "patch", "configmap", "hello", "--type=merge", "-p", `{"data":{"index.html":"spoiled"}}`)
	n.wait(ns, "configmap/hello", `jsonpath={.data.index\.html}=hello: hello`)
	uid := n.field(ns, "deployment/hello", "{.metadata.uid}")
	n.kubectl("-n", ns, "delete", "deployment", "hello")
	n.until("another Deployment", func() (bool, string) {
		r := n.Kubectl("-n", ns, "get", "deployment/hello", "-o", "jsonpath={.metadata.uid}")
		return r.Err == nil && r.Stdout != uid, r.String()
	})
	n.wait(ns, "website/hello", "condition=Ready")

	// The leader is killed; another leads and does the work.
	leader := func() string {
		holder := n.field(ns, "lease/websites.tests.tutti.dev", "{.spec.holderIdentity}")
		pod, _, _ := strings.Cut(holder, "_")
		return pod
	}
	first := leader()
	n.kubectl("-n", ns, "delete", "pod", first, "--grace-period=0", "--force")
	n.kubectl("-n", ns, "patch", "website", "hello", "--type=merge", "-p", `{"spec":{"greeting":"hello again"}}`)
	n.wait(ns, "configmap/hello", `jsonpath={.data.index\.html}=hello: hello again`)
	if second := leader(); second == first || !strings.HasPrefix(second, "operator-") {
		t.Errorf("%s leads after %s was killed", second, first)
	}

	// Removal: the webhook may refuse it, the finalizer comes first, the children go.
	n.kubectl("-n", ns, "annotate", "website", "hello", "tests.tutti.dev/keep=yes")
	if r := n.Kubectl("-n", ns, "delete", "website", "hello"); r.Err == nil || !strings.Contains(r.Stderr, "hello is to be kept") {
		t.Errorf("a removal that the webhook refuses: %v", r)
	}
	n.kubectl("-n", ns, "annotate", "website", "hello", "tests.tutti.dev/keep-")
	n.kubectl("-n", ns, "delete", "website", "hello", "--timeout=60s")
	if got := n.field(ns, "configmap/farewell-hello", "{.data.greeting}"); got != "hello again" {
		t.Errorf("what the finalizer left: %q", got)
	}
	for _, child := range []string{"configmap/hello", "deployment/hello"} {
		n.wait(ns, child, "delete")
	}
	n.until("no pods of the page", func() (bool, string) {
		r := n.Kubectl("-n", ns, "get", "pods", "-l", "website=hello", "-o", "name")
		return r.Err == nil && r.Stdout == "", r.String()
	})
}

// output is what a running program has printed so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// follower is a program of client-go's informers in its own process on the
// machine: what it has printed, and how to tell it to end.
func (n node) follower(ctx context.Context, args ...string) (said *output, end func()) {
	n.t.Helper()
	cmd := n.Command(ctx, filepath.Join(n.Repo, "dist", "tools", "operator"), args...)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+filepath.Join(n.Dir, "admin.kubeconfig"))
	said = &output{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	return said, func() {
		n.t.Helper()
		if err := syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM); err != nil {
			n.t.Error(err)
		}
		cmd.Wait() // ends with its pipes: what it was entered by dies of the signal, the program does not
	}
}

// followed replays what an informer's handlers were told: its objects and their
// contents. What is told of an object must fit what was told before.
func followed(t *testing.T, text string) map[string]string {
	t.Helper()
	objects := map[string]string{}
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			break // its rest is still to come
		}
		f := append(strings.Fields(line), "")
		_, known := objects[f[1]]
		switch f[0] {
		case "added", "changed":
			if known != (f[0] == "changed") {
				t.Errorf("unexpectedly %s", line)
			}
			objects[f[1]] = f[2]
		case "deleted":
			if !known {
				t.Errorf("unexpectedly %s", line)
			}
			delete(objects, f[1])
		}
	}
	return objects
}

// Informers of client-go, on the machine and in a pod, miss nothing while tutti
// is killed, and leadership stays where it is; lists in pages are of one
// moment; watches get bookmarks.
func TestInformers(t *testing.T) {
	n := running(t)
	n.importTool("operator", "operator:1")
	const ns = "informers"
	n.kubectl("create", "namespace", ns)
	n.kubectl("-n", ns, "wait", "--for=create", "serviceaccount/default", "--timeout=60s")
	n.kubectl("-n", ns, "create", "rolebinding", "follows", "--clusterrole=admin", "--serviceaccount="+ns+":default")
	n.kubectl("-n", ns, "create", "role", "leads", "--verb=*", "--resource=leases.coordination.k8s.io")
	n.kubectl("-n", ns, "create", "rolebinding", "leads", "--role=leads", "--serviceaccount="+ns+":default")

	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	outside, end := n.follower(ctx, "-namespace="+ns, "-identity=outside", "follow")
	n.until("a leader", func() (bool, string) { s := outside.String(); return strings.Contains(s, "\nleading\n"), s })
	n.ok(n.Apply(pod(ns, "follower", "containers: [{name: main, image: 'operator:1', command: [/operator, -namespace="+ns+", -identity=inside, follow]}]\nrestartPolicy: Never\n")))
	inside := func() string { return n.Kubectl("-n", ns, "logs", "follower").Stdout }
	n.until("a follower in a pod", func() (bool, string) { s := inside(); return strings.Contains(s, "\nleader outside\n"), s })
	for who, s := range map[string]string{"a kubeconfig": outside.String(), "the pod's service account": inside()} {
		if !strings.HasPrefix(s, "by "+who+" to https://") {
			t.Errorf("%q, want %s", s, who)
		}
	}

	// Changes right before the end of the server, and right after its return.
	object := func(i, round int) string {
		return fmt.Sprintf("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m%02d, namespace: %s}\ndata: {round: r%d}\n---\n", i, ns, round)
	}
	var before, after strings.Builder
	for i := range 30 {
		before.WriteString(object(i, 1))
	}
	for i := 20; i < 50; i++ {
		after.WriteString(object(i, 2))
	}
	n.ok(n.Apply(before.String()))
	n.kill(n.Server)
	n.up()
	n.ok(n.Apply(after.String()))
	n.kubectl("-n", ns, "delete", "configmap", "m00", "m10", "m20", "m30")

	want := map[string]string{}
	for line := range strings.Lines(n.kubectl("-n", ns, "get", "configmaps", "-o", `jsonpath={range .items[*]}{.metadata.name} {.data.round}{"\n"}{end}`)) {
		name, round, _ := strings.Cut(strings.TrimSpace(line), " ")
		want[name] = round
	}
	if len(want) != 47 { // with the authority's
		t.Fatalf("%d objects: %v", len(want), want)
	}
	for who, said := range map[string]func() string{"outside": outside.String, "in a pod": inside} {
		n.until("all changes seen "+who, func() (bool, string) {
			s := said()
			return maps.Equal(followed(t, s), want), s
		})
		s := said()
		for i := range 50 {
			if !strings.Contains(s, fmt.Sprintf("added m%02d ", i)) {
				t.Errorf("%s: m%02d was never seen", who, i)
			}
		}
		if strings.Contains(s, "not leading") {
			t.Errorf("%s: leadership was lost:\n%s", who, s)
		}
	}

	// The leader goes and says so: the other leads at once.
	end()
	if s := outside.String(); !strings.HasSuffix(s, "\nnot leading\n") {
		t.Errorf("the follower did not end well:\n%s", s)
	}
	n.until("the pod leads", func() (bool, string) { s := inside(); return strings.Contains(s, "\nleading\n"), s })

	r := n.Run(time.Minute, "env", "KUBECONFIG="+filepath.Join(n.Dir, "admin.kubeconfig"), "dist/tools/operator", "-namespace="+ns, "list")
	for _, line := range []string{"3 pages, 47 items", "initial bookmark after 49 items", "a bookmark of a newer version"} {
		if !strings.Contains(n.ok(r), "\n"+line+"\n") {
			t.Errorf("no %q in %v", line, r)
		}
	}
}

// The Python client creates, lists, watches, executes, reads logs and forwards
// ports; what it does and checks is in its program.
func TestPythonClient(t *testing.T) {
	n := shared(t)
	ns := n.namespace("python")
	r := n.Run(patience, "env", "KUBECONFIG="+filepath.Join(n.Dir, "admin.kubeconfig"), "/usr/bin/python3", "test/tools/pyclient/client.py", ns)
	if !strings.HasSuffix(r.Stdout, "\ndone\n") || r.Err != nil {
		t.Fatal(r)
	}
}

// A webhook for everything whose server has gone stops people, with a message
// that names it, but not the start of the machine: it can be removed.
func TestUnreachableWebhook(t *testing.T) {
	n := running(t)
	n.ok(n.Apply(`
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingWebhookConfiguration
metadata: {name: everything}
webhooks:
- name: everything.tests.tutti.dev
  admissionReviewVersions: [v1]
  sideEffects: None
  clientConfig: {service: {namespace: default, name: gone}}
  rules: [{apiGroups: ["*"], apiVersions: ["*"], operations: ["*"], resources: ["*/*"]}]
`))
	refused := func() (bool, string) {
		r := n.Kubectl("create", "namespace", "refused", "--dry-run=server")
		return r.Err != nil && strings.Contains(r.Stderr, `failed calling webhook "everything.tests.tutti.dev"`), r.String()
	}
	n.until("the webhook is in force", refused)
	n.kill(n.Server)
	n.up()
	if is, state := refused(); !is {
		t.Errorf("after the start: %s", state)
	}
	n.kubectl("delete", "validatingwebhookconfiguration", "everything")
	n.until("what was refused is not any more", func() (bool, string) {
		r := n.Kubectl("create", "namespace", "accepted")
		return r.Err == nil, r.String()
	})
}
