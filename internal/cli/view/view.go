// Package view draws what a cluster runs as a tree: applications, their
// services, and under each who it talks to. It decides only what is where;
// nothing here knows a terminal.
//
// What is not well comes first and is told in full; what is well gives way
// where there is too little room. A column stays where it is while figures
// change.
package view

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/duration"

	"tutti.dev/tutti/internal/app"
)

// Options are what the picture has to fit.
type Options struct {
	Width, Height int // 0: as much as it takes
	Colour        bool
	Hint          string // what can be done here, for the upper right corner
}

// room is how much is told of what is well, the most first.
type room int

const (
	everything  room = iota
	oneLine          // who talks to whom in a line for each service
	onlyTrouble      // nothing of who talks to whom but what gets no answer
	folded           // what is well in one line for each application
	least            // as folded, and messages in one line
)

// Draw draws a status as it is at a moment. No line is longer than the width,
// and if it has to be, the last says how many are missing.
func Draw(s app.Status, now time.Time, o Options) []string {
	var lines []line
	for r := everything; r <= least; r++ {
		p := picture{Status: s, now: now, Options: o, room: r}
		if lines = p.draw(); o.Height == 0 || len(lines) <= o.Height {
			break
		}
	}
	if o.Height > 0 && len(lines) > o.Height {
		missing := len(lines) - o.Height + 1
		lines = append(lines[:o.Height-1], line{{fmt.Sprintf("… and %d lines more, in a higher window or by `tutti status`", missing), dim}})
	}
	out := make([]string, len(lines))
	for i, l := range lines {
		out[i] = l.render(o.Width, o.Colour)
	}
	return out
}

// picture is one attempt at it.
type picture struct {
	app.Status
	Options
	now   time.Time
	room  room
	lines []line
	cols  []column
	names int // columns of a terminal that names have
}

func (p *picture) add(pieces ...piece) { p.lines = append(p.lines, pieces) }

func (p *picture) draw() []line {
	p.layout()
	p.headline()
	well := func(n app.Node) bool { return n.Ready && n.Schedulable && len(n.Problems) == 0 }
	for _, n := range p.Nodes {
		if !well(n) {
			p.node(n)
		}
	}
	p.add()
	if len(p.Apps) > 0 {
		p.titles()
	} else {
		p.add(piece{"No application runs; deploy one with `tutti up PATH`.", plain})
	}
	apps := slices.Clone(p.Apps)
	slices.SortStableFunc(apps, func(a, b app.App) int { return cmp.Compare(trouble(a), trouble(b)) })
	for i, a := range apps {
		p.app(a)
		if i < len(apps)-1 && p.room < onlyTrouble {
			p.add()
		}
	}
	p.add()
	for _, n := range p.Nodes {
		if well(n) {
			p.node(n)
		}
	}
	for _, n := range p.Notes {
		p.told("", piece{"!", dim}, clean(n), 2)
	}
	return p.lines
}

// trouble is 0 for what has failed, 1 for what is on its way, 2 for the rest.
func trouble(a app.App) int {
	worst := 2
	for _, s := range a.Services {
		worst = min(worst, severity(s))
	}
	return worst
}

func severity(s app.Service) int {
	switch {
	case !s.OK && len(s.Problems) > 0, len(s.Problems) > 0 && s.Kind == "CronJob":
		return 0
	case !s.OK || len(s.Problems) > 0:
		return 1
	}
	return 2
}

var (
	marks = []piece{{"✗", red}, {"…", yellow}, {"✓", green}}
	alarm = piece{"!", red}
)

