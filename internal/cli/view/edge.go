package view

import (
	"fmt"
	"strings"

	"tutti.dev/tutti/internal/app"
)

// edge is a connection as one of its ends sees it.
type edge struct {
	app.Connection
	in    bool
	other string
}

// edges are those that a service tells of: whom it calls, and who calls it
// and has no line of its own to say so.
func (p *picture) edges(a app.App, s app.Service) []edge {
	self := app.Peer{Kind: s.Kind, App: a.Name, Namespace: a.Namespace, Name: s.Name}
	var in, out []edge
	for _, c := range p.Connections {
		if c.To == self && (c.From.Kind == app.PeerOutside || c.From.Kind == app.PeerNode) {
			in = append(in, edge{c, true, called(c.From, a, c.Addresses)})
		}
		if c.From == self {
			out = append(out, edge{c, false, called(c.To, a, c.Addresses)})
		}
	}
	return append(in, out...)
}

// called is what a peer is called in an application's lines: by its name as
// DNS has it.
func called(p app.Peer, in app.App, addresses int) string {
	switch {
	case p.Kind == app.PeerOutside && addresses == 1:
		return "outside " + p.Name
	case p.Kind == app.PeerOutside:
		return fmt.Sprintf("outside, %d addresses", addresses)
	case p.Kind == app.PeerNode:
		return "node " + p.Name
	case p.Namespace != in.Namespace:
		return p.Name + "." + p.Namespace
	}
	return p.Name
}

// pieces are an arrow, whom it goes to or comes from, and how much.
func (e edge) pieces() []piece {
	arrow := "→ "
	if e.in {
		arrow = "← "
	}
	port := fmt.Sprintf(":%d", e.Port)
	if e.Protocol != "tcp" {
		port += "/" + e.Protocol
	}
	to := e.other + port
	if strings.Contains(e.other, " ") {
		to = e.other + " " + port
	}
	if e.Service != "" && e.Service != e.To.Name {
		to += " as " + e.Service
	}
	var counts []string
	if e.Open > 0 {
		counts = append(counts, fmt.Sprintf("%d open", e.Open))
	}
	if e.Recent > 0 {
		counts = append(counts, fmt.Sprintf("%d recent", e.Recent))
	}
	if e.Bytes > 0 {
		counts = append(counts, bytes(e.Bytes))
	}
	of := plain
	if e.Open == 0 && e.Waiting == 0 {
		of = dim // it was
	}
	all := []piece{{arrow, dim}, {clean(to), of}}
	if len(counts) > 0 {
		all = append(all, piece{"  " + strings.Join(counts, ", "), dim})
	}
	if e.Waiting > 0 {
		all = append(all, piece{fmt.Sprintf("  %d without an answer", e.Waiting), red})
	}
	return all
}
