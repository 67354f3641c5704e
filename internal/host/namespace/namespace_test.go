package namespace

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/mount"
)

func TestMake(t *testing.T) {
	self := func() string {
		link, err := os.Readlink("/proc/self/ns/uts")
		if err != nil {
			t.Fatal(err)
		}
		return link
	}
	before := self()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	// Often enough for the main thread to be among those that are asked.
	for range 200 {
		dir := t.TempDir()
		inside := ""
		if err := Make(dir, []Kind{IPC, UTS}, nil, func() (err error) {
			if err := unix.Sethostname([]byte("inside")); err != nil {
				return err
			}
			inside, err = os.Readlink("/proc/thread-self/ns/uts")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if inside == before || self() != before {
			t.Fatalf("namespace inside %s, before %s, now %s", inside, before, self())
		}
		for _, kind := range []Kind{IPC, UTS} {
			path := filepath.Join(dir, string(kind))
			if !mount.Is(path) {
				t.Errorf("%s is not pinned", kind)
			}
			for range 2 {
				if err := Unpin(path); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if now, err := os.Hostname(); err != nil || now != name {
		t.Errorf("the machine's name became %q: %v", now, err)
	}
}
