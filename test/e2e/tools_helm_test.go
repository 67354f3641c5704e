package e2e

import (
	"context"
	"debug/elf"
	"encoding/base64"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// helm is one of the helms at work in a namespace of its own. It knows the
// cluster by KUBECONFIG alone.
type helm struct {
	node
	namespace string
	program   string
	home      string
	// atomic is the flag that undoes what failed, validate the one that asks
	// the cluster about a template.
	atomic, validate string
}

// TestHelm drives the real helm 3 and helm 4, side by side, through charts
// shaped like those that people install.
func TestHelm(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if file, err := elf.Open(self); err != nil {
		t.Fatal(err)
	} else if libraries, _ := file.ImportedLibraries(); len(libraries) > 0 {
		t.Fatal("this program goes into an image: build it with CGO_ENABLED=0, as make does")
	}
	n := shared(t)
	kubectl := filepath.Join(n.Repo, "dist", "tools", "kubectl")
	if _, err := os.Stat(kubectl); err != nil {
		t.Fatalf("run make tools: %v", err)
	}
	for name, program := range map[string]string{"kubectl:1": "kubectl=" + kubectl, "gate:1": "gate=" + self} {
		if err := importImage(n.Machine, name, program); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { n.kubectl("delete", "crd", "plots.garden.example", "--ignore-not-found", "--timeout=20s") })
	for _, version := range []struct{ name, atomic, validate string }{
		{"helm3", "--atomic", "--validate"},
		{"helm4", "--rollback-on-failure", "--dry-run=server"},
	} {
		t.Run(version.name, func(t *testing.T) {
			t.Parallel()
			h := helm{
				node: node{n.Machine, t}, program: filepath.Join(n.Repo, "dist", "tools", version.name), home: t.TempDir(),
				atomic: version.atomic, validate: version.validate,
			}
			if _, err := os.Stat(h.program); err != nil {
				t.Fatalf("run make tools: %v", err)
			}
			h.namespace = h.node.namespace(version.name)
			h.sub("database and web", helm.databaseAndWeb)
			h.sub("operator", helm.operator)
			h.sub("umbrella", helm.umbrella)
			h.sub("webhook", helm.webhook)
			h.sub("registry", helm.registry)
		})
	}
}

// sub runs a part of the test.
func (h helm) sub(name string, f func(helm)) {
	h.t.Run(name, func(t *testing.T) {
		h.t = t
		f(h)
	})
}

func chart(name string) string { return filepath.Join("test", "e2e", "testdata", "charts", name) }

// helm runs the program.
func (h helm) helm(args ...string) machine.Result { return h.input("", args...) }

func (h helm) input(input string, args ...string) machine.Result {
	ctx, cancel := context.WithTimeout(context.Background(), 2*patience)
	defer cancel()
	cmd := h.Command(ctx, h.program, append(args, "--namespace", h.namespace)...)
	cmd.Env = append(cmd.Env, "KUBECONFIG="+filepath.Join(h.Dir, "admin.kubeconfig"), "HOME="+h.home)
	r := machine.Finish(cmd, input)
	h.t.Logf("%.1f s: %s %s", r.Took.Seconds(), filepath.Base(h.program), strings.Join(args, " "))
	return r
}

// do runs a command of helm that must succeed.
func (h helm) do(args ...string) string {
	h.t.Helper()
	return h.ok(h.helm(args...))
}

// says runs a command of helm that must succeed and print all of this.
func (h helm) says(want []string, args ...string) {
	h.t.Helper()
	contains(h.t, strings.Join(args, " "), h.do(args...), want...)
}

// refuses runs a command of helm that must fail and explain itself so.
func (h helm) refuses(want string, args ...string) {
	h.t.Helper()
	r := h.helm(args...)
	if r.Err == nil {
		h.t.Fatalf("succeeded: %v", r)
	}
	contains(h.t, strings.Join(args, " "), r.Stderr, want)
}

func contains(t *testing.T, what, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Fatalf("%s: no %q in\n%s", what, w, got)
		}
	}
}

// get is field in helm's namespace, without a failure when there is none.
func (h helm) get(object, path string) string {
	return h.Kubectl("-n", h.namespace, "get", object, "-o", "jsonpath="+path, "--ignore-not-found").Stdout
}

// address is where a Service answers on the machine itself.
func (h helm) address(service string) string {
	h.t.Helper()
	return "http://" + h.field(h.namespace, "service/"+service, "{.spec.clusterIP}")
}

