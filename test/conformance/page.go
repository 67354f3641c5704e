package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
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

// table prints what passed, by area, names what failed and closes with a line
// for machines.
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
	fmt.Fprintf(w, "%d passed, %d failed, %d not run\n", all.passed, all.failed, all.notRun)
}

// severalMachines are the cases that one machine can never pass.
var severalMachines = []string{
	"[sig-apps] Daemon set [Serial] should rollback without unnecessary restarts [Conformance]",
	"[sig-architecture] Conformance Tests should have at least two untainted nodes [Conformance]",
}

// writePage writes what all runs so far have said of all the suite's cases.
// Why a case fails, people write into the page below its name: what is there
// is kept.
func writePage(file string, all []string, r *results) error {
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p := page{results: r, causes: causesIn(string(old))}
	var conformance, beyond []string
	for _, c := range all {
		switch {
		case strings.Contains(c, "[Conformance]"):
			conformance = append(conformance, c)
		case strings.Contains(c, "[NodeConformance]"), r.last[c].State != "":
			beyond = append(beyond, c)
		}
	}
	p.WriteString(pageHead)
	p.chapter("[Conformance]", "", conformance)
	p.chapter("Beyond", pageBeyond, beyond)
	return os.WriteFile(file, []byte(p.String()), 0o644)
}

// page is a page in the making.
type page struct {
	strings.Builder
	results *results
	causes  map[string]string // by case
}

func (p *page) chapter(title, text string, cases []string) {
	byArea, all := tallies(cases, p.results)
	fmt.Fprintf(p, "\n## %s\n%sOf %d cases **%d passed, %d failed, %d were not run**.\n\n", title, text, len(cases), all.passed, all.failed, all.notRun)
	p.WriteString("| area | passed | failed | not run |\n|---|---|---|---|\n")
	for _, a := range slices.Sorted(maps.Keys(byArea)) {
		n := byArea[a]
		fmt.Fprintf(p, "| %s | %d | %d | %d |\n", a, n.passed, n.failed, n.notRun)
	}
	p.list("Failed", cases, func(state string) bool { return state == failed })
	p.list("Not run", cases, func(state string) bool { return state != failed && state != passed })
}

func (p *page) list(title string, cases []string, of func(state string) bool) {
	fmt.Fprintf(p, "\n### %s\n", title)
	none := true
	for _, c := range cases {
		last := p.results.last[c]
		if !of(last.State) {
			continue
		}
		none = false
		said, _, _ := strings.Cut(last.Message, "\n")
		fmt.Fprintf(p, "- `%s`  \n  %s\n", c, cmp.Or(p.causes[c], caseSays+cmp.Or(said, "nothing")))
	}
	if none {
		p.WriteString("None.\n")
	}
}

// caseSays begins what stands below a name for want of a cause.
const caseSays = "says: "

// causesIn finds in a page what stands below the name of each case.
func causesIn(page string) map[string]string {
	causes := map[string]string{}
	name := ""
	for line := range strings.Lines(page) {
		line = strings.TrimSpace(line)
		if rest, ok := strings.CutPrefix(line, "- `"); ok {
			name = strings.TrimSuffix(rest, "`")
		} else if name != "" {
			if !strings.HasPrefix(line, caseSays) {
				causes[name] = line
			}
			name = ""
		}
	}
	return causes
}

const pageHead = `# Conformance

How tutti does in the tests that judge any Kubernetes: upstream's unmodified ` + "`e2e.test`" + ` of v1.36.3 against ` + "`bin/tutti`" + ` on
one throwaway machine. What stands below the name of a case is written by people and kept; the rest of this page is written by
` + "`make conformance-page`" + `.

    make conformance                              all [Conformance] cases that have not passed yet, for 24 minutes at most
    make conformance SHARD=2/4                    the second of four parts
    make conformance FOCUS='Probing container'    cases by a regular expression, also such as are not [Conformance]
    make conformance SKIP='\[Serial\]' AGAIN=1    without some; those too that have passed before
    make conformance EACH=2                       two cases of each area
    make conformance CLASS=process                with all pods forced into a RuntimeClass; its results are kept apart
    make conformance-ci                           what CI runs: two of each area, none that mostly waits or wants to be alone

CI takes two of each area because an area is a feature, and what breaks a feature rarely spares two of its cases: 137 cases in two
minutes on two quiet cores. Other cases are run when their area is worked on, and all before a release. The last line that is printed
is for machines: ` + "`137 passed, 0 failed, 0 not run`" + `; the exit status is 1 when a case failed, said nothing or none matched.

Programs, images, logs, JUnit and results stay in ` + "`dist/conformance`" + `; a case's result is kept when the case ends, so a run that is
killed loses only the running ones. The suite's images are made from its own sources and Debian's packages and served by a registry
outside the machine under the names that the suite expects. Where upstream's image is Alpine, or nginx's own, ours is Debian with the
same programs: test/conformance/images.go has the list.
`

const pageBeyond = `What else of the suite has been run: all of [NodeConformance], and what else judges what tutti claims.
`
