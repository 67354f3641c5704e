// Package rules holds the house rules as tests: who may import whom, what
// packages are called, that each says what it is, and what must not stand in
// the repository.
package rules

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
)

const (
	module   = "tutti.dev/tutti"
	internal = module + "/internal/"
	kube     = "k8s.io/kubernetes"
)

// A room is a directory of internal with everything below it.
//
// rooms is the table of docs/architecture.md: the rooms that each may import
// besides itself. Every room may import api, which is words only.
var rooms = map[string][]string{
	"agent":        {"runtime", "image", "network", "volume", "keeper", "host"},
	"api":          {},
	"app":          {},
	"cli":          {"app", "build", "image", "importer", "systemd"},
	"controlplane": {"host"},
	"daemon":       {"agent", "app", "controlplane", "dns", "host", "image", "keeper", "network", "proxy", "runtime", "systemd", "volume"},
	"dns":          {"host"},
	"host":         {},
	"image":        {"host"},
	"importer":     {},
	"keeper":       {"host", "runtime"},
	"network":      {"host"},
	"proxy":        {"host"},
	"runtime":      {"host", "keeper"},
	"systemd":      {},
	"volume":       {"host"},
}

// mechanism rooms know nothing of Kubernetes.
var mechanism = []string{"host", "image", "keeper", "network", "runtime", "systemd", "volume"}

// borrowers are the rooms that may import k8s.io/kubernetes: an empty list
// allows all of it, another one what begins like its elements.
var borrowers = map[string][]string{
	"controlplane": nil,
	"proxy":        nil,
	"agent": {
		"/pkg/api", "/pkg/apis/core", "/pkg/credentialprovider", "/pkg/features", "/pkg/fieldpath", "/pkg/kubelet/", "/pkg/probe",
		"/pkg/scheduler/framework", "/pkg/security/apparmor", "/pkg/securitycontext", "/pkg/util/", "/pkg/volume", "/third_party/forked/golang/expansion",
	},
}

// forbidden names say nothing about what a package is.
var forbidden = []string{"base", "common", "helper", "helpers", "lib", "misc", "pkg", "shared", "types", "util", "utils"}

type pkg struct {
	Dir, ImportPath, Name, Doc         string
	GoFiles                            []string
	Imports, TestImports, XTestImports []string
	Deps                               []string
}

// room is the room that an import path belongs to, "" for none.
func room(path string) string {
	rest, ok := strings.CutPrefix(path, internal)
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, "/")
	return name
}

func isKube(path string) bool { return path == kube || strings.HasPrefix(path, kube+"/") }

// knowsKubernetes says whether a package is part of Kubernetes or its API
// machinery.
func knowsKubernetes(path string) bool {
	return (strings.HasPrefix(path, "k8s.io/") || strings.HasPrefix(path, "sigs.k8s.io/")) && !slices.Contains(free, path)
}

// free are packages under the Kubernetes names that know nothing of it.
var free = []string{"sigs.k8s.io/knftables"}

var packages = sync.OnceValues(func() ([]pkg, error) { return list("0", "", "./...") })

func list(cgo, tags string, args ...string) ([]pkg, error) {
	cmd := exec.Command("go", append([]string{"list", "-e", "-json=Dir,ImportPath,Name,Doc,GoFiles,Imports,TestImports,XTestImports,Deps", "-tags", tags}, args...)...)
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	var all []pkg
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		err := d.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read go list: %w", err)
		}
		all = append(all, p)
	}
}

