package api

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// DataDir is the path of a data directory; its methods name what is in it.
// docs/architecture.md has the whole picture.
type DataDir string

func (d DataDir) join(elem ...string) string {
	return filepath.Join(append([]string{string(d)}, elem...)...)
}

// Lock is held (flock) by the running server; it contains the server's pid.
func (d DataDir) Lock() string { return d.join("lock") }

// Socket is the server's control socket.
func (d DataDir) Socket() string { return d.join("tutti.sock") }

// Kubeconfig is the administrator's way in.
func (d DataDir) Kubeconfig() string { return d.join("admin.kubeconfig") }

// Config is the file of settings that must not change from start to start;
// its presence is what makes a directory a data directory of tutti.
func (d DataDir) Config() string { return d.join("config.json") }

// Log is where a server in the background writes.
func (d DataDir) Log() string { return d.join("log", "tutti.log") }

// longest is how long its path may be: the kernel takes 107 bytes for that of
// a socket.
const longest = 107 - len("/tutti.sock")

// Check refuses a directory that holds what is not tutti's. A directory that
// is absent, empty, or was never finished by a start that failed, is new.
func (d DataDir) Check() (isNew bool, err error) {
	if len(d) > longest {
		return false, fmt.Errorf("the path of the data directory %s is too long for the sockets in it: %d bytes, at most %d; choose another with --data-dir", d, len(d), longest)
	}
	if _, err := os.Stat(d.Config()); err == nil {
		return false, nil
	}
	entries, err := os.ReadDir(string(d))
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if errors.Is(err, syscall.ENOTDIR) {
		return false, fmt.Errorf("%s is not a directory; choose another with --data-dir", d)
	}
	if err != nil {
		return false, fmt.Errorf("read the data directory: %w", err)
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(filepath.Dir(d.Log())) && e.Name() != filepath.Base(d.Lock()) && e.Name() != filepath.Base(d.Socket()) {
			return false, fmt.Errorf("%s is not a data directory of tutti, and not empty (it has %s); choose another with --data-dir", d, e.Name())
		}
	}
	return true, nil
}
