// Package embedded carries the keeper's program. `make keeper` builds it into
// this directory first; without that nothing that imports this package
// compiles.
package embedded

import (
	"crypto/sha256"
	_ "embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

//go:embed tutti-keeper
var program []byte

// Install writes the program into dir, which is made if need be, and returns
// its path. The name holds the program's digest: another version gets another
// name and one that runs is never written to.
func Install(dir string) (string, error) {
	sum := sha256.Sum256(program)
	path := filepath.Join(dir, "tutti-keeper-"+hex.EncodeToString(sum[:])[:12])
	if info, err := os.Stat(path); err == nil && info.Size() == int64(len(program)) {
		return path, nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	name, err := write(dir)
	if err != nil {
		return "", fmt.Errorf("install keeper in %s: %w", dir, err)
	}
	defer os.Remove(name)
	return path, os.Rename(name, path)
}

// Prune removes from dir every other program that Install has put there, and
// what one that was killed has left of it. A program that still runs, as a
// pod's first process may, runs on.
func Prune(dir, keep string) error {
	var errs []error
	for _, pattern := range []string{"tutti-keeper-*", ".tutti-keeper-*"} {
		found, err := filepath.Glob(filepath.Join(dir, pattern))
		errs = append(errs, err)
		for _, path := range found {
			if path != keep {
				errs = append(errs, os.Remove(path))
			}
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove old keepers: %w", err)
	}
	return nil
}

// write puts the program into a new file in dir, on the disk.
func write(dir string) (name string, err error) {
	// A program that is forked meanwhile would hold the file open for writing
	// until it is executed, and nobody can execute a file that somebody may
	// write to: go.dev/issue/22315. So nothing is forked meanwhile.
	syscall.ForkLock.RLock()
	f, err := os.CreateTemp(dir, ".tutti-keeper-")
	if err == nil {
		_, err = f.Write(program)
		err = errors.Join(err, f.Chmod(0o755), f.Close())
	}
	syscall.ForkLock.RUnlock()
	if f == nil {
		return "", err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err != nil {
		return "", err
	}
	r, err := os.Open(f.Name())
	if err != nil {
		return "", err
	}
	return f.Name(), errors.Join(r.Sync(), r.Close())
}
