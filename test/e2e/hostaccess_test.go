package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A tenant who may do everything in a namespace, and change any namespace, but
// does not have the verb allow-host, does not get onto the host. Each way is
// tried with a program that would leave a file there.
func TestTenantStaysOffTheHost(t *testing.T) {
	n := shared(t)
	ns := n.namespace("tenant")
	caught := filepath.Join(filepath.Dir(n.Dir), "tenant-was-here")
	t.Cleanup(func() {
		os.Remove(caught)
		n.Kubectl("delete", "runtimeclass", "innocent", "swapped", "--ignore-not-found")
		n.Kubectl("delete", "clusterrole,clusterrolebinding", "tenant-namespaces", "tenant-allow-host", "--ignore-not-found")
	})
	n.kubectl("-n", ns, "create", "rolebinding", "all", "--clusterrole=cluster-admin", "--user=tess")
	n.kubectl("create", "clusterrole", "tenant-namespaces", "--resource=namespaces,namespaces/status,namespaces/finalize", "--verb=get,list,create,update,patch")
	n.kubectl("create", "clusterrolebinding", "tenant-namespaces", "--clusterrole=tenant-namespaces", "--user=tess")
	n.ok(n.Apply("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: innocent}\nhandler: process\n" +
		"---\napiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: swapped}\nhandler: container\n"))

	as := func(user string) func(input string, args ...string) (string, bool) {
		return func(input string, args ...string) (string, bool) {
			r := n.RunInput(patience, input, n.Binary(), append([]string{"kubectl", "--as=" + user, "--as-group=system:authenticated", "-n", ns}, args...)...)
			return r.Stdout + r.Stderr, r.Err == nil
		}
	}
	tess := as("tess")
	n.until("the tenant's rights", func() (bool, string) {
		said, ok := tess("", "get", "namespaces")
		return ok, said
	})
	spec := func(class string) string {
		return fmt.Sprintf("runtimeClassName: %s\nrestartPolicy: Never\ncontainers:\n- {name: main, image: host, command: [touch, %s]}\n", class, caught)
	}
	controller := func(kind, api, name, rest string) string {
		return fmt.Sprintf("apiVersion: %s\nkind: %s\nmetadata: {name: %s}\nspec:\n%s  template:\n    metadata:\n      labels: {app: %s}\n      annotations: {process.tutti.dev/root: shared}\n    spec:\n%s",
			api, kind, name, rest, name, indent(strings.Replace(spec("process"), "Never", map[bool]string{true: "Never", false: "Always"}[kind == "Job"], 1), "      "))
	}
	labelled := "apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, labels: {tutti.dev/allow-host: 'true'}}\n"
	const (
		label  = `user "tess" may not allow processes of the host by the label tutti.dev/allow-host`
		closed = `namespace "tenant" may not run processes of the host; label it tutti.dev/allow-host=true`
		patch  = `{"metadata": {"labels": {"tutti.dev/allow-host": "true"}}}`
	)

	// A pod that is there before its class becomes another, and waits.
	waiting := "schedulerName: nobody\n" + strings.Replace(spec("swapped"), "image: host", "image: busybox:1", 1)
	if said, ok := tess(pod(ns, "swapped", waiting), "create", "-f", "-"); !ok {
		t.Fatal(said)
	}
	n.kubectl("delete", "runtimeclass", "swapped")
	n.ok(n.Apply("apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: swapped}\nhandler: process\n"))
	// A container like any other.
	if said, ok := tess(pod(ns, "decent", "terminationGracePeriodSeconds: 0\n"+restarting(one("command: [sleep, '1000']"))), "create", "-f", "-"); !ok {
		t.Fatal(said)
	}

	for _, road := range []struct {
		name, input string
		args        []string
		want        string
	}{
		{"label", "", []string{"label", "namespace", ns, "tutti.dev/allow-host=true"}, label},
		{"patch", "", []string{"patch", "namespace", ns, "--type=merge", "-p", patch}, label},
		{"status", "", []string{"patch", "namespace", ns, "--subresource=status", "--type=merge", "-p", patch}, label},
		{"apply", fmt.Sprintf(labelled, ns), []string{"apply", "--server-side", "-f", "-"}, label},
		{"finalize", `{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tenant", "labels": {"tutti.dev/allow-host": "true"}}}`, []string{"replace", "--raw=/api/v1/namespaces/" + ns + "/finalize", "-f", "-"}, label},
		{"another namespace", fmt.Sprintf(labelled, "tenant-too"), []string{"create", "-f", "-"}, label},
		{"a right of one's own", "", []string{"create", "clusterrole", "tenant-too", "--resource=namespaces", "--verb=allow-host"}, "forbidden"},
		{"pod", pod(ns, "pod", spec("process")), []string{"create", "-f", "-"}, closed},
		{"class of another name", pod(ns, "pod", spec("innocent")), []string{"create", "-f", "-"}, closed},
		{"class of one's own", "apiVersion: node.k8s.io/v1\nkind: RuntimeClass\nmetadata: {name: mine}\nhandler: process\n", []string{"create", "-f", "-"}, "forbidden"},
		{"bound already", pod(ns, "pod", "nodeName: "+n.field("", "node", "{.items[0].metadata.name}")+"\n"+spec("process")), []string{"create", "-f", "-"}, closed},
		{"class of a pod that runs", "", []string{"patch", "pod", "decent", "--type=merge", "-p", `{"spec": {"runtimeClassName": "process"}}`}, "pod updates may not change fields other than"},
		{"another program in a pod whose class was swapped", "", []string{"set", "image", "pod/swapped", "main=host"}, closed},
		{"ephemeral container where the class was swapped", "", []string{"debug", "swapped", "--image=host", "--", "touch", caught}, closed},
	} {
		if said, ok := tess(road.input, road.args...); ok || !strings.Contains(said, road.want) {
			t.Errorf("%s: %s, want %s", road.name, said, road.want)
		}
	}
	for kind, manifest := range map[string]string{
		"deployment":  controller("Deployment", "apps/v1", "deployment", "  selector: {matchLabels: {app: deployment}}\n"),
		"statefulset": controller("StatefulSet", "apps/v1", "statefulset", "  serviceName: x\n  selector: {matchLabels: {app: statefulset}}\n"),
		"daemonset":   controller("DaemonSet", "apps/v1", "daemonset", "  selector: {matchLabels: {app: daemonset}}\n"),
		"job":         controller("Job", "batch/v1", "job", ""),
	} {
		said, ok := tess(manifest, "create", "-f", "-")
		if !ok || !strings.Contains(said, "Warning: its pods will be refused: "+closed) {
			t.Errorf("%s: %s, want a warning", kind, said)
		}
	}
	n.until("each controller told", func() (bool, string) {
		said := n.kubectl("-n", ns, "get", "events", "--field-selector=reason=FailedCreate", "-o", "jsonpath={range .items[*]}{.involvedObject.kind} {.message}{'\\n'}{end}")
		for _, kind := range []string{"ReplicaSet", "StatefulSet", "DaemonSet", "Job"} {
			if !strings.Contains(said, kind+" ") {
				return false, said
			}
		}
		return strings.Contains(said, closed), said
	})
	// Who binds the pod that waited is no tenant; the agent looks again.
	n.ok(n.RunInput(patience, fmt.Sprintf(`{"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "swapped"}, "target": {"kind": "Node", "name": %q}}`,
		n.field("", "node", "{.items[0].metadata.name}")), n.Binary(), "kubectl", "create", "--raw=/api/v1/namespaces/"+ns+"/pods/swapped/binding", "-f", "-"))
	n.until("the agent's refusal", func() (bool, string) {
		said := n.kubectl("-n", ns, "get", "events", "--field-selector=involvedObject.name=swapped", "-o", "jsonpath={.items[*].message}")
		return strings.Contains(said, closed), said
	})
	if pods := n.kubectl("-n", ns, "get", "pods", "-o", "jsonpath={.items[*].metadata.name}"); pods != "decent swapped" {
		t.Errorf("there are pods %s", pods)
	}
	if _, err := os.Stat(caught); err == nil {
		t.Fatal("the tenant got onto the host")
	}

	// Now somebody who may says yes.
	n.kubectl("create", "clusterrole", "tenant-allow-host", "--resource=namespaces", "--resource-name="+ns, "--verb=allow-host")
	n.kubectl("create", "clusterrolebinding", "tenant-allow-host", "--clusterrole=tenant-allow-host", "--user=tess")
	n.until("the label", func() (bool, string) {
		said, ok := tess("", "label", "namespace", ns, "tutti.dev/allow-host=true")
		return ok, said
	})
	n.wait(ns, "deployment/deployment", "create")
	n.until("the program on the host", func() (bool, string) {
		_, err := os.Stat(caught)
		return err == nil, n.Kubectl("-n", ns, "get", "pods").Stdout
	})
}

// Static pods are root's: they need no namespace's leave.
func TestStaticProcess(t *testing.T) {
	n := shared(t)
	ns := n.namespace("static-process")
	manifest := filepath.Join(n.Dir, "manifests", "process.yaml")
	text := pod(ns, "still", "runtimeClassName: process\nterminationGracePeriodSeconds: 0\ncontainers:\n- {name: main, image: host, command: [sleep, '1000']}\n")
	if err := os.WriteFile(manifest, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(manifest) })
	name := "still-" + n.field("", "node", "{.items[0].metadata.name}")
	n.until("its mirror", func() (bool, string) {
		r := n.Kubectl("-n", ns, "get", "pod", name, "-o", "jsonpath={.status.phase}")
		return r.Stdout == "Running", r.String()
	})
	os.Remove(manifest)
	n.wait(ns, "pod/"+name, "delete")
}
