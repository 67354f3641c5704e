// Command notices writes THIRD_PARTY_NOTICES: every module that is linked in
// tutti or its keeper, its licence, and the text of it, each text once.
package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// target is a command as the Makefile builds it.
type target struct{ pkg, cgo, tags string }

var targets = []target{
	{"./cmd/tutti", "0", ""},
	{"./cmd/tutti-keeper", "1", "seccomp netgo osusergo"},
}

func main() {
	out := flag.String("o", "THIRD_PARTY_NOTICES", "file to write")
	flag.Parse()
	if err := run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "notices:", err)
		os.Exit(1)
	}
}

func run(out string) error {
	modules, err := linked(".", targets)
	if err != nil {
		return err
	}
	// Linked statically into the keeper, from the machine that builds it.
	lesser, err := os.ReadFile("/usr/share/common-licenses/LGPL-2.1")
	if err != nil {
		return fmt.Errorf("read the licence of the C libraries: %w", err)
	}
	for _, c := range []module{
		{Path: "libseccomp", Version: "(C, in tutti-keeper)"},
		{Path: "GNU C Library", Version: "(C, in tutti-keeper)"},
	} {
		c.Texts = []string{string(lesser)}
		modules = append(modules, c)
	}
	var b bytes.Buffer
	if err := write(&b, modules); err != nil {
		return err
	}
	return os.WriteFile(out, b.Bytes(), 0o644)
}

// module is a piece of somebody else's work with the texts of its licence.
type module struct {
	Path, Version string
	Texts         []string
}

// linked lists the modules of the packages that the targets link, and the
// standard library, sorted.
func linked(dir string, targets []target) ([]module, error) {
	found := map[string]*module{}
	for _, t := range targets {
		cmd := exec.Command("go", "list", "-deps", "-json=Dir,Standard,Module", "-tags", t.tags, t.pkg)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+t.cgo)
		cmd.Stderr = os.Stderr
		out, err := cmd.Output()
		if err != nil {
			return nil, fmt.Errorf("list what %s links: %w", t.pkg, err)
		}
		for d := json.NewDecoder(bytes.NewReader(out)); ; {
			var p struct {
				Dir      string
				Standard bool
				Module   *struct {
					Path, Version, Dir string
					Main               bool
					Replace            *struct{ Path, Version string }
				}
			}
			err := d.Decode(&p)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("read go list: %w", err)
			}
			m, top := module{Path: "Go standard library"}, ""
			switch {
			case p.Standard:
				if top, err = goroot(); err != nil {
					return nil, err
				}
				p.Dir = top
			case p.Module == nil || p.Module.Main:
				continue
			default:
				m.Path, m.Version, top = p.Module.Path, p.Module.Version, p.Module.Dir
				if r := p.Module.Replace; r != nil {
					m.Path, m.Version = r.Path, r.Version
				}
			}
			known, ok := found[m.Path]
			if !ok {
				known = &m
				found[m.Path] = known
			}
			texts, err := licences(top, p.Dir)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", m.Path, err)
			}
			for _, text := range texts {
				if !slices.Contains(known.Texts, text) {
					known.Texts = append(known.Texts, text)
				}
			}
		}
	}
	var modules []module
	for _, m := range found {
		slices.Sort(m.Texts)
		modules = append(modules, *m)
	}
	slices.SortFunc(modules, func(a, b module) int { return cmp.Compare(a.Path, b.Path) })
	return modules, nil
}

func goroot() (string, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return "", fmt.Errorf("find Go: %w", err)
	}
	return strings.TrimSpace(string(out)), nil
}

var (
	licenceFile = regexp.MustCompile(`(?i)^(un)?(licen[cs]e|copying|copyright)([.-].*)?$`)
	noticeFile  = regexp.MustCompile(`(?i)^notice([.-].*)?$`)
	sourceFile  = regexp.MustCompile(`(?i)\.(go|s|h|c|py|sh|json|tmpl|docs)$`)
)

// licences reads the licence nearest to a package, in its directory or above
// it in its module, and the notices at the module's top.
func licences(top, dir string) ([]string, error) {
	var texts []string
	add := func(dir string, which *regexp.Regexp) error {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if e.IsDir() || !which.MatchString(e.Name()) || sourceFile.MatchString(e.Name()) {
				continue
			}
			data, err := os.ReadFile(filepath.Join(dir, e.Name()))
			if err != nil {
				return err
			}
			texts = append(texts, tidy(string(data)))
		}
		return nil
	}
	for {
		if err := add(dir, licenceFile); err != nil {
			return nil, err
		}
		if len(texts) > 0 || dir == top || len(dir) < len(top) {
			break
		}
		dir = filepath.Dir(dir)
	}
	if len(texts) == 0 {
		return nil, errors.New("no licence in its directory")
	}
	return texts, add(top, noticeFile)
}

