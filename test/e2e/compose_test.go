package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// composed has a server with two replicas, what it depends on, and files.
const composed = `name: composed
services:
  web:
    image: busybox:1
    command: ["sh", "-c", "cat /run/secrets/token /etc/rules >/tmp/index.html; echo $$GREETING >>/tmp/index.html; exec httpd -f -p 5000 -h /tmp"]
    ports: ["18080:5000", "127.0.0.1:18081:5000"]
    stop_grace_period: 2s
    environment: {GREETING: "${GREETING:-hello}"}
    secrets: [token]
    configs: [{source: rules, target: /etc/rules}]
    depends_on:
      db: {condition: service_healthy}
      migrate: {condition: service_completed_successfully}
    deploy: {replicas: 2}
    networks: {default: {aliases: [www]}}
    healthcheck: {test: ["CMD-SHELL", "nc 127.0.0.1 5000 </dev/null"], interval: 200ms}
  db:
    image: busybox:1
    command: ["sh", "-c", "test -e /tables/made || date +%s%N >/data/born; exec httpd -f -p 6379 -h /data"]
    volumes: ["data:/data", "/tables"]
    stop_grace_period: 0s
    healthcheck: {test: ["CMD", "test", "-e", "/data/born"], interval: 200ms}
  migrate:
    image: busybox:1
    command: ["sh", "-c", "for name in db www; do until nslookup $$name.composed.svc.cluster.local | grep ^Name; do sleep 0.1; done; done >/dev/null; echo made"]
    depends_on: [db]
volumes: {data: }
secrets: {token: {environment: TOKEN}}
configs: {rules: {content: "a rule\n"}}
`

