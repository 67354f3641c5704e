package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// stepping is a StatefulSet that is ready when its configuration says so.
const stepping = `apiVersion: v1
kind: ConfigMap
metadata: {name: step}
data: {step: "@"}
---
apiVersion: v1
kind: Secret
metadata: {name: token}
stringData: {token: "token of @"}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: member}
spec:
  replicas: 2
  selector: {matchLabels: {app: member}}
  template:
    metadata: {labels: {app: member}}
    spec:
      terminationGracePeriodSeconds: 0
      volumes: [{name: token, secret: {secretName: token}}]
      containers:
        - name: c
          image: busybox:1
          command: [sleep, 1h]
          env: [{name: STEP, valueFrom: {configMapKeyRef: {name: step, key: step}}}]
          volumeMounts: [{name: token, mountPath: /token}]
          readinessProbe: {exec: {command: [sh, -c, 'test "$STEP" != broken']}, periodSeconds: 1}
`

// A release of plain objects: configuration goes with it, a broken one goes
// back by itself, and a deployer that is killed leaves the old or the new.
func TestReleases(t *testing.T) {
	n := shared(t)
	ns := n.namespace("releases")
	file := filepath.Join(t.TempDir(), "stepping.yaml")
	up := func(step string, args ...string) machine.Result {
		t.Helper()
		if err := os.WriteFile(file, []byte(strings.ReplaceAll(stepping, "@", step)), 0o644); err != nil {
			t.Fatal(err)
		}
		return n.Tutti(append([]string{"up", file, "-n", ns}, args...)...)
	}
	t.Cleanup(func() { n.Tutti("down", "stepping") })
	runs := func(step string) {
		t.Helper()
		for _, pod := range []string{"member-0", "member-1"} {
			if got := n.kubectl("-n", ns, "exec", pod, "--", "sh", "-c", "echo $STEP; cat /token/token"); got != step+"\ntoken of "+step {
				t.Errorf("%s has %q, want step %s", pod, got, step)
			}
		}
	}
	if out := n.ok(up("one", "--dry-run")); !strings.Contains(out, "stepping can be deployed: the cluster takes all of its 3 objects.") {
		t.Errorf("a dry run says %s", out)
	}
	if names := n.kubectl("-n", ns, "get", "statefulset,secret", "-o", "name"); names != "" {
		t.Errorf("a dry run made %s", names)
	}
	complains(t, n.Tutti("history", "stepping"), 1, "no application stepping is deployed; `tutti status` lists what is")
	n.ok(up("one"))
	complains(t, n.Tutti("rollback", "stepping"), 1, "stepping has no earlier release; `tutti history stepping` lists those it has")
	complains(t, n.Tutti("rollback", "stepping", "9"), 1, "stepping has no release 9; `tutti history stepping` lists those it has")
	complains(t, n.Tutti("diff", "stepping", "x"), 2, "\"x\" is no number of a release; `tutti history APP` lists them")
	n.ok(up("one"))
	n.ok(up("two"))
	runs("two")
	if text := n.kubectl("-n", ns, "get", "release", "stepping-1", "-o", "yaml"); strings.Contains(text, "token of") {
		t.Error("a release tells its secrets")
	}
	if r := n.Kubectl("-n", ns, "patch", "release", "stepping-1", "--type=merge", "-p", `{"spec":{"app":"other"}}`); r.Err == nil || !strings.Contains(r.Stderr, "a release does not change") {
		t.Errorf("a release was changed: %v", r)
	}

	complains(t, up("broken", "--timeout", "10s"), 1, "release 3 of stepping failed, and release 2 is back: not ready in time: StatefulSet member")
	runs("two")

	// Killed when the new configuration is there and the members are not.
	ctx, kill := context.WithCancel(t.Context())
	if err := os.WriteFile(file, []byte(strings.ReplaceAll(stepping, "@", "broken")), 0o644); err != nil {
		t.Fatal(err)
	}
	ended := make(chan machine.Result, 1)
	go func() { ended <- machine.Finish(n.Command(ctx, n.Binary(), "up", file, "-n", ns), "") }()
	n.until("a member of the new revision", func() (bool, string) {
		s := n.field(ns, "statefulset/member", "{.status.currentRevision} {.status.updateRevision} {.status.updatedReplicas}")
		f := strings.Fields(s)
		return len(f) == 3 && f[0] != f[1] && f[2] != "0", s
	})
	kill()
	<-ended
	complains(t, n.Tutti("diff", "stepping", "9"), 1, "stepping has no release 9; `tutti history stepping` lists those it has")
	if text := n.ok(n.Tutti("history", "stepping")); !strings.Contains(text, "4        Deploying") {
		t.Errorf("the history of an interrupted deployment is %s", text)
	}
	n.ok(n.Tutti("rollback", "stepping"))
	runs("two")
	n.ok(up("three"))
	runs("three")
	n.ok(n.Tutti("rollback", "stepping", "1"))
	runs("one")
	n.ok(n.Tutti("down", "stepping"))
	if names := n.kubectl("-n", ns, "get", "release,secret,configmap", "-l", "tutti.dev/app=stepping", "-o", "name"); names != "" {
		t.Errorf("down left %s", names)
	}
}