// revisions compares a release's history.
func (h helm) revisions(release string, want ...string) {
	h.t.Helper()
	type revision struct {
		Revision int
		Status   string
	}
	var got []string
	for _, r := range decode[[]revision](h.t, h.do("history", release, "-o", "json")) {
		got = append(got, fmt.Sprintf("%d %s", r.Revision, r.Status))
	}
	if strings.Join(got, ", ") != strings.Join(want, ", ") {
		h.t.Fatalf("history of %s: %q, not %q", release, got, want)
	}
}

// rows asks the ledger of a release for its rows and, with a row, adds it.
func (h helm) rows(release, row string) string {
	h.t.Helper()
	password, err := base64.StdEncoding.DecodeString(h.field(h.namespace, "secret/"+release+"-ledger", "{.data.password}"))
	if err != nil {
		h.t.Fatal(err)
	}
	address, method := h.address(release+"-ledger"), http.MethodGet
	h.until("the database answers", func() (bool, string) {
		code, got := get(h.Client(), address+"/edition")
		return code == http.StatusOK, got
	})
	if row != "" {
		method = http.MethodPost
	}
	request, err := http.NewRequest(method, address+"/cgi-bin/rows", strings.NewReader(row))
	if err != nil {
		h.t.Fatal(err)
	}
	request.SetBasicAuth("clerk", string(password))
	answer, err := h.Client().Do(request)
	if err != nil {
		h.t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		h.t.Fatalf("rows of %s: %s %s %v", release, answer.Status, body, err)
	}
	return string(body)
}

// databaseAndWeb installs a database, which keeps its rows and its password
// whatever happens to its release, and an application that migrates it.
func (h helm) databaseAndWeb() {
	t, ledger := h.t, chart("ledger")
	h.refuses("port", "install", "db", ledger, "--set", "port=80")
	h.says([]string{"kind: StatefulSet", "kind: PodDisruptionBudget"}, "template", "db", ledger, h.validate)
	h.says([]string{"STATUS: deployed", "Rows of db are at"}, "install", "db", ledger, "--wait", "--timeout=90s")
	h.says([]string{"STATUS: deployed"}, "status", "db")
	h.rows("db", "one")
	h.says([]string{"Phase:          Succeeded", "the ledger answers"}, "test", "db", "--logs", "--timeout=90s")

	// New pods, the same rows; and so it is on the way back.
	h.do("upgrade", "db", ledger, "--set", "edition=second", "--reuse-values", "--wait", "--timeout=90s")
	for i := range 2 {
		got := h.kubectl("-n", h.namespace, "exec", fmt.Sprintf("db-ledger-%d", i), "--", "cat", "/tmp/www/edition", "/data/journal")
		if got != "second\nfirst stopped\n" {
			t.Errorf("member %d after the upgrade: %q", i, got)
		}
	}
	h.rows("db", "two")
	h.do("rollback", "db", "1", "--wait", "--timeout=90s")
	h.shows("first\n", h.address("db-ledger")+"/edition")
	if got := h.rows("db", "three"); got != "one\ntwo\nthree\n" {
		t.Errorf("rows after the rollback: %q", got)
	}
	h.revisions("db", "1 superseded", "2 superseded", "3 deployed")
	h.says([]string{`"edition":"second"`}, "get", "values", "db", "--revision=2", "-o", "json")
	h.web()

	// What was removed comes back with its rows.
	h.do("uninstall", "db", "--wait", "--timeout=90s")
	h.refuses("not found", "status", "db")
	if left := h.kubectl("-n", h.namespace, "get", "pods,statefulsets,services", "-l", "app.kubernetes.io/instance=db", "-o", "name"); left != "" {
		t.Errorf("left after the removal: %s", left)
	}
	h.do("upgrade", "--install", "db", ledger, "--set", "replicas=1", "--wait", "--timeout=90s")
	if got := h.rows("db", ""); !strings.HasPrefix(got, "one\ntwo\nthree\n") {
		t.Errorf("rows of the database that came back: %q", got)
	}
	h.do("uninstall", "db")
}