// A compose file runs as it is: order, health, names, volumes, files and
// ports; a change rolls out without losing a request.
func TestCompose(t *testing.T) {
	n := shared(t)
	dir := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("compose.yaml", composed)
	write(".env", "TOKEN=a token\nGREETING=from .env")
	t.Cleanup(func() {
		n.Tutti("down", dir)
		n.Kubectl("delete", "namespace", "composed", "--ignore-not-found", "--timeout=60s")
	})
	up := n.ok(n.Tutti("up", dir))
	if !strings.Contains(up, machine.IP+":18080") || !strings.Contains(up, "127.0.0.1:18081") {
		t.Errorf("tutti up does not say where to look: %s", up)
	}
	if log := n.kubectl("-n", "composed", "logs", "job/migrate"); log != "made\n" {
		t.Errorf("migrate says %q", log)
	}
	const outside = "http://" + machine.IP + ":18080"
	for where, c := range map[string]*http.Client{outside: n.OutsideClient(), "http://127.0.0.1:18080": n.Client(), "http://127.0.0.1:18081": n.Client()} {
		if code, page := get(c, where); code != http.StatusOK || page != "a tokena rule\nfrom .env\n" {
			t.Errorf("%s answers %d %q", where, code, page)
		}
	}
	if resp, err := n.OutsideClient().Get("http://" + machine.IP + ":18081"); err == nil {
		resp.Body.Close()
		t.Error("a port of 127.0.0.1 is open to others")
	}
	born := n.kubectl("-n", "composed", "exec", "deployment/db", "--", "cat", "/data/born")

	// Another greeting, another secret, another database's pod.
	lost := n.load(outside)
	write(".env", "TOKEN=another\nGREETING=changed")
	n.ok(n.Tutti("up", dir))
	requests, failures := lost()
	if failures != "" || requests == 0 {
		t.Errorf("of %d requests some were lost in the update: %s", requests, failures)
	}
	n.until("the second release answers", func() (bool, string) {
		_, page := get(n.OutsideClient(), outside)
		return page == "anothera rule\nchanged\n", page
	})
	if got := n.kubectl("-n", "composed", "exec", "deployment/db", "--", "cat", "/data/born"); got != born {
		t.Errorf("the volume had %s and has %s", born, got)
	}

	// Each deployment is a release; one that fails leaves no trace but itself.
	write("compose.yaml", strings.Replace(composed, "nc 127.0.0.1 5000", "false", 1))
	lost = n.load(outside)
	r := n.Tutti("up", dir, "--timeout", "10s")
	if r.Err == nil || !strings.Contains(r.Stderr, "release 3 of composed failed, and release 2 is back: not ready in time: Deployment web (1 of 2 updated") {
		t.Errorf("a release that fails: %v", r)
	}
	if requests, failures := lost(); failures != "" || requests == 0 {
		t.Errorf("of %d requests some were lost in the failure: %s", requests, failures)
	}
	n.ok(n.Tutti("rollback", "composed", "1"))
	// What was there before may answer until it has been drained.
	n.until("the first release answers", func() (bool, string) {
		_, page := get(n.OutsideClient(), outside)
		return page == "a tokena rule\nfrom .env\n", page
	})
	history := strings.Fields(n.ok(n.Tutti("history", "composed")))
	if text := strings.Join(history, " "); !strings.Contains(text, "1 Replaced") || !strings.Contains(text, "2 Replaced") || !strings.Contains(text, "3 Failed") || !strings.Contains(text, "4 Deployed") {
		t.Errorf("the history is %s", text)
	}
	if diff := n.ok(n.Tutti("diff", "composed", "2")); !strings.Contains(diff, "-          value: changed\n+          value: from .env\n") || strings.Contains(diff, "another") {
		t.Errorf("the releases differ by %s", diff)
	}
	exported := n.ok(n.Tutti("export", "composed"))
	n.ok(n.Apply(strings.ReplaceAll(exported, "composed", "composed-elsewhere")))
	n.wait("composed-elsewhere", "deployment/db", "condition=Available")
	n.kubectl("delete", "namespace", "composed-elsewhere", "--timeout=60s") // it wants the same ports

	// What is taken is told, and nothing is led astray.
	const thief = "name: thief\nservices:\n  web: {image: 'busybox:1', command: [sleep, '1000'], stop_grace_period: 0s, ports: ['18080:80', '10250:80']}\n"
	write("compose.yaml", thief)
	t.Cleanup(func() {
		n.Tutti("down", "thief")
		n.Kubectl("delete", "namespace", "thief", "--ignore-not-found", "--timeout=60s")
	})
	if r := n.Tutti("up", dir, "--timeout", "20s"); r.Err == nil || !strings.Contains(r.Stderr, "is Service composed/web-published's; choose another") {
		t.Errorf("two have one port: %v", r)
	}
	n.ok(n.Tutti("down", "composed"))
	write("compose.yaml", strings.Replace(composed, "echo made", "exit 3", 1))
	const failed = "compose.yaml: Deployment web: waits for Job migrate, which has failed (BackoffLimitExceeded: Job has reached the specified backoff limit); `tutti status` says why"
	if r := n.Tutti("up", dir); r.Err == nil || !strings.Contains(r.Stderr, failed) {
		t.Errorf("what others wait for has failed: %v", r)
	}
	n.ok(n.Tutti("down", "composed"))
	write("compose.yaml", thief)
	if r := n.Tutti("up", dir, "--timeout", "20s"); r.Err == nil || !strings.Contains(r.Stderr, "a program of this machine listens on port 10250 (TCP); choose another, or stop it") {
		t.Errorf("the agent's port was given away: %v", r)
	}
}

// load asks a server again and again, each time by a new connection, until the
// returned function is called, which tells how often and what went wrong.
func (n node) load(url string) func() (requests int, failures string) {
	client := n.OutsideClient()
	client.Transport.(*http.Transport).DisableKeepAlives = true
	ctx, cancel := context.WithCancel(n.t.Context())
	var count atomic.Int64
	failed := make(chan string, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			resp, err := client.Get(url)
			if err == nil {
				_, err = io.Copy(io.Discard, resp.Body)
				resp.Body.Close()
				if err == nil && resp.StatusCode != http.StatusOK {
					err = fmt.Errorf("status %s", resp.Status)
				}
			}
			count.Add(1)
			if err != nil {
				select {
				case failed <- err.Error():
				default:
				}
			}
		}
	}()
	return func() (int, string) {
		cancel()
		<-done
		select {
		case f := <-failed:
			return int(count.Load()), f
		default:
			return int(count.Load()), ""
		}
	}
}