// headline says at a glance whether anything is to be done.
func (p *picture) headline() {
	var bad, coming []string
	for _, a := range p.Apps {
		switch trouble(a) {
		case 0:
			bad = append(bad, title(a))
		case 1:
			coming = append(coming, title(a))
		}
	}
	down := 0
	for _, n := range p.Nodes {
		if !n.Ready {
			down++
		}
	}
	var text piece
	mark := marks[2]
	switch {
	case p.Silent != nil:
		mark, text = marks[0], piece{fmt.Sprintf("the API has not answered for %s; this is what was seen before", duration.HumanDuration(p.now.Sub(*p.Silent))), red}
	case p.Nodes != nil && len(p.Nodes) == 0:
		mark, text = marks[1], piece{"no node has joined yet", yellow}
	case down > 0 || len(bad) > 0:
		var what []string
		if down > 0 {
			what = append(what, fmt.Sprintf("%d of %s not ready", down, count(len(p.Nodes), "node")))
		}
		if len(bad) > 0 {
			what = append(what, "trouble in "+some(bad))
		}
		mark, text = marks[0], piece{strings.Join(what, "; "), red}
	case len(coming) > 0:
		mark, text = marks[1], piece{"on its way: " + some(coming), yellow}
	default:
		text = piece{"all well: " + count(len(p.Apps), "application"), plain}
		if p.Nodes != nil {
			text.text += " on " + count(len(p.Nodes), "node")
		}
	}
	text.text = clean(text.text)
	if p.Hint != "" && p.Width > 0 {
		space := p.Width - columns(p.Hint) - 2
		text.text = cut(text.text, space-1)
		p.add(mark, piece{" ", plain}, text, piece{strings.Repeat(" ", max(1, space-columns(text.text))) + p.Hint, dim})
		return
	}
	p.add(mark, piece{" ", plain}, text)
}

// some names the first of several.
func some(names []string) string {
	if len(names) > 3 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:2], ", "), len(names)-2)
	}
	return strings.Join(names, ", ")
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func title(a app.App) string {
	switch {
	case a.Name == "":
		return a.Namespace + " (no app)"
	case a.Name != a.Namespace:
		return a.Name + " in " + a.Namespace
	}
	return a.Name
}

// column is one of the table's, to the right of the names.
type column struct {
	title string
	width int
	left  bool // adjusted to the left
	// need is how important it is: the highest goes first where it is narrow.
	need int
	of   func(p *picture, s app.Service) piece
}

var table = []column{
	{"KIND", 11, true, 8, func(_ *picture, s app.Service) piece { return piece{s.Kind, dim} }},
	{"READY", 6, false, 0, ready},
	{"VERSION", 9, true, 5, func(_ *picture, s app.Service) piece { return piece{versions(s), plain} }},
	{"RESTARTS", 9, false, 2, restarts},
	{"CPU", 6, false, 3, func(_ *picture, s app.Service) piece { return used(s.Usage, cpu) }},
	{"MEMORY", 7, false, 4, func(_ *picture, s app.Service) piece { return used(s.Usage, memory) }},
	{"AGE", 5, false, 6, func(p *picture, s app.Service) piece {
		return piece{duration.HumanDuration(p.now.Sub(s.Created)), plain}
	}},
	{"ADDRESS", 30, true, 9, func(_ *picture, s app.Service) piece { return piece{address(s), dim} }},
}

const (
	leastNames = 18
	goodNames  = 24
	gap        = 2
)

// layout chooses the columns that there is room for.
func (p *picture) layout() {
	p.cols = slices.Clone(table)
	longest := goodNames
	for i, c := range p.cols {
		if c.title != "VERSION" {
			continue
		}
		for _, a := range p.Apps {
			for _, s := range a.Services {
				longest = max(longest, 5+columns(clean(s.Name)))
				if p.Width == 0 || p.Width >= 100 {
					p.cols[i].width = max(p.cols[i].width, min(24, columns(versions(s))))
				}
			}
		}
	}
	sum := func() int {
		n := 0
		for _, c := range p.cols {
			n += gap + c.width
		}
		return n
	}
	for p.Width > 0 && len(p.cols) > 1 && sum()+leastNames > p.Width {
		last := slices.MaxFunc(p.cols, func(a, b column) int { return cmp.Compare(a.need, b.need) })
		p.cols = slices.DeleteFunc(p.cols, func(c column) bool { return c.need == last.need })
	}
	p.names = longest
	if p.Width > 0 {
		p.names = max(1, min(longest, p.Width-sum()))
	}
}

