package main

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// compatible are the licences whose work may be linked into tutti. The lesser
// GPL is only for the C libraries that anyone can exchange by building anew.
var compatible = []string{"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "MIT", "MPL-2.0", "Unlicense"}

func TestNoticesAreCurrent(t *testing.T) {
	text, err := os.ReadFile("../../THIRD_PARTY_NOTICES")
	if err != nil {
		t.Fatalf("run make notices: %v", err)
	}
	modules, err := linked("../..", targets)
	if err != nil {
		t.Fatal(err)
	}
	noted := map[string]bool{}
	list, _, _ := strings.Cut(string(text), "\n====")
	for line := range strings.Lines(list) {
		if f := strings.Fields(line); len(f) >= 3 && strings.HasPrefix(f[len(f)-1], "[") {
			noted[strings.Join(f[:len(f)-2], " ")] = true
		}
	}
	for _, m := range modules {
		name := strings.TrimSpace(m.Path + " " + m.Version)
		if !noted[name] {
			t.Errorf("THIRD_PARTY_NOTICES lacks %s: run make notices", name)
		}
		delete(noted, name)
		ids := licencesOf(m)
		if len(ids) == 0 {
			t.Errorf("%s: its licence has no words that we know", name)
		}
		for _, id := range ids {
			if !slices.Contains(compatible, id) {
				t.Errorf("%s is under %s: tutti cannot link it", name, id)
			}
		}
	}
	for name := range noted {
		if !strings.HasSuffix(name, "(C, in tutti-keeper)") {
			t.Errorf("THIRD_PARTY_NOTICES has %s, which is not linked: run make notices", name)
		}
	}
	if len(text) > 1_500_000 {
		t.Errorf("THIRD_PARTY_NOTICES has %d bytes", len(text))
	}
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string
	}{
		{"                     Apache License\n               Version 2.0, January 2004", []string{"Apache-2.0"}},
		{"// Licensed under the Apache License, Version 2.0 (the \"License\");", []string{"Apache-2.0"}},
		{"Permission is hereby granted, free of charge, to any person obtaining\na copy of this software", []string{"MIT"}},
		{"Redistribution and use in source and binary forms, with or without", []string{"BSD-2-Clause"}},
		{"Redistribution and use in source and binary forms ... * Neither the name of", []string{"BSD-3-Clause"}},
		{"Mozilla Public License, version 2.0 ... the GNU General Public License, Version 2.0", []string{"MPL-2.0"}},
		{"GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", []string{"GPL-3.0"}},
		{"GNU LESSER GENERAL PUBLIC LICENSE\n   Version 2.1, February 1999", []string{"LGPL-2.1"}},
		{"All rights reserved.", nil},
	} {
		if got := classify(c.text); !slices.Equal(got, c.want) {
			t.Errorf("%q is %q, want %q", c.text, got, c.want)
		}
	}
}