// web installs an application on that database, changes it while somebody
// reads it, and has changes fail.
func (h helm) web() {
	t, storefront := h.t, chart("storefront")
	with := func(values string) []string {
		return []string{storefront, "--set", "database.release=db," + values, "--wait", "--timeout=90s"}
	}
	rows := h.rows("db", "")
	// A migration that fails leaves no release behind.
	h.refuses("pre-install", append([]string{"install", "web", h.atomic}, with("broken.migration=true")...)...)
	if left := h.kubectl("-n", h.namespace, "get", "deployments,services,hpa,ingresses", "-o", "name"); strings.Contains(left, "web-storefront") {
		t.Errorf("left of what failed: %s", left)
	}
	h.do(append([]string{"upgrade", "--install", "web"}, with("greeting=hello")...)...)
	page := h.address("web-storefront")
	h.shows("hello", page)
	if got := h.field(h.namespace, "ingress/web-storefront", "{.spec.rules[0].host}"); got != "shop.example" {
		t.Errorf("the Ingress is for %q", got)
	}

	seen := h.read(page)
	h.do(append([]string{"upgrade", "web"}, with("greeting=goodbye,schema=2")...)...)
	h.refuses("deadline", "upgrade", "web", storefront, "--reuse-values", "--set", "greeting=never,broken.pods=true", h.atomic, "--timeout=10s")
	h.refuses("pre-upgrade", append([]string{"upgrade", "web", h.atomic}, with("broken.migration=true")...)...)
	h.do("rollback", "web", "1", "--wait", "--timeout=90s")
	// The chart says no number: at least two is the autoscaler's.
	h.until("the pods that the autoscaler wants", func() (bool, string) {
		got := h.field(h.namespace, "deployment/web-storefront", "{.spec.replicas} {.status.readyReplicas}")
		return got == "2 2" || got == "3 3", got
	})
	pages := seen()
	if got := strings.Join(slices.Compact(slices.Sorted(slices.Values(pages))), ", "); got != "goodbye, hello" || pages[len(pages)-1] != "hello" {
		t.Errorf("readers saw %q", pages)
	}
	// Each pod started after the migration that it needs. How often some of
	// them did is the autoscaler's business.
	got := slices.Compact(strings.Split(strings.TrimPrefix(h.rows("db", ""), rows), "\n"))
	if want := "schema 1, hello started, schema 2, goodbye started, schema 2, never started, "; !strings.HasPrefix(strings.Join(got, ", "), want) {
		t.Errorf("the database saw %q, not at first %q", got, want)
	}
	h.revisions("web", "1 superseded", "2 superseded", "3 failed", "4 superseded", "5 failed", "6 superseded", "7 deployed")
	h.do("uninstall", "web", "--wait", "--timeout=90s")
}

// operator installs a program that owns a kind and acts on its objects.
func (h helm) operator() {
	t, gardener := h.t, chart("gardener")
	h.says([]string{"kind: CustomResourceDefinition"}, "template", "garden", gardener, "--include-crds")
	h.do("install", "garden", gardener, "--wait", "--timeout=90s")
	planted := func(plot, want string) {
		t.Helper()
		h.until("the operator plants "+want, func() (bool, string) {
			got := h.get("configmap/plot-"+plot, "{.data.planted}") + ", " + h.get("plot/"+plot, "{.status.phase}")
			return got == want+", Planted", got
		})
	}
	planted("garden-first", "3 rows of beans")
	r := h.RunInput(patience, strings.Replace(plot, "CROP", "stones", 1), h.Binary(), "kubectl", "-n", h.namespace, "apply", "-f", "-")
	if r.Err == nil || !strings.Contains(r.Stderr, `supported values: "beans", "peas"`) {
		t.Errorf("a Plot against its schema: %v", r)
	}
	h.ok(h.RunInput(patience, strings.Replace(plot, "CROP", "peas", 1), h.Binary(), "kubectl", "-n", h.namespace, "apply", "-f", "-"))
	planted("second", "5 rows of peas")
	// The hook's Plot is made anew, which the operator must let happen.
	h.do("upgrade", "garden", gardener, "--set", "first.crop=peas", "--wait", "--timeout=90s")
	planted("garden-first", "3 rows of peas")
	h.do("rollback", "garden", "1", "--wait", "--timeout=90s")
	h.says([]string{"kind: Plot"}, "get", "hooks", "garden")
	h.do("uninstall", "garden", "--wait", "--timeout=90s")
	if left := h.kubectl("-n", h.namespace, "get", "plots", "-o", "name"); left != "" {
		t.Errorf("left by the hook that removes them: %s", left)
	}
	h.until("what belonged to the Plots is gone", func() (bool, string) {
		left := h.kubectl("-n", h.namespace, "get", "configmaps", "-o", "name")
		return !strings.Contains(left, "plot-"), left
	})
}

const plot = `{apiVersion: garden.example/v1, kind: Plot, metadata: {name: second}, spec: {crop: CROP, rows: 5}}`

