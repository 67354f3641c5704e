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
	f, err := os.CreateTemp(dir, ".tutti-keeper-")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	_, werr := f.Write(program)
	if err := errors.Join(werr, f.Chmod(0o755), f.Sync(), f.Close()); err != nil {
		return "", fmt.Errorf("install keeper in %s: %w", dir, err)
	}
	return path, os.Rename(f.Name(), path)
}
