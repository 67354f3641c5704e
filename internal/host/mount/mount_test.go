package mount

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestOverlayOfManyLayers(t *testing.T) {
	// Characters that mount options give a meaning, and long names.
	dir := filepath.Join(t.TempDir(), "with:colon,comma"+strings.Repeat("x", 100))
	var layers []string
	for i := range 100 {
		layer := filepath.Join(dir, "layers", fmt.Sprint(i))
		write(t, filepath.Join(layer, "top"), fmt.Sprint(i))
		layers = append(layers, layer)
	}
	write(t, filepath.Join(layers[0], "only-lowest"), "x")
	upper, work, root := filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "root")
	for _, d := range []string{upper, work, root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := Overlay(root, layers, upper, work); err != nil {
		t.Fatal(err)
	}
	defer Unmount(root)
	if !Is(root) {
		t.Error("root is not a mount")
	}
	if got, err := os.ReadFile(filepath.Join(root, "top")); err != nil || string(got) != "99" {
		t.Errorf("top file is of layer %s, want 99: %v", got, err)
	}
	if _, err := os.Stat(filepath.Join(root, "only-lowest")); err != nil {
		t.Error(err)
	}
	write(t, filepath.Join(root, "new"), "x")
	if _, err := os.Stat(filepath.Join(upper, "new")); err != nil {
		t.Error(err)
	}
	if below, err := Below(dir); err != nil || len(below) != 1 || below[0] != root {
		t.Errorf("below: %q %v", below, err)
	}
	for range 2 {
		if err := UnmountBelow(dir); err != nil {
			t.Fatal(err)
		}
		if err := Unmount(root); err != nil {
			t.Fatal(err)
		}
	}
	if Is(root) {
		t.Error("root is still a mount")
	}
}