// umbrella installs a chart of charts whose Jobs are waited for.
func (h helm) umbrella() {
	t, market := h.t, chart("market")
	h.says([]string{"kit", "accounts"}, "dependency", "list", market)
	h.do("install", "square", market, "--wait", "--wait-for-jobs", "--timeout=90s", "--labels", "season=spring")
	h.says([]string{`"name":"square"`, `"status":"deployed"`}, "list", "--selector", "season=spring", "-o", "json")
	h.shows("apples of Riverside\n", h.address("square-fruit")+":8000")
	h.shows("rolls of Riverside\n", h.address("square-bread")+":8000")
	log := func(job, want string) {
		t.Helper()
		if got := h.kubectl("-n", h.namespace, "logs", "job/"+job); !strings.HasSuffix(got, want) {
			t.Errorf("Job %s says %q, not %q", job, got, want)
		}
	}
	log("square-accounts-1", "apples of Riverside\n")
	h.kubectl("-n", h.namespace, "create", "job", "by-hand", "--from=cronjob/square-accounts")
	h.wait(h.namespace, "job/by-hand", "condition=Complete")
	// Another season: a condition, a tag and a value of all change.
	h.do("upgrade", "square", market, "--reset-then-reuse-values", "--set", "bread.enabled=false,tags.seasonal=true,global.town=Hilltop",
		"--wait", "--wait-for-jobs", "--timeout=90s")
	h.shows("apples of Hilltop\n", h.address("square-fruit")+":8000")
	log("square-accounts-2", "apples of Hilltop\n")
	if got := h.kubectl("-n", h.namespace, "get", "deployments,configmaps,jobs", "-o", "name"); strings.Contains(got, "square-bread") ||
		strings.Contains(got, "square-accounts-1") || !strings.Contains(got, "square-fair") {
		t.Errorf("after the upgrade there is %s", got)
	}
	h.do("uninstall", "square", "--keep-history", "--timeout=90s")
	log("square-pre-delete", "apples of Hilltop\n")
	log("square-post-delete", "the market is over\n")
	h.revisions("square", "1 superseded", "2 uninstalled")
	// Even so it can come back.
	h.do("rollback", "square", "1", "--wait", "--wait-for-jobs", "--timeout=90s")
	h.shows("rolls of Riverside\n", h.address("square-bread")+":8000")
	h.kubectl("-n", h.namespace, "delete", "job", "square-pre-delete", "square-post-delete")
	h.do("uninstall", "square", "--cascade=foreground", "--wait", "--timeout=90s")
}

// webhook installs one that the API server asks, with a certificate that the
// chart made.
func (h helm) webhook() {
	t, gate := h.t, chart("gate")
	create := func(name, color string) machine.Result {
		return h.Apply(fmt.Sprintf("{apiVersion: v1, kind: ConfigMap, metadata: {name: %s, namespace: %s, labels: {gate: closed}}, data: {color: %s}}", name, h.namespace, color))
	}
	h.do("install", "city", gate, "--wait", "--timeout=90s")
	h.until("a stamp from the gate", func() (bool, string) {
		r := create("blue", "blue")
		return r.Err == nil && h.get("configmap/blue", "{.data.stamp}") == "passed", r.String()
	})
	if r := create("red", "red"); r.Err == nil || !strings.Contains(r.Stderr, "nothing red passes the gate") {
		t.Errorf("red: %v", r)
	}
	// With the old certificate, so without a gap.
	h.do("upgrade", "city", gate, "--set", "failurePolicy=Ignore", "--wait", "--timeout=90s")
	if r := create("red", "red"); r.Err == nil || !strings.Contains(r.Stderr, "nothing red passes the gate") {
		t.Errorf("red after the upgrade: %v", r)
	}
	h.do("uninstall", "city", "--wait", "--timeout=90s")
	h.ok(create("red", "red"))
}

