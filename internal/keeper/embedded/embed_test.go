package embedded

import (
	"os"
	"os/exec"
	"path/filepath"
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
