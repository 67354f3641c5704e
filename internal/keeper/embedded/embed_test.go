package embedded

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

func TestInstall(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "bin")
	path, err := Install(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := Install(dir)
	if err != nil || again != path {
		t.Errorf("again: %s %v, first %s", again, err, path)
	}
	if out, err := exec.Command(path, "check").CombinedOutput(); err != nil {
		t.Errorf("installed program: %v: %s", err, out)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("%d files: %v", len(entries), err)
	}
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	path, err := Install(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"tutti-keeper-0123456789ab", ".tutti-keeper-half", "another"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := Prune(dir, path); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 || entries[0].Name() != "another" || entries[1].Name() != filepath.Base(path) {
		t.Errorf("left: %v %v", entries, err)
	}
}

// What the process forks meanwhile must not keep the program from being
// executed ("text file busy").
func TestInstallAmongForks(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var forks sync.WaitGroup
	defer forks.Wait()
	defer cancel()
	for range 4 {
		forks.Go(func() {
			for ctx.Err() == nil {
				_ = exec.CommandContext(ctx, "/bin/true").Run()
			}
		})
	}
	for range 30 {
		path, err := Install(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(path, "check").CombinedOutput(); err != nil {
			t.Fatalf("installed program: %v: %s", err, out)
		}
	}
}
