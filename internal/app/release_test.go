package app

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/api"
)

func objects(t *testing.T, text string) []Object {
	t.Helper()
	list, err := decode("test", strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return list
}

const secretly = `
apiVersion: v1
kind: Secret
metadata: {name: token}
stringData: {token: hush}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: rules}
data: {a: "1"}
`

// A release holds nothing secret, and gives everything back.
func TestReleaseKeepsSecretsApart(t *testing.T) {
	a := Application{Name: "x", Source: "here", Objects: objects(t, secretly)}
	r, secrets, err := newRelease(a, 3, "somebody")
	if err != nil {
		t.Fatal(err)
	}
	open, err := objectsOf(r, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range open {
		if text, err := yaml.Marshal(o.Object); err != nil || bytes.Contains(text, []byte("hush")) || bytes.Contains(r.Objects, []byte("hush")) {
			t.Errorf("a secret is told: %s %v", text, err)
		}
	}
	whole, err := objectsOf(r, secrets)
	if err != nil {
		t.Fatal(err)
	}
	again, _, err := newRelease(Application{Name: "x", Objects: whole}, 4, "")
	if err != nil || again.Digest != r.Digest {
		t.Errorf("came back as another: %v", err)
	}
	a.Objects = objects(t, strings.ReplaceAll(secretly, "hush", "hash"))
	if other, _, err := newRelease(a, 4, ""); err != nil || other.Digest == r.Digest {
		t.Errorf("another secret is no other release: %v", err)
	}
}

func TestTarget(t *testing.T) {
	list := func(states ...api.ReleaseState) []api.Release {
		var kept []api.Release
		for i, s := range states {
			kept = append(kept, api.Release{Number: i + 3, State: s})
		}
		return kept
	}
	for _, c := range []struct {
		name   string
		kept   []api.Release
		number int
		want   string
	}{
		{"by number", list(api.ReleaseReplaced, api.ReleaseDeployed), 3, "3"},
		{"no such", list(api.ReleaseDeployed), 9, "x has no release 9; `tutti history x` lists those it has"},
		{"the one before", list(api.ReleaseReplaced, api.ReleaseReplaced, api.ReleaseDeployed), 0, "4"},
		{"over one that failed", list(api.ReleaseReplaced, api.ReleaseFailed, api.ReleaseDeployed), 0, "3"},
		{"after a failure", list(api.ReleaseReplaced, api.ReleaseDeployed, api.ReleaseFailed), 0, "3"},
		{"interrupted", list(api.ReleaseReplaced, api.ReleaseDeployed, api.ReleaseDeploying), 0, "4"},
		{"the first", list(api.ReleaseDeployed), 0, "x has no earlier release; `tutti history x` lists those it has"},
		{"none", nil, 0, "x has no earlier release; `tutti history x` lists those it has"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := target(c.kept, "x", c.number)
			got := fmt.Sprint(r.Number)
			if err != nil {
				got = err.Error()
			}
			if got != c.want {
				t.Errorf("got %s, want %s", got, c.want)
			}
		})
	}
}

// What a configuration is called follows from what it holds, wherever pods use it.
func TestAddressed(t *testing.T) {
	const config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: rules}\ndata: {a: \"1\"}\n---\n"
	const uses = `apiVersion: apps/v1
kind: Deployment
metadata: {name: rules}
spec:
  template:
    spec:
      volumes:
        - {name: rules, configMap: {name: rules}}
        - {name: all, projected: {sources: [{configMap: {name: rules}}, {secret: {name: rules}}]}}
      initContainers:
        - {name: rules, envFrom: [{configMapRef: {name: rules}}, {secretRef: {name: rules}}]}
      containers:
        - {name: rules, env: [{name: A, valueFrom: {configMapKeyRef: {name: rules, key: rules}}}], volumeMounts: [{name: rules, mountPath: /x}]}
`
	const renamed = "rules-7e2384c6ff"
	for _, c := range []struct {
		name, text string
		want       int // how often the new name stands
	}{
		{"used", config + uses, 5},
		{"by nobody", config, 0},
		{"kept by wish", strings.Replace(config, "{name: rules}", "{name: rules, annotations: {tutti.dev/keep-name: \"true\"}}", 1) + uses, 0},
		{"immutable", strings.Replace(config, "\ndata:", "\nimmutable: true\ndata:", 1) + uses, 0},
		{"looked up by others", config + uses + "---\napiVersion: x.example/v1\nkind: Rules\nmetadata: {name: x}\nspec: {from: rules}\n", 0},
		{"in an argument", config + strings.Replace(uses, "env:", "args: [rules], env:", 1), 0},
		{"of another namespace", strings.Replace(config, "{name: rules}", "{name: rules, namespace: other}", 1) + uses, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			a, err := addressed(Application{Name: "x", Objects: objects(t, c.text)})
			if err != nil {
				t.Fatal(err)
			}
			var all strings.Builder
			for _, o := range a.Objects {
				text, err := yaml.Marshal(o.Object)
				if err != nil {
					t.Fatal(err)
				}
				all.Write(text)
			}
			if got := strings.Count(all.String(), renamed); got != c.want {
				t.Errorf("the name stands %d times, want %d, in\n%s", got, c.want, all.String())
			}
		})
	}
}

func TestCompare(t *testing.T) {
	before, err := texts(objects(t, secretly))
	if err != nil {
		t.Fatal(err)
	}
	after, err := texts(objects(t, strings.NewReplacer("hush", "hash", `a: "1"`, `a: "2"`).Replace(secretly)))
	if err != nil {
		t.Fatal(err)
	}
	text, err := compare(before, after, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"--- ConfigMap rules (release 1)\n+++ ConfigMap rules (release 2)\n", "-  a: \"1\"\n+  a: \"2\"\n", "-  token: sha256:"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is missing in\n%s", want, text)
		}
	}
	if strings.Contains(text, "hush") || strings.Contains(text, "hash") {
		t.Errorf("a secret is told in\n%s", text)
	}
}

// Of a cluster that has no release of an application, or two deployers.
func TestReleaseMessages(t *testing.T) {
	for _, c := range []struct {
		err  error
		want string
	}{
		{noneDeployed("shop"), "no release of shop is deployed; `tutti history shop` lists those it has"},
		{otherDeploys("shop"), "somebody else deploys shop now; wait, and see `tutti history shop`"},
		{errNoReleases, "this cluster does not know releases, and you may not teach it; have its administrator deploy something first"},
		{notBack(errors.New("not ready in time"), 2, errors.New("read release 2 of shop")), "not ready in time; and release 2 has not come back: read release 2 of shop"},
	} {
		if c.err.Error() != c.want {
			t.Errorf("got %s, want %s", c.err, c.want)
		}
	}
}
