package machine

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// prefix begins the names of the machines' directories.
	prefix = "tt"
	// claimName is a file in them that is locked for as long as the program
	// lives that made the machine.
	claimName = "claim"
)

// claim makes the file. It gets its name when it is locked already: nobody
// can take the machine for abandoned.
func claim(dir string) (*os.File, error) {
	f, err := os.CreateTemp(dir, claimName)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	return f, os.Rename(f.Name(), filepath.Join(dir, claimName))
}

// sweep removes the directories and control groups of machines whose programs
// were killed. What it cannot remove yet, the next one does.
func sweep() {
	claims, _ := filepath.Glob(filepath.Join(os.TempDir(), prefix+"*", claimName))
	for _, name := range claims {
		f, err := os.Open(name)
		if err != nil {
			continue // its machine was closed just now
		}
		if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			temp := filepath.Dir(name)
			(&Machine{Dir: filepath.Join(temp, "tutti"), temp: temp}).Close()
		}
		f.Close()
	}
}
