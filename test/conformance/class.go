package main

import (
	"bytes"
	_ "embed"
	"errors"
	"fmt"
	"text/template"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

//go:embed class.yaml
var policies string

// force has the API server give a class to every pod that a case makes, and
// let the cases' namespaces have it.
func force(m *machine.Machine, class string) error {
	var manifest bytes.Buffer
	if err := template.Must(template.New("class.yaml").Parse(policies)).Execute(&manifest, class); err != nil {
		return err
	}
	if r := m.Apply(manifest.String()); r.Err != nil {
		return errors.New(r.String())
	}
	// Policies are in force a moment after they are made.
	const namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: forced, labels: {e2e-run: forced}}\n"
	const pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: forced, namespace: forced}\nspec: {containers: [{name: c, image: none}]}\n"
	dryRun := []string{"--dry-run=server"}
	for _, step := range []struct {
		manifest string
		options  []string
		says     string
		want     string
	}{
		{namespace, dryRun, `{.metadata.labels.tutti\.dev/allow-host}`, "true"},
		{namespace, nil, "{.metadata.name}", "forced"},
		{pod, dryRun, "{.spec.runtimeClassName}", class},
	} {
		args := append([]string{"kubectl", "create", "-f", "-", "-o", "jsonpath=" + step.says}, step.options...)
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			r := m.RunInput(30*time.Second, step.manifest, m.Binary(), args...)
			if r.Err == nil && r.Stdout == step.want {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("force pods into class %s: want %s: %s", class, step.want, r)
			}
		}
	}
	if r := m.Kubectl("delete", "namespace", "forced", "--wait=false"); r.Err != nil {
		return errors.New(r.String())
	}
	return nil
}