// row is a line of the table.
func (p *picture) row(name []piece, cell func(c column) piece) {
	l := line{}
	left := p.names
	for _, n := range name {
		n.text = cut(n.text, left)
		left -= columns(n.text)
		l = append(l, n)
	}
	l = append(l, piece{strings.Repeat(" ", left), plain})
	for i, c := range p.cols {
		got := cell(c)
		if i < len(p.cols)-1 || !c.left {
			got.text = cut(got.text, c.width)
		}
		pad := piece{strings.Repeat(" ", max(0, c.width-columns(got.text))), plain}
		l = append(l, piece{"  ", plain})
		if c.left {
			l = append(l, got, pad)
		} else {
			l = append(l, pad, got)
		}
	}
	p.lines = append(p.lines, l)
}

func (p *picture) titles() {
	p.row(nil, func(c column) piece { return piece{c.title, dim} })
}

func (p *picture) app(a app.App) {
	mark := marks[trouble(a)]
	all := app.Service{}
	for _, s := range a.Services {
		if s.Usage != nil {
			if all.Usage == nil {
				all.Usage = &app.Usage{}
			}
			all.Usage.CPU, all.Usage.Memory = all.Usage.CPU+s.Usage.CPU, all.Usage.Memory+s.Usage.Memory
		}
	}
	fold := p.room >= folded && trouble(a) == 2
	p.row([]piece{mark, {" ", plain}, {title(a), bold}}, func(c column) piece {
		switch {
		case c.title == "CPU":
			return used(all.Usage, cpu)
		case c.title == "MEMORY":
			return used(all.Usage, memory)
		case c.title == "READY" && fold:
			return piece{"all " + strconv.Itoa(len(a.Services)), plain}
		}
		return piece{}
	})
	if fold {
		return
	}
	services := slices.Clone(a.Services)
	slices.SortStableFunc(services, func(a, b app.Service) int { return cmp.Compare(severity(a), severity(b)) })
	shown := len(services)
	if p.room >= folded {
		shown = slices.IndexFunc(services, func(s app.Service) bool { return severity(s) == 2 })
		if shown < 0 || shown == len(services)-1 {
			shown = len(services)
		}
	}
	for i, s := range services[:shown] {
		branch, below := "├ ", "│   "
		if i == len(services)-1 {
			branch, below = "└ ", "    "
		}
		mark := marks[severity(s)]
		if s.Kind == "CronJob" && severity(s) == 2 || s.OK && s.Desired == 0 {
			mark = piece{"·", dim}
		}
		p.row([]piece{{branch, dim}, mark, {" ", plain}, {clean(s.Name), plain}}, func(c column) piece {
			got := c.of(p, s)
			got.text = clean(got.text)
			return got
		})
		p.service(a, s, below)
	}
	if more := len(services) - shown; more > 0 {
		p.add(piece{"└ ", dim}, marks[2], piece{fmt.Sprintf(" and %d more", more), dim})
	}
}

// service tells what is wrong with a service, and who it talks to.
func (p *picture) service(a app.App, s app.Service, below string) {
	if !s.OK && len(s.Problems) == 0 && !strings.HasPrefix(s.State, fmt.Sprintf("%d of %d ", s.Ready, s.Desired)) { // as its row does
		p.told(below, marks[1], clean(s.State), 2)
	}
	for _, pr := range s.Problems {
		lines := 3
		if p.room == least {
			lines = 1
		}
		p.told(below, alarm, clean(pr), lines)
	}
	edges := p.edges(a, s)
	if p.room >= onlyTrouble {
		edges = slices.DeleteFunc(edges, func(e edge) bool { return e.Waiting == 0 })
	}
	if p.room < oneLine {
		for _, e := range edges {
			p.add(append([]piece{{below, dim}}, e.pieces()...)...)
		}
	} else if len(edges) > 0 {
		l := line{{below, dim}}
		for i, e := range edges {
			if i > 0 {
				l = append(l, piece{"  ", plain})
			}
			l = append(l, e.pieces()[:2]...)
			if e.Waiting > 0 {
				l = append(l, piece{" no answer", red})
			}
		}
		p.lines = append(p.lines, l)
	}
}

