package compose

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// Each file of testdata/good becomes the objects beside it.
func TestGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/good/*/compose.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(filepath.Dir(file)), func(t *testing.T) {
			p, err := Load(t.Context(), file, Options{Environment: []string{"TOKEN=from the environment"}})
			if err != nil {
				t.Fatal(err)
			}
			objects, err := p.Objects()
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			for _, o := range objects {
				text, err := yaml.Marshal(o.Object)
				if err != nil {
					t.Fatal(err)
				}
				b.WriteString("---\n")
				b.Write(text)
			}
			here, err := os.Getwd()
			if err != nil {
				t.Fatal(err)
			}
			got := strings.ReplaceAll(b.String(), here, "HERE")
			golden := filepath.Join(filepath.Dir(file), "objects.golden")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("not as in %s:\n%s", golden, got)
			}
		})
	}
}

// Every file says in its first line what it is refused with.
func TestRefused(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal("no files", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			first, _, _ := strings.Cut(string(text), "\n")
			want := strings.TrimPrefix(first, "# ")
			p, err := Load(t.Context(), file, Options{})
			if err == nil {
				_, err = p.Objects()
			}
			if err == nil {
				t.Fatal("was taken")
			}
			here, _ := os.Getwd()
			got := strings.TrimPrefix(strings.ReplaceAll(err.Error(), here+"/", ""), file+":")
			if *update {
				if err := os.WriteFile(file, []byte("# "+got+strings.TrimPrefix(string(text), first)), 0o644); err != nil {
					t.Fatal(err)
				}
			} else if got != want {
				t.Errorf("\n got %s\nwant %s", got, want)
			}
		})
	}
}

// What the table refuses is refused, with the table's words.
func TestRefusedKeys(t *testing.T) {
	for name, k := range keys {
		if k.standing != refused {
			continue
		}
		var value any = "something"
		parts := strings.Split(strings.ReplaceAll(name, "*", "a"), ".")
		for i := len(parts) - 1; i >= 0; i-- {
			value = map[string]any{parts[i]: value}
		}
		err := (&Project{}).checkKeys(value.(map[string]any))
		if want := strings.Join(parts, ".") + ": " + k.text; err == nil || err.Error() != want {
			t.Errorf("%s: got %v, want %s", name, err, want)
		}
		if !strings.Contains(k.text, "; ") && !strings.HasPrefix(k.text, "use ") && !strings.HasPrefix(k.text, "write ") {
			t.Errorf("%s says no cure: %s", name, k.text)
		}
	}
}
