package e2e

import "testing"

// hostNamespace makes a namespace whose pods may be processes of the host.
func (n node) hostNamespace(name string) string {
	n.t.Helper()
	n.namespace(name)
	n.kubectl("label", "namespace", name, "tutti.dev/allow-host=true")
	return name
}

// A pod of the class process runs a program of the machine.
func TestProcessRuns(t *testing.T) {
	n := shared(t)
	ns := n.hostNamespace("process-runs")
	n.ok(n.Apply("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: process}\nhandler: process\n"))
	n.ok(n.Apply(pod(ns, "hello", `
runtimeClassName: process
restartPolicy: Never
containers:
- {name: main, image: host, command: [sh, -c, "echo hello from $(hostname) $HOSTNAME; cat /proc/self/mountinfo; ls /run/secrets/kubernetes.io/serviceaccount; cat /etc/hosts; echo x >/usr/x || echo refused"]}
`)))
	n.wait(ns, "pod/hello", "jsonpath={.status.phase}=Succeeded")
	t.Log(n.kubectl("-n", ns, "logs", "hello"))
}
