package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

const ownKind = `
apiVersion: v1
kind: Namespace
metadata: {name: own}
---
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: widgets.own.example}
spec:
  group: own.example
  names: {kind: Widget, plural: widgets}
  scope: Namespaced
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}
---
apiVersion: own.example/v1
kind: Widget
metadata: {name: w, namespace: own}
---
apiVersion: batch/v1
kind: Job
metadata: {name: j, namespace: own}
spec: {template: {spec: {restartPolicy: Never, containers: [{name: c, image: "busybox:1", command: [echo, one]}]}}}
`

// An application that defines a kind, has one of it, and goes again with both.
func TestApplicationWithItsOwnKind(t *testing.T) {
	n := shared(t)
	// A kind that was there before is learned of late: whoever watched it
	// tries again after a while.
	ownKind := strings.ReplaceAll(ownKind, "own.example", fmt.Sprintf("own%d.example", time.Now().UnixNano()))
	up := func(text string) string {
		return n.ok(n.RunInput(time.Minute, text, n.Binary(), "up", "-", "--name", "own", "--timeout", "40s"))
	}
	up(ownKind)
	if again := up(ownKind); !strings.Contains(again, "Widget w: unchanged") || !strings.Contains(again, "Job j: unchanged") {
		t.Errorf("nothing changed, but up says %s", again)
	}
	up(strings.Replace(ownKind, "[echo, one]", "[echo, two]", 1)) // a Job's template is fixed: it is made anew
	if log := n.kubectl("logs", "-n", "own", "job/j"); strings.TrimSpace(log) != "two" {
		t.Errorf("the Job says %q", log)
	}
	// The kind is seconds old: were it not told, the garbage collector would
	// look for it every 30 s. A namespace takes 5 s by itself.
	r := n.Tutti("down", "own")
	if n.ok(r); r.Took > 15*time.Second {
		t.Errorf("its removal took %v", r.Took)
	}
	complains(t, n.Tutti("down", "own"), 1, "no application own is deployed")
}

// A program that runs for a moment is ready in that moment; up is not fooled.
func TestCrashingApplication(t *testing.T) {
	n := shared(t)
	r := n.RunInput(time.Minute, `
apiVersion: apps/v1
kind: Deployment
metadata: {name: crash}
spec:
  selector: {matchLabels: {app: crash}}
  template:
    metadata: {labels: {app: crash}}
    spec: {containers: [{name: c, image: "busybox:1", command: [sh, -c, "echo no database; exit 3"]}]}
`, n.Binary(), "up", "-", "--name", "crash", "--timeout", "5s")
	complains(t, r, 1, "CrashLoopBackOff: exit code 3; last log line: .no database.")
	n.ok(n.Tutti("down", "crash"))
}
