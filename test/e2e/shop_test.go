package e2e

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// The example application, as its README promises it.
func TestShop(t *testing.T) {
	n := running(t)
	archives, err := filepath.Glob(filepath.Join(n.Repo, "dist/shop/*.tar"))
	if err != nil || len(archives) != 5 {
		t.Fatalf("want the shop's 5 images in dist/shop, have %q: run make images", archives)
	}
	for _, a := range archives {
		n.ok(n.Tutti("image", "load", a))
	}
	up := n.ok(n.Tutti("up", "examples/shop"))
	if !strings.Contains(up, ":30080") {
		t.Errorf("tutti up does not say where to look: %s", up)
	}
	const shop = "http://" + machine.IP + ":30080"
	world := n.OutsideClient()
	world.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }

	code, page := get(world, shop)
	key := regexp.MustCompile(`name="key" value="([^"]+-metronome)"`).FindStringSubmatch(page)
	if code != http.StatusOK || key == nil {
		t.Fatalf("the front answers %d %s", code, page)
	}
	for range 2 { // the second click of an impatient hand
		resp, err := world.PostForm(shop+"/buy", url.Values{"key": {key[1]}, "item": {"metronome"}})
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusSeeOther {
			t.Fatalf("buying answers %s", resp.Status)
		}
	}
	order := regexp.MustCompile(`<td>1</td><td>metronome</td><td>€ 39\.90</td><td>[\d:]+</td><td><span class="state (\w+)">`)
	shipped := func(page string) (bool, string) {
		found := order.FindStringSubmatch(page)
		return found != nil && found[1] == "shipped", page
	}
	n.until("the order, shipped", func() (bool, string) {
		_, page := get(world, shop)
		return shipped(page)
	})
	if _, page := get(world, shop); strings.Contains(page, "<td>2</td>") {
		t.Error("two clicks made two orders")
	}

	n.watch()
	if names := n.ok(n.Tutti("__complete", "down", "")); !strings.HasPrefix(names, "shop\n") {
		t.Errorf("down could be completed by %q", names)
	}

	first := n.field("shop", "pod/db-0", "{.metadata.uid}")
	n.kubectl("-n", "shop", "delete", "pod", "db-0", "--wait=false")
	n.until("another database", func() (bool, string) {
		uid := n.Kubectl("-n", "shop", "get", "pod/db-0", "-o", "jsonpath={.metadata.uid}").Stdout
		return uid != "" && uid != first, uid
	})
	n.wait("shop", "pod/db-0", "condition=Ready")
	n.until("the order again, from the new database", func() (bool, string) {
		code, page := get(world, shop)
		if code != http.StatusOK {
			return false, page
		}
		return shipped(page)
	})

	n.kubectl("-n", "shop", "create", "job", "--from=cronjob/report", "report-now")
	n.wait("shop", "job/report-now", "condition=Complete")
	if report := n.kubectl("-n", "shop", "logs", "job/report-now"); !regexp.MustCompile(`shipped \|\s+1 \|\s+3990`).MatchString(report) {
		t.Errorf("the report says %s", report)
	}

	status := decode[struct {
		Ready bool
		Apps  []struct{ Name string }
	}](t, n.ok(n.Tutti("status", "-o", "json")))
	if !status.Ready || len(status.Apps) == 0 {
		t.Errorf("status is %+v", status)
	}

	// Up again changes nothing: no pod is replaced.
	pods := func() string {
		return n.kubectl("-n", "shop", "get", "pods", "-l", "app.kubernetes.io/name in (front,orders,catalogue,db,worker)", "-o", "jsonpath={.items[*].metadata.uid}")
	}
	before := pods()
	n.ok(n.Tutti("up", "examples/shop"))
	if after := pods(); after != before {
		t.Errorf("up again replaced pods: %s, then %s", before, after)
	}

	n.ok(n.Tutti("down", "examples/shop"))
	n.until("the shop closed", func() (bool, string) {
		code, page := get(world, shop)
		return code == 0, page
	})
	if left := n.Kubectl("get", "deployments,statefulsets,cronjobs", "-n", "shop", "-o", "name").Stdout; left != "" {
		t.Errorf("down left %s", left)
	}
}

// While the front is replaced pod by pod, no customer is turned away.
func TestRollingUpdateLosesNoRequest(t *testing.T) {
	n := shared(t)
	ns := n.namespace("rolling")
	n.ok(n.Apply(`
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: rolling}
spec:
  replicas: 2
  strategy: {rollingUpdate: {maxUnavailable: 0, maxSurge: 1}}
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 5
      containers:
      - name: web
        image: busybox:1
        command: [httpd, -f, -p, '8080', -h, /etc]
        readinessProbe: {httpGet: {path: /group, port: 8080}, periodSeconds: 1}
        lifecycle: {preStop: {sleep: {seconds: 2}}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: rolling}
spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 31081}]}
`))
	n.wait(ns, "deployment/web", "condition=Available")
	const web = "http://" + machine.IP + ":31081/group"
	world := n.OutsideClient()
	n.until("an answer", func() (bool, string) {
		code, body := get(world, web)
		return code == http.StatusOK, body
	})
	const rounds = 5
	rolled := make(chan error, 1)
	go func() {
		for round := range rounds {
			for _, step := range [][]string{
				{"set", "env", "deployment/web", fmt.Sprintf("ROUND=%d", round)},
				{"rollout", "status", "deployment/web", "--timeout=90s"},
			} {
				if r := n.Kubectl(append([]string{"-n", ns}, step...)...); r.Err != nil {
					rolled <- errors.New(r.String())
					return
				}
			}
		}
		// The last of the old pods end only now.
		for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			r := n.Kubectl("-n", ns, "get", "pods", "-o", "name")
			if r.Err == nil && len(strings.Fields(r.Stdout)) == 2 {
				break
			}
			if time.Now().After(deadline) {
				rolled <- fmt.Errorf("the old pods do not go: %s", r)
				return
			}
		}
		rolled <- nil
	}()
	asked, failed := 0, []string{}
	customers := time.NewTicker(20 * time.Millisecond)
	defer customers.Stop()
	for done := false; !done; {
		select {
		case err := <-rolled:
			if err != nil {
				t.Fatal(err)
			}
			done = true
		case <-customers.C:
			asked++
			if code, body := get(world, web); code != http.StatusOK {
				failed = append(failed, body)
			}
		}
	}
	if asked < 50 || len(failed) > 0 {
		t.Errorf("of %d requests %d failed: %q", asked, len(failed), failed)
	}
}
