// Package hostprocess says what a pod of the class process is: by what its
// class and its namespace are known, and what it cannot ask for. The API server
// asks at admission, each agent again before it starts one; docs/process.md
// shows the table.
package hostprocess

import "fmt"

const (
	// Handler is that of RuntimeClasses whose pods are processes of the host,
	// whatever the classes are called; the one that each cluster has is called
	// the same.
	Handler = "process"
	// Image stands for the machine's own file system in the place of an image.
	Image = "host"
	// LabelAllow on a namespace, "true", lets its pods be processes of the host.
	LabelAllow = "tutti.dev/allow-host"
	// VerbAllow on namespaces is the right to set that label.
	VerbAllow = "allow-host"
	// AnnotationPrefix begins the annotations that say how a pod's processes
	// are to be run.
	AnnotationPrefix = "process.tutti.dev/"
)

// labelEnforce is Pod Security's: the level that a namespace's pods must meet.
const labelEnforce = "pod-security.kubernetes.io/enforce"

// Allowed says from a namespace's labels why its pods may not be processes of
// the host, nil if they may.
func Allowed(namespace string, labels map[string]string) error {
	if labels[LabelAllow] != "true" {
		return fmt.Errorf("namespace %q may not run processes of the host; label it "+LabelAllow+"=true, or leave runtimeClassName out", namespace)
	}
	// A process sees all others and their shared memory, which is what these
	// levels forbid as hostPID and hostIPC.
	if level := labels[labelEnforce]; level != "" && level != "privileged" {
		return fmt.Errorf("namespace %q enforces the Pod Security level %s, and no process of the host meets it; label it "+labelEnforce+"=privileged, or leave runtimeClassName out", namespace, level)
	}
	return nil
}
