package main

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
)

// billing stands in for the billing program and keeps what it was asked to write.
func billing(t *testing.T) (*httptest.Server, *[]url.Values) {
	written := new([]url.Values)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /invoices", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`[{"number": "1", "exhibition": "<b>", "cents": "900", "priced_by": "web-1", "process": "77"}]`))
	})
	mux.HandleFunc("POST /invoices", func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseForm(); err != nil {
			t.Error(err)
		}
		*written = append(*written, r.PostForm)
		_, _ = w.Write([]byte(`{"number": "2"}`))
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server, written
}

func TestSite(t *testing.T) {
	server, written := billing(t)
	open := &site{billing: server.URL, client: server.Client(), pod: "web-0"}
	closed := &site{billing: server.URL + "/gone", client: server.Client()}
	for _, tt := range []struct {
		name   string
		site   *site
		method string
		path   string
		form   url.Values
		code   int
		want   string
	}{
		{"page", open, "GET", "/", nil, http.StatusOK, "<td>&lt;b&gt;</td><td>900 cents</td><td>priced by web-1</td><td>written by process 77</td>"},
		{"page, billing away", closed, "GET", "/", nil, http.StatusServiceUnavailable, "Nothing is lost"},
		{"price", open, "GET", "/prices/relay", nil, http.StatusOK, `{"cents":1250,"pod":"web-0"}`},
		{"no price", open, "GET", "/prices/none", nil, http.StatusNotFound, "no such exhibition"},
		{"buy", open, "POST", "/buy", url.Values{"key": {"k"}, "exhibition": {"relay"}}, http.StatusSeeOther, ""},
		{"buy without key", open, "POST", "/buy", url.Values{"exhibition": {"relay"}}, http.StatusBadRequest, "needed"},
		{"buy, billing away", closed, "POST", "/buy", url.Values{"key": {"k"}, "exhibition": {"relay"}}, http.StatusServiceUnavailable, "not pay twice"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.form.Encode()))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			w := httptest.NewRecorder()
			tt.site.handler().ServeHTTP(w, r)
			if w.Code != tt.code || !strings.Contains(w.Body.String(), tt.want) {
				t.Errorf("got %d %s, want %d with %q", w.Code, w.Body, tt.code, tt.want)
			}
		})
	}
	if len(*written) != 1 || (*written)[0].Get("exhibition") != "relay" || (*written)[0].Get("key") != "k" {
		t.Errorf("billing was asked for %v", *written)
	}
}
