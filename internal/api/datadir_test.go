package api

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheck(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	long := "/" + strings.Repeat("a", 100)
	for path, want := range map[string]string{
		file:                      file + " is not a directory; choose another with --data-dir",
		filepath.Join(file, "in"): file + "/in is not a directory; choose another with --data-dir",
		dir:                       dir + " is not a data directory of tutti, and not empty (it has file); choose another with --data-dir",
		long:                      "the path of the data directory " + long + " is too long for the sockets in it: 101 bytes, at most 96; choose another with --data-dir",
	} {
		if _, err := DataDir(path).Check(); err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
	}
	if isNew, err := DataDir(filepath.Join(dir, "none")).Check(); err != nil || !isNew {
		t.Errorf("of a new one: %v, %v", isNew, err)
	}
}