// tidy makes texts that differ only in white space at line ends equal.
func tidy(text string) string {
	var b strings.Builder
	for line := range strings.Lines(strings.Trim(strings.ReplaceAll(text, "\r\n", "\n"), "\n") + "\n") {
		b.WriteString(strings.TrimRight(line, " \t\n\f") + "\n")
	}
	return b.String()
}

// marks are phrases that stand in one licence only.
var marks = []struct{ licence, phrase string }{
	{"Apache-2.0", "apache license version 2.0"},
	{"Apache-2.0", "licensed under the apache license, version 2.0"},
	{"MPL-2.0", "mozilla public license version 2.0"},
	{"MPL-2.0", "mozilla public license, version 2.0"},
	{"MIT", "permission is hereby granted, free of charge, to any person obtaining a copy"},
	{"ISC", "permission to use, copy, modify, and distribute this software for any purpose with or without fee"},
	{"ISC", "permission to use, copy, modify, and/or distribute this software for any purpose with or without fee"},
	{"CC0-1.0", "cc0 1.0 universal"},
	{"Unlicense", "this is free and unencumbered software released into the public domain"},
	{"CC-BY-4.0", "creative commons attribution 4.0 international"},
	{"CC-BY-SA-4.0", "creative commons attribution-sharealike 4.0 international"},
	{"LGPL-2.1", "gnu lesser general public license version 2.1"},
	{"LGPL-3.0", "gnu lesser general public license version 3"},
	{"AGPL-3.0", "gnu affero general public license version 3"},
	{"GPL-2.0", "gnu general public license version 2"},
	{"GPL-3.0", "gnu general public license version 3"},
}

var (
	comment = regexp.MustCompile(`(?m)^\s*(//|#|\*)`)
	space   = regexp.MustCompile(`\s+`)
)

// classify names the licences whose words stand in a text, by SPDX
// identifier.
func classify(text string) []string {
	text = space.ReplaceAllString(comment.ReplaceAllString(strings.ToLower(text), " "), " ")
	var ids []string
	for _, m := range marks {
		if strings.Contains(text, m.phrase) && !slices.Contains(ids, m.licence) {
			ids = append(ids, m.licence)
		}
	}
	if strings.Contains(text, "redistribution and use in source and binary forms") {
		id := "BSD-2-Clause"
		if strings.Contains(text, "neither the name") || strings.Contains(text, "may not be used to endorse") || strings.Contains(text, "names of its contributors") {
			id = "BSD-3-Clause"
		}
		ids = append(ids, id)
	}
	return ids
}

// licencesOf names every licence of a module.
func licencesOf(m module) []string {
	var ids []string
	for _, t := range m.Texts {
		ids = append(ids, classify(t)...)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

const head = `Third-party notices

tutti is under the Apache License 2.0 (see LICENSE). The programs tutti and tutti-keeper contain the work of others, each
under its own licence: first a line for each piece, then the texts they refer to. "make notices" writes this file.

The keeper is linked statically with libseccomp and the GNU C Library, which are under the GNU Lesser General Public
License 2.1. To link it with other versions of them, build it on a machine that has those: "make keeper".

`

func write(w io.Writer, modules []module) error {
	var texts []string
	var b strings.Builder
	for _, m := range modules {
		ids := licencesOf(m)
		if len(ids) == 0 {
			return fmt.Errorf("%s: its licence has no words that we know", m.Path)
		}
		var numbers []string
		for _, t := range m.Texts {
			i := slices.Index(texts, t)
			if i < 0 {
				texts = append(texts, t)
				i = len(texts) - 1
			}
			numbers = append(numbers, fmt.Sprintf("[%d]", i+1))
		}
		fmt.Fprintf(&b, "%s\n", strings.Join(strings.Fields(strings.Join([]string{m.Path, m.Version, strings.Join(ids, ","), strings.Join(numbers, "")}, " ")), " "))
	}
	if _, err := io.WriteString(w, head+b.String()); err != nil {
		return err
	}
	for i, t := range texts {
		if _, err := fmt.Fprintf(w, "\n%s\n[%d]\n\n%s", strings.Repeat("=", 80), i+1, t); err != nil {
			return err
		}
	}
	return nil
}
