package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// apis stands in for the two APIs and keeps what was ordered.
func apis(t *testing.T) (*httptest.Server, *[]map[string]any) {
	placed := new([]map[string]any)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`[{"id":"tea","name":"Tea <strong>","price":450}]`))
	})
	mux.HandleFunc("GET /items/tea", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"id":"tea","price":450}`))
	})
	mux.HandleFunc("GET /orders", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`[{"id":7,"item":"tea","price":450,"state":"shipped"}]`))
	})
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var o map[string]any
		if err := json.NewDecoder(r.Body).Decode(&o); err != nil {
			t.Error(err)
		}
		*placed = append(*placed, o)
		w.WriteHeader(http.StatusCreated)
	})
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return srv, placed
}

func TestShow(t *testing.T) {
	srv, _ := apis(t)
	f := &front{catalogue: srv.URL, orders: srv.URL, client: srv.Client()}
	w := httptest.NewRecorder()
	f.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	for _, want := range []string{"Tea &lt;strong&gt;", "€ 4.50", `class="state shipped"`, `name="key"`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("page lacks %q", want)
		}
	}
}

func TestShowWithoutOrders(t *testing.T) {
	srv, _ := apis(t)
	f := &front{catalogue: srv.URL, orders: srv.URL + "/gone", client: srv.Client()}
	w := httptest.NewRecorder()
	f.handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	if w.Code != http.StatusServiceUnavailable || !strings.Contains(w.Body.String(), "Nothing is lost") || !strings.Contains(w.Body.String(), "Tea") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

func TestBuy(t *testing.T) {
	srv, placed := apis(t)
	f := &front{catalogue: srv.URL, orders: srv.URL, client: srv.Client()}
	for _, c := range []struct {
		name string
		form url.Values
		code int
	}{
		{"buy", url.Values{"key": {"k"}, "item": {"tea"}, "price": {"1"}}, http.StatusSeeOther},
		{"no key", url.Values{"item": {"tea"}}, http.StatusBadRequest},
		{"no such item", url.Values{"key": {"k"}, "item": {"gold"}}, http.StatusServiceUnavailable},
	} {
		r := httptest.NewRequest(http.MethodPost, "/buy", strings.NewReader(c.form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		w := httptest.NewRecorder()
		f.handler().ServeHTTP(w, r)
		if w.Code != c.code {
			t.Errorf("%s: status %d, want %d", c.name, w.Code, c.code)
		}
	}
	if len(*placed) != 1 || (*placed)[0]["price"] != 450.0 || (*placed)[0]["key"] != "k" {
		t.Errorf("placed %v", *placed)
	}
}
