package volume

import (
	"fmt"
	"path/filepath"
)

// Layout says where things are below a data directory.
type Layout string

// Pod is the directory of everything that ends with the pod.
func (l Layout) Pod(pod string) string { return filepath.Join(string(l), "pods", pod) }

// Volume is the directory of one volume of a pod; plugin says what kind.
func (l Layout) Volume(pod, plugin, name string) string {
	return filepath.Join(l.Pod(pod), "volumes", plugin, name)
}

// Memory is the mount point of the one memory file system that holds, for
// every pod, what must not reach a disk. One mount for all keeps the table
// short that each starting container copies.
func (l Layout) Memory() string { return filepath.Join(string(l), "memory") }

// MemoryPod is the pod's directory in memory.
func (l Layout) MemoryPod(pod string) string { return filepath.Join(l.Memory(), pod) }

// MemoryVolume is the directory of one volume of a pod in memory.
func (l Layout) MemoryVolume(pod, plugin, name string) string {
	return filepath.Join(l.MemoryPod(pod), plugin, name)
}

// Etc is a file that all containers of the pod see below /etc.
func (l Layout) Etc(pod, name string) string { return filepath.Join(l.Pod(pod), "etc", name) }

// Termination is the file for the last words of one run of a container.
func (l Layout) Termination(pod, container string, attempt int) string {
	return filepath.Join(l.Pod(pod), "termination", fmt.Sprintf("%s_%d", container, attempt))
}
