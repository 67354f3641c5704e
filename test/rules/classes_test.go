package rules

import (
	"maps"
	"os"
	"regexp"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// docs/pod.md tells what each class of runtime does not do, and the suite that
// each must pass leaves that out and nothing else.
func TestDifferencesOfClassesAreTold(t *testing.T) {
	text, err := os.ReadFile("../../docs/pod.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(text), "\n## Classes\n")
	if !ok {
		t.Fatal("docs/pod.md has no section Classes")
	}
	section, _, _ = strings.Cut(section, "\n## ")
	told := map[string]runtimetest.Differences{}
	for _, m := range regexp.MustCompile(`(?m)^\| ([a-z0-9]+) \| ([^|]+) \| ([^|]+) \|$`).FindAllStringSubmatch(section, -1) {
		if m[1] == "class" {
			continue
		}
		if told[m[1]] == nil {
			told[m[1]] = runtimetest.Differences{}
		}
		told[m[1]][m[2]] = m[3]
	}
	if !maps.EqualFunc(told, runtimetest.Declared, func(a, b runtimetest.Differences) bool { return maps.Equal(a, b) }) {
		t.Errorf("docs/pod.md tells of %q, the suite of %q", told, runtimetest.Declared)
	}
}
