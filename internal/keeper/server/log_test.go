//go:build cgo

package server

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCRI(t *testing.T) {
	long := strings.Repeat("x", maxLine)
	for _, c := range []struct {
		name string
		in   []string
		want []string
	}{
		{"one line", []string{"a\n"}, []string{"F a"}},
		{"empty lines", []string{"\n\n"}, []string{"F ", "F "}},
		{"line in two reads", []string{"a", "b\nc\n"}, []string{"F ab", "F c"}},
		{"no newline at the end", []string{"a\nb"}, []string{"F a", "P b"}},
		{"as long as can be", []string{long + "\n"}, []string{"F " + long}},
		{"too long", []string{long + "yz\n"}, []string{"P " + long, "F yz"}},
		{"too long in two reads", []string{"ab", long + "\n"}, []string{"P ab" + long[2:], "F xx"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "0.log")
			log, err := openCRI(path, slog.Default())
			if err != nil {
				t.Fatal(err)
			}
			var partial []byte
			for _, in := range c.in {
				partial = log.write("stdout", partial, []byte(in))
			}
			log.end("stdout", partial)
			log.close()
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			lines := strings.Split(strings.TrimSuffix(string(data), "\n"), "\n")
			if len(lines) != len(c.want) {
				t.Fatalf("%d records, want %d", len(lines), len(c.want))
			}
			for i, line := range lines {
				_, text, _ := strings.Cut(line, " stdout ")
				if text != c.want[i] {
					t.Errorf("record %d: %.60q, want %.60q", i, text, c.want[i])
				}
			}
		})
	}
}

func TestCRIRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "0.log")
	log, err := openCRI(path, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer log.close()
	line := []byte(strings.Repeat("x", maxLine-1) + "\n")
	for written := 0; written < (maxLogFiles+1)*maxLogSize; written += len(line) {
		log.write("stdout", nil, line)
	}
	files, err := filepath.Glob(path + "*")
	if err != nil || len(files) != maxLogFiles {
		t.Fatalf("%d files, want %d: %v", len(files), maxLogFiles, err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Size() > maxLogSize {
			t.Errorf("%s: %v, %d bytes", f, err, info.Size())
		}
	}
}
