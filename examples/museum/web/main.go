// Command web is the museum's web site. It sells tickets, knows what they
// cost, and leaves the invoices to the billing program, which asks it for the
// price.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

//go:embed page.html
var text string

var page = template.Must(template.New("page").Parse(text))

type exhibition struct {
	ID, Name string
	Cents    int
}

func (e exhibition) Price() string { return fmt.Sprintf("€ %d.%02d", e.Cents/100, e.Cents%100) }

var exhibitions = []exhibition{
	{"barrel", "Barrel organs", 900},
	{"punched", "Punched cards", 700},
	{"relay", "Relays at work", 1250},
}

// invoice is as billing writes it.
type invoice struct {
	Number     string `json:"number"`
	Exhibition string `json:"exhibition"`
	Cents      string `json:"cents"`
	PricedBy   string `json:"priced_by"` // the pod of this site that was asked
	Process    string `json:"process"`   // who wrote it
}

type site struct {
	billing string // base URL
	client  *http.Client
	pod     string
}

func main() {
	s := &site{billing: "http://billing", client: &http.Client{Timeout: 5 * time.Second}}
	if v := os.Getenv("BILLING_URL"); v != "" {
		s.billing = v
	}
	s.pod, _ = os.Hostname()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	server := &http.Server{Addr: ":8080", Handler: s.handler(), ReadHeaderTimeout: 5 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.ListenAndServe() }()
	slog.Info("serving", "address", server.Addr)
	select {
	case err := <-ended:
		slog.Error("web ended", "error", err)
		os.Exit(1)
	case <-ctx.Done():
	}
	closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := server.Shutdown(closing); err != nil {
		slog.Warn("requests were cut off", "error", err)
	}
}

func (s *site) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", s.show)
	mux.HandleFunc("POST /buy", s.buy)
	mux.HandleFunc("GET /prices/{exhibition}", s.price)
	mux.HandleFunc("GET /alive", func(http.ResponseWriter, *http.Request) {})
	return mux
}

func (s *site) show(w http.ResponseWriter, r *http.Request) {
	view := struct {
		Exhibitions []exhibition
		Invoices    []invoice
		Closed      bool
		Key, Pod    string
	}{Exhibitions: exhibitions, Key: rand.Text(), Pod: s.pod}
	if err := s.ask(r.Context(), http.MethodGet, nil, &view.Invoices); err != nil {
		slog.Warn("billing failed", "error", err)
		view.Closed = true
	}
	var out bytes.Buffer
	if err := page.Execute(&out, view); err != nil {
		slog.Error("page failed", "error", err)
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if view.Closed {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = out.WriteTo(w)
}

// buy has billing write an invoice. The page's key makes a second click
// harmless.
func (s *site) buy(w http.ResponseWriter, r *http.Request) {
	key, id := r.PostFormValue("key"), r.PostFormValue("exhibition")
	if key == "" || id == "" {
		http.Error(w, "exhibition and key are needed", http.StatusBadRequest)
		return
	}
	var written invoice
	if err := s.ask(r.Context(), http.MethodPost, url.Values{"key": {key}, "exhibition": {id}}, &written); err != nil {
		slog.Warn("invoice failed", "exhibition", id, "error", err)
		http.Error(w, "Billing is away. Go back and try again: you will not pay twice.", http.StatusServiceUnavailable)
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

func (s *site) price(w http.ResponseWriter, r *http.Request) {
	for _, e := range exhibitions {
		if e.ID == r.PathValue("exhibition") {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(map[string]any{"cents": e.Cents, "pod": s.pod})
			return
		}
	}
	http.Error(w, "no such exhibition", http.StatusNotFound)
}

// ask reads billing's answer into out.
func (s *site) ask(ctx context.Context, method string, form url.Values, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, s.billing+"/invoices", strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := s.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		said, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return errors.New(resp.Status + ": " + strings.TrimSpace(string(said)))
	}
	return json.NewDecoder(resp.Body).Decode(out)
}
