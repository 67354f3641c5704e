// Package volume makes the directories, memory file systems and atomically
// updated files that pods mount. It knows nothing of Kubernetes.
package volume
