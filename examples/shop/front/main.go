// Command front is the shop's window: one page with what there is to buy and
// what has been bought.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"embed"
	"encoding/json"
	"fmt"
	"html/template"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"tutti.dev/tutti/examples/shop/serve"
)

//go:embed page.html style.css
var files embed.FS

var page = template.Must(template.New("page.html").Funcs(template.FuncMap{
	"euro": func(cents int) string { return fmt.Sprintf("€ %d.%02d", cents/100, cents%100) },
	"time": func(t time.Time) string { return t.UTC().Format("15:04:05") },
}).ParseFS(files, "page.html"))

func main() {
	ctx, stop := serve.Context()
	defer stop()
	f := &front{
		catalogue: env("CATALOGUE_URL", "http://catalogue"),
		orders:    env("ORDERS_URL", "http://orders"),
		client:    &http.Client{Timeout: 5 * time.Second},
	}
	f.pod, _ = os.Hostname()
	if err := serve.HTTP(ctx, ":8080", f.handler(), nil); err != nil {
		slog.Error("front ended", "error", err)
		os.Exit(1)
	}
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

type front struct {
	catalogue, orders string // base URLs of the two APIs
	client            *http.Client
	pod               string
}

type item struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Text  string `json:"text"`
	Price int    `json:"price"`
}

type order struct {
	ID      int64     `json:"id"`
	Item    string    `json:"item"`
	Price   int       `json:"price"`
	State   string    `json:"state"`
	Created time.Time `json:"created"`
}

func (f *front) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", f.show)
	mux.HandleFunc("POST /buy", f.buy)
	mux.Handle("GET /style.css", http.FileServerFS(files))
	return mux
}

// show renders what it can: a part whose API does not answer says so in its
// own place.
func (f *front) show(w http.ResponseWriter, r *http.Request) {
	view := struct {
		Items    []item
		Orders   []order
		Problems []string
		Key, Pod string
	}{Key: rand.Text(), Pod: f.pod}
	if err := f.call(r.Context(), http.MethodGet, f.catalogue+"/items", nil, &view.Items); err != nil {
		slog.Warn("catalogue failed", "error", err)
		view.Problems = append(view.Problems, "The catalogue is away for a moment.")
	}
	if err := f.call(r.Context(), http.MethodGet, f.orders+"/orders", nil, &view.Orders); err != nil {
		slog.Warn("orders failed", "error", err)
		view.Problems = append(view.Problems, "The orders are away for a moment. Nothing is lost.")
	}
	var out bytes.Buffer
	if err := page.Execute(&out, view); err != nil {
		slog.Error("page failed", "error", err)
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	if len(view.Problems) > 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = out.WriteTo(w)
}

// buy asks the catalogue for the price (never the browser) and places the
// order. The page's key makes a second click harmless.
func (f *front) buy(w http.ResponseWriter, r *http.Request) {
	key, id := r.PostFormValue("key"), r.PostFormValue("item")
	if key == "" || id == "" {
		http.Error(w, "item and key are needed", http.StatusBadRequest)
		return
	}
	var it item
	err := f.call(r.Context(), http.MethodGet, f.catalogue+"/items/"+url.PathEscape(id), nil, &it)
	if err == nil {
		body := map[string]any{"key": key, "item": it.ID, "price": it.Price}
		err = f.call(r.Context(), http.MethodPost, f.orders+"/orders", body, nil)
	}
	if err != nil {
		slog.Warn("order failed", "item", id, "error", err)
		http.Error(w, "The order could not be placed. Go back and try again: you will not pay twice.", http.StatusServiceUnavailable)
		return
	}
	http.Redirect(w, r, "/", http.StatusSeeOther)
}

// call sends in as JSON, where there is one, and reads the answer into out.
func (f *front) call(ctx context.Context, method, target string, in, out any) error {
	var body io.Reader
	if in != nil {
		data, err := json.Marshal(in)
		if err != nil {
			return err
		}
		body = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, target, body)
	if err != nil {
		return err
	}
	resp, err := f.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return fmt.Errorf("%s %s: %s: %s", method, target, resp.Status, strings.TrimSpace(string(text)))
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}
