// Package volume makes the directories, memory file systems and mounts that
// pods' volumes are, and takes them away without ever reaching into what is
// mounted there. It knows nothing of Kubernetes.
package volume
