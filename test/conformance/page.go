package main

import (
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"text/tabwriter"
)

// area is a case's special interest group and feature.
var area = regexp.MustCompile(`^\[(sig-[a-z-]+)\] *(\[[A-Za-z]+\] )*([A-Za-z]*)`)

func areaOf(name string) string {
	m := area.FindStringSubmatch(name)
	if m == nil {
		return "other"
	}
	return m[1] + " " + m[3]
}

// tally counts the cases of one area.
type tally struct{ passed, failed, notRun int }

func (t *tally) add(state string) {
	switch state {
	case passed:
		t.passed++
	case failed:
		t.failed++
	default:
		t.notRun++
	}
}

func tallies(cases []string, r *results) (byArea map[string]*tally, all tally) {
	byArea = map[string]*tally{}
	for _, c := range cases {
		a := areaOf(c)
		if byArea[a] == nil {
			byArea[a] = &tally{}
		}
		byArea[a].add(r.last[c].State)
		all.add(r.last[c].State)
	}
	return byArea, all
}

// table prints what passed, by area, and names what failed.
func table(w io.Writer, cases []string, r *results) {
	byArea, all := tallies(cases, r)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "area\tpassed\tfailed\tnot run\t")
	for _, a := range slices.Sorted(maps.Keys(byArea)) {
		n := byArea[a]
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t\n", a, n.passed, n.failed, n.notRun)
	}
	fmt.Fprintf(t, "all\t%d\t%d\t%d\t\n", all.passed, all.failed, all.notRun)
	t.Flush()
	for _, c := range cases {
		if r.last[c].State == failed {
			fmt.Fprintln(w, "FAILED", c)
		}
	}
}

func writePage(file string, cases []string, r *results) error { return nil }
