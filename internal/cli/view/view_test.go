package view

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/app"
	"tutti.dev/tutti/test/golden"
)

var (
	noon = time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
)

func ago(d time.Duration) *time.Time {
	t := noon.Add(-d)
	return &t
}

func use(cpu float64, mib int64) *app.Usage { return &app.Usage{CPU: cpu, Memory: mib << 20} }

func well(name, kind string, pods int, cpu float64, mib int64) app.Service {
	return app.Service{Name: name, Kind: kind, Ready: pods, Desired: pods, Created: *ago(3 * time.Hour), Version: "1.4", OK: true, State: "ready", Usage: use(cpu, mib)}
}

func shopPeer(name, kind string) app.Peer {
	return app.Peer{Kind: kind, App: "shop", Namespace: "shop", Name: name}
}

// quiet is a cluster in which nothing is wrong.
func quiet() app.Status {
	front := well("front", "Deployment", 2, 0.003, 9)
	front.URLs, front.Addresses = []string{"http://192.0.2.10:30080"}, []string{"front.shop:80"}
	report := well("report", "CronJob", 0, 0, 0)
	report.Usage = nil
	outside := app.Peer{Kind: app.PeerOutside}
	one := app.Peer{Kind: app.PeerOutside, Name: "203.0.113.9"}
	return app.Status{
		Ready: true,
		Nodes: []app.Node{{Name: "vm", Ready: true, Schedulable: true, Address: "192.0.2.10", Capacity: app.Usage{CPU: 4, Memory: 16 << 30}, Usage: use(0.5, 3000)}},
		Apps: []app.App{
			{Name: "", Namespace: "default", Ready: true, Services: []app.Service{well("toolbox", "Pod", 1, 0, 1)}},
			{Name: "shop", Namespace: "shop", Ready: true, Services: []app.Service{
				well("db", "StatefulSet", 1, 0.0124, 1200), front, well("orders", "Deployment", 2, 1.25, 20), report,
			}},
		},
		Connections: []app.Connection{
			{From: outside, To: shopPeer("front", "Deployment"), Service: "front", Protocol: "tcp", Port: 30080, Open: 12, Recent: 40, Addresses: 7},
			{From: app.Peer{Kind: app.PeerNode, Name: "vm"}, To: shopPeer("front", "Deployment"), Service: "web", Protocol: "tcp", Port: 30080, Recent: 1},
			{From: shopPeer("front", "Deployment"), To: shopPeer("orders", "Deployment"), Service: "orders", Protocol: "tcp", Port: 80, Open: 4, Bytes: 5 << 20},
			{From: shopPeer("orders", "Deployment"), To: shopPeer("db", "StatefulSet"), Protocol: "tcp", Port: 5432, Open: 8},
			{From: shopPeer("orders", "Deployment"), To: one, Protocol: "tcp", Port: 443, Open: 1, Addresses: 1},
			{From: shopPeer("report", "CronJob"), To: shopPeer("db", "StatefulSet"), Protocol: "udp", Port: 5432, Recent: 1},
			{From: app.Peer{Kind: "Pod", Namespace: "default", Name: "toolbox"}, To: app.Peer{Kind: app.PeerService, Namespace: "default", Name: "kubernetes"}, Service: "kubernetes", Protocol: "tcp", Port: 443, Open: 1},
			{From: app.Peer{Kind: "Pod", Namespace: "default", Name: "toolbox"}, To: shopPeer("front", "Deployment"), Service: "front", Protocol: "tcp", Port: 80, Open: 1},
		},
	}
}

// trouble is one in which much is.
func troubled() app.Status {
	s := quiet()
	shop := &s.Apps[1]
	shop.Ready = false
	db, orders, front := &shop.Services[0], &shop.Services[2], &shop.Services[1]
	db.OK, db.Ready, db.State, db.Restarts, db.LastRestart, db.Usage = false, 0, "0 of 1 ready", 14, ago(90*time.Second), nil
	db.Problems = []string{"CrashLoopBackOff: exit code 1: \x1b[2J" + strings.Repeat("cannot write to the volume, ", 12) + "which is full"}
	orders.OK, orders.Ready, orders.State = false, 1, "1 of 2 ready"
	orders.Restarts, orders.LastRestart = 2, ago(26*time.Hour)
	front.OK, front.State, front.Version, front.Replaces = false, "1 of 2 updated", "1.5", []string{"1.4"}
	s.Connections[3].Open, s.Connections[3].Waiting = 0, 3
	s.Nodes = append(s.Nodes, app.Node{Name: "old", Address: "192.0.2.11", Problems: []string{"NodeStatusUnknown: it has not been heard of"}})
	s.Notes = []string{"CPU and memory are not shown: this cluster has no metrics API; install a metrics server"}
	return s
}