// told is a message of some lines, the first of which has a mark.
func (p *picture) told(below string, mark piece, text string, lines int) {
	all := []string{text}
	if p.Width > 0 {
		all = wrap(text, max(1, p.Width-columns(below)-2), lines)
	}
	for _, l := range all {
		p.add(piece{below, dim}, mark, piece{" " + l, plain})
		mark = piece{" ", plain}
	}
}

func (p *picture) node(n app.Node) {
	mark, state := marks[2], "ready"
	switch {
	case !n.Ready:
		mark, state = marks[0], "not ready"
	case !n.Schedulable:
		mark, state = marks[1], "ready, takes no new pods"
	case len(n.Problems) > 0:
		mark = marks[1]
	}
	l := line{mark, {" ", plain}, {"node " + clean(n.Name), bold}, {"  " + n.Address + "  " + state, plain}}
	if u, c := n.Usage, n.Capacity; u != nil && c.CPU > 0 && c.Memory > 0 {
		l = append(l, piece{fmt.Sprintf("  CPU %.0f %% of %g  memory %s of %s", 100*u.CPU/c.CPU, c.CPU, memory(*u), memory(c)), dim})
	}
	p.lines = append(p.lines, l)
	for _, pr := range n.Problems {
		p.told("  ", alarm, clean(pr), 3)
	}
}

func ready(_ *picture, s app.Service) piece {
	if s.Kind == "CronJob" {
		return piece{"-", dim}
	}
	text := fmt.Sprintf("%d/%d", s.Ready, s.Desired)
	if !s.OK {
		return piece{text, yellow}
	}
	return piece{text, plain}
}

// restarts shows the last only as long as it may explain something.
func restarts(p *picture, s app.Service) piece {
	text := strconv.Itoa(s.Restarts)
	if s.LastRestart == nil {
		return piece{text, plain}
	}
	ago := p.now.Sub(*s.LastRestart)
	of := plain
	if ago < time.Hour {
		of = yellow
	}
	return piece{fmt.Sprintf("%s (%s)", text, duration.ShortHumanDuration(ago)), of}
}

func versions(s app.Service) string {
	if len(s.Replaces) == 0 {
		return s.Version
	}
	return strings.Join(s.Replaces, ",") + "→" + s.Version
}

func address(s app.Service) string {
	all := slices.Concat(s.URLs, s.Addresses)
	switch len(all) {
	case 0:
		return ""
	case 1:
		return all[0]
	}
	return fmt.Sprintf("%s (+%d)", all[0], len(all)-1)
}

func used(u *app.Usage, as func(app.Usage) string) piece {
	if u == nil {
		return piece{"-", dim}
	}
	return piece{as(*u), plain}
}

// cpu is in thousandths of a processor, as kubectl top has it.
func cpu(u app.Usage) string { return fmt.Sprintf("%.0fm", u.CPU*1000) }

func memory(u app.Usage) string { return bytes(uint64(u.Memory)) }

func bytes(n uint64) string {
	units := []string{"", "Ki", "Mi", "Gi", "Ti", "Pi"}
	f, i := float64(n), 0
	for ; f >= 1000 && i < len(units)-1; i++ {
		f /= 1024
	}
	if f < 9.95 && i > 0 {
		return fmt.Sprintf("%.1f%s", f, units[i])
	}
	return fmt.Sprintf("%.0f%s", f, units[i])
}
