package daemon

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/api"
)

// lock makes this process the only server of a data directory until unlock.
// The kernel lets go of it when the process ends in whatever way.
func lock(dir api.DataDir) (unlock func(), err error) {
	f, err := os.OpenFile(dir.Lock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the data directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("lock %s: %w", dir.Lock(), err)
		}
		text := make([]byte, 32)
		n, _ := f.ReadAt(text, 0)
		pid := strings.TrimSpace(string(text[:n]))
		return nil, fmt.Errorf("process %s serves %s already; stop it with `tutti stop`, or choose another directory with --data-dir", pid, dir)
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("write %s: %w", dir.Lock(), err)
	}
	return func() { f.Close() }, nil
}