func TestDraw(t *testing.T) {
	silent := quiet()
	silent.Silent = ago(7 * time.Second)
	blind := quiet()
	blind.Nodes, blind.Notes = nil, []string{"nodes are not shown: it takes the right to list and watch them; ask the cluster's administrator for it"}
	many := quiet()
	for range 20 {
		many.Apps = append(many.Apps, troubled().Apps[1])
	}
	for _, c := range []struct {
		name string
		s    app.Status
		o    Options
	}{
		{"quiet-plain", quiet(), Options{}},
		{"quiet-80x24", quiet(), Options{Width: 79, Height: 24, Hint: "q: quit"}},
		{"quiet-80x20", quiet(), Options{Width: 79, Height: 20, Hint: "q: quit"}},
		{"quiet-40x10", quiet(), Options{Width: 39, Height: 10, Hint: "q: quit"}},
		{"quiet-140x40", quiet(), Options{Width: 139, Height: 40, Hint: "q: quit"}},
		{"blind-plain", blind, Options{}},
		{"troubled-plain", troubled(), Options{}},
		{"troubled-80x24", troubled(), Options{Width: 79, Height: 24, Hint: "q: quit"}},
		{"troubled-80x40", troubled(), Options{Width: 79, Height: 40, Hint: "q: quit"}},
		{"troubled-140x40", troubled(), Options{Width: 139, Height: 40, Hint: "q: quit"}},
		{"troubled-colour", troubled(), Options{Width: 79, Height: 40, Colour: true}},
		{"quiet-1x1", quiet(), Options{Width: 1, Height: 1}},
		{"silent", silent, Options{Width: 79, Height: 24}},
		{"empty", app.Status{Nodes: []app.Node{}}, Options{Width: 79, Height: 24, Hint: "q: quit"}},
		{"many", many, Options{Width: 79, Height: 24, Hint: "q: quit"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			lines := Draw(c.s, noon, c.o)
			if c.o.Height > 0 && len(lines) > c.o.Height {
				t.Errorf("%d lines do not fit %d", len(lines), c.o.Height)
			}
			for _, l := range lines {
				if !c.o.Colour && c.o.Width > 0 && columns(l) > c.o.Width {
					t.Errorf("%d columns do not fit %d: %s", columns(l), c.o.Width, l)
				}
				if !c.o.Colour && strings.ContainsRune(l, '\x1b') {
					t.Errorf("what moves the cursor: %q", l)
				}
			}
			golden.Check(t, filepath.Join("testdata", c.name+".txt"), strings.Join(lines, "\n")+"\n")
		})
	}
}

// A figure that changes moves nothing else.
func TestColumnsStay(t *testing.T) {
	s := quiet()
	before := Draw(s, noon, Options{Width: 79, Height: 40})
	s.Apps[1].Services[0].Usage = use(0.1, 800)
	after := Draw(s, noon, Options{Width: 79, Height: 40})
	var changed []string
	for i := range before {
		if before[i] != after[i] {
			changed = append(changed, after[i])
		}
	}
	if len(before) != len(after) || len(changed) != 2 { // the service's, and the sum of its application
		t.Errorf("changed: %q", changed)
	}
}

func TestText(t *testing.T) {
	if got := clean("a\tb\x1b[2J\u0007c\u202ed é 漢"); got != "a b[2Jcd é 漢" {
		t.Errorf("clean: %q", got)
	}
	for s, want := range map[string]int{"": 0, "abc": 3, "é": 1, "e\u0301": 1, "漢字": 4, "✓ …": 3} {
		if got := columns(s); got != want {
			t.Errorf("%q takes %d columns, want %d", s, got, want)
		}
	}
	for _, c := range []struct {
		text string
		most int
		want string
	}{{"abcdef", 6, "abcdef"}, {"abcdef", 5, "abcd…"}, {"漢字漢", 5, "漢字…"}, {"漢字漢", 4, "漢…"}, {"abc", 1, "…"}, {"abc", 0, ""}} {
		if got := cut(c.text, c.most); got != c.want {
			t.Errorf("cut(%q, %d) = %q, want %q", c.text, c.most, got, c.want)
		}
	}
	for _, c := range []struct {
		text        string
		most, lines int
		want        string
	}{
		{"one two three", 20, 3, "one two three"},
		{"one two three", 8, 3, "one two|three"},
		{"one two three four", 8, 2, "one two|three f…"},
		{"onetwothreefour", 8, 3, "onetwot…"},
	} {
		if got := strings.Join(wrap(c.text, c.most, c.lines), "|"); got != c.want {
			t.Errorf("wrap(%q, %d, %d) = %q, want %q", c.text, c.most, c.lines, got, c.want)
		}
	}
}