// registry keeps charts in the cluster's own registry and installs an agent
// of nodes from there.
func (h helm) registry() {
	t := h.t
	authority := filepath.Join(h.home, "ca.crt")
	if err := os.WriteFile(authority, []byte(h.field(h.namespace, "configmap/kube-root-ca.crt", `{.data.ca\.crt}`)), 0o600); err != nil {
		t.Fatal(err)
	}
	trust := "--ca-file=" + authority
	name, repository := filepath.Base(h.program), "oci://"+registryHost+"/"+h.namespace
	for _, version := range []string{"1.0.0", "1.1.0"} {
		h.do("package", chart("nodewatch"), "--version="+version, "--destination="+h.home)
	}
	first, second := filepath.Join(h.home, "nodewatch-1.0.0.tgz"), filepath.Join(h.home, "nodewatch-1.1.0.tgz")
	h.refuses("basic credential not found", "push", first, repository, trust)
	login := func(token string) machine.Result {
		return h.input(token, "registry", "login", registryHost, "--username=token", "--password-stdin", trust)
	}
	if r := login("word"); r.Err == nil {
		t.Errorf("any word is a password: %v", r)
	}
	token := h.token(h.namespace, "publisher", "edit")
	h.until("login by role edit", func() (bool, string) { r := login(token); return r.Err == nil, r.String() })
	for _, archive := range []string{first, second} {
		if r := h.helm("push", archive, repository, trust); r.Err != nil || !strings.Contains(r.Stdout+r.Stderr, "Digest: sha256:") {
			t.Fatal(r)
		}
	}
	h.says([]string{"version: 1.1.0"}, "show", "chart", repository+"/nodewatch", trust)
	h.do("pull", repository+"/nodewatch", "--version=1.0.0", "--untar", "--untardir="+filepath.Join(h.home, "pulled"), trust)

	// An agent on the node, seen from outside of it.
	port := map[string]string{"helm3": "19103", "helm4": "19104"}[name]
	metrics := "http://" + machine.IP + ":" + port + "/cgi-bin/metrics"
	h.do("install", "watch", repository+"/nodewatch", "--version=~1.0", trust, "--set", "port="+port, "--wait", "--timeout=90s")
	memory := regexp.MustCompile(`(?m)^MemTotal: +(\d+) kB`).FindStringSubmatch(h.ok(h.Run(patience, "cat", "/proc/meminfo")))
	if memory == nil {
		t.Fatal("the machine does not say how much memory it has")
	}
	exports := func(prefix string) {
		t.Helper()
		h.until("figures of "+prefix, func() (bool, string) {
			_, got := get(h.OutsideClient(), metrics)
			var load float64
			var bytes int
			_, err := fmt.Sscanf(got, prefix+"_load1 %f\n"+prefix+"_memory_total_bytes %d\n", &load, &bytes)
			return err == nil && fmt.Sprint(bytes/1024) == memory[1], got
		})
	}
	exports("node")
	if _, got := get(h.Client(), h.address("watch-nodewatch")+":9100/cgi-bin/metrics"); !strings.Contains(got, "node_load1") {
		t.Errorf("by its Service the agent says %q", got)
	}
	h.do("upgrade", "watch", repository+"/nodewatch", trust, "--reuse-values", "--set", "prefix=host", "--wait", "--timeout=90s")
	h.says([]string{"nodewatch-1.1.0"}, "list")
	exports("host")
	h.do("rollback", "watch", "--wait", "--timeout=90s")
	exports("node")

	// A chart of somebody else's depends on it.
	stack := filepath.Join(h.home, "stack")
	if err := os.MkdirAll(stack, 0o755); err != nil {
		t.Fatal(err)
	}
	text := "apiVersion: v2\nname: stack\nversion: 0.1.0\ndependencies:\n- {name: nodewatch, version: 1.x, repository: \"" + repository + "\"}\n"
	if err := os.WriteFile(filepath.Join(stack, "Chart.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	h.do("dependency", "update", stack, trust)
	h.says([]string{"kind: DaemonSet"}, "template", "watch", stack)
	h.do("uninstall", "watch", "--wait", "--timeout=90s")
	if left := h.kubectl("get", "priorityclass", h.namespace+"-watch-nodewatch", "--ignore-not-found", "-o", "name"); left != "" {
		t.Errorf("left after the removal: %s", left)
	}
	h.do("registry", "logout", registryHost)
	h.refuses("basic credential not found", "pull", repository+"/nodewatch", trust)
}

// shows waits for a page: a pod that is ready is behind its Service in the
// next moment.
func (h helm) shows(want, page string) {
	h.t.Helper()
	h.until(page, func() (bool, string) {
		_, got := get(h.Client(), page)
		return got == want, got
	})
}

// read reads a page all the time, until the function is called that returns
// the different ones it was, in their order.
func (h helm) read(page string) (seen func() []string) {
	done, result := make(chan struct{}), make(chan []string)
	go func() {
		var pages []string
		for {
			code, got := get(h.Client(), page)
			if code != http.StatusOK {
				got = fmt.Sprint(code, got)
			}
			pages = slices.Compact(append(pages, got))
			select {
			case <-done:
				result <- pages
				return
			case <-time.After(10 * time.Millisecond):
			}
		}
	}()
	return func() []string { close(done); return <-result }
}