func ours(t *testing.T) []pkg {
	t.Helper()
	all, err := packages()
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func TestImports(t *testing.T) {
	for _, p := range ours(t) {
		from := room(p.ImportPath)
		allowed, known := rooms[from]
		if from != "" && !known {
			t.Errorf("%s is in no room of the table: add %q here and in docs/architecture.md", p.ImportPath, from)
			continue
		}
		command := strings.HasPrefix(p.ImportPath, module+"/cmd/")
		// Tests may drive the real thing next door: a control plane, a network.
		for _, i := range slices.Concat(p.Imports, p.TestImports, p.XTestImports) {
			if to := room(i); (to == "daemon" || to == "cli") && to != from && !command {
				t.Errorf("%s imports %s: only cmd may", p.ImportPath, i)
			}
		}
		if from == "" {
			continue
		}
		for _, i := range p.Imports {
			if to := room(i); to != "" && to != from && to != "api" && !slices.Contains(allowed, to) {
				t.Errorf("%s imports %s: %s may not import %s", p.ImportPath, i, from, to)
			}
			if !isKube(i) {
				continue
			}
			parts, may := borrowers[from]
			if !may || parts != nil && !slices.ContainsFunc(parts, func(part string) bool { return strings.HasPrefix(strings.TrimPrefix(i, kube), part) }) {
				t.Errorf("%s imports %s: %s may not", p.ImportPath, i, from)
			}
		}
		if slices.Contains(mechanism, from) {
			for _, i := range p.Imports {
				if knowsKubernetes(i) {
					t.Errorf("%s imports %s: mechanism rooms know nothing of Kubernetes", p.ImportPath, i)
				}
			}
		}
	}
}

// The keeper starts in milliseconds and survives everything else: it has
// nothing of Kubernetes in it, nor what only the rest of tutti needs.
func TestKeeperStaysSmall(t *testing.T) {
	all, err := list("1", "seccomp netgo osusergo", "./cmd/tutti-keeper")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 1 || len(all[0].Deps) == 0 {
		t.Fatalf("no such command: %+v", all)
	}
	for _, d := range all[0].Deps {
		if knowsKubernetes(d) || strings.HasPrefix(d, "go.etcd.io/") || strings.HasPrefix(d, "github.com/containerd/containerd/") {
			t.Errorf("the keeper links %s", d)
		}
	}
}

// The table here and the one that people read name the same rooms.
func TestArchitectureNamesEveryRoom(t *testing.T) {
	text, err := os.ReadFile("../../docs/architecture.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n## Rooms\n")
	table, _, _ = strings.Cut(table, "\n## ")
	var named []string
	for _, m := range regexp.MustCompile("(?m)^\\| `internal/([a-z]+)`").FindAllStringSubmatch(table, -1) {
		named = append(named, m[1])
	}
	for _, r := range named {
		if _, ok := rooms[r]; !ok {
			t.Errorf("docs/architecture.md has a room %s that has no rule", r)
		}
	}
	for r := range rooms {
		if !slices.Contains(named, r) {
			t.Errorf("docs/architecture.md does not name the room %s", r)
		}
	}
}

func TestPackages(t *testing.T) {
	for _, p := range ours(t) {
		if len(p.GoFiles) == 0 {
			continue // only tests, or only with other build tags
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment", p.ImportPath)
		}
		for _, element := range strings.Split(strings.TrimPrefix(p.ImportPath, module), "/") {
			if slices.Contains(forbidden, element) {
				t.Errorf("%s: %q says nothing about what a package is", p.ImportPath, element)
			}
		}
	}
}

// What the code says must hold on every machine and be finished.
var unwanted = []struct {
	what string
	in   *regexp.Regexp // paths
	text *regexp.Regexp
}{
	{"a package registry's host", nil, regexp.MustCompile(`(?i)\b(proxy|sum)\.golang\.org|\bregistry\.npmjs|\bdeb\.debian\.org|\bgoproxy\.[a-z]+`)},
	{"unfinished work", regexp.MustCompile(`\.(go|sh|md|ya?ml)$|(^|/)Makefile$`), regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|XX` + `X)\b`)},
	{"a merge that was not finished", nil, regexp.MustCompile(`(?m)^(<{7}|>{7}) `)},
}

func TestTexts(t *testing.T) {
	out, err := exec.Command("git", "-c", "safe.directory=*", "-C", "../..", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		t.Fatalf("list the files of the repository: %v", err)
	}
	for name := range strings.SplitSeq(strings.Trim(string(out), "\x00"), "\x00") {
		if name == "go.sum" || strings.HasSuffix(name, "/go.sum") || name == "THIRD_PARTY_NOTICES" || strings.HasPrefix(name, "test/rules/") {
			continue
		}
		data, err := os.ReadFile(filepath.Join("../..", name))
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted, not yet committed
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > 1_500_000 {
			t.Errorf("%s has %d bytes: build it instead of keeping it", name, len(data))
		}
		if bytes.IndexByte(data, 0) >= 0 {
			continue
		}
		for _, u := range unwanted {
			if u.in != nil && !u.in.MatchString(name) {
				continue
			}
			if at := u.text.FindIndex(data); at != nil {
				line := 1 + bytes.Count(data[:at[0]], []byte("\n"))
				t.Errorf("%s:%d has %s", name, line, u.what)
			}
		}
	}
}
