package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestHandler(t *testing.T) {
	file := filepath.Join(t.TempDir(), "items.json")
	if err := os.WriteFile(file, []byte(`[{"id":"tea","name":"Tea","price":450}]`), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		code int
		want string
	}{
		{"/items", http.StatusOK, `"id":"tea"`},
		{"/items/tea", http.StatusOK, `"price":450`},
		{"/items/gold", http.StatusNotFound, `no item "gold"`},
	} {
		w := httptest.NewRecorder()
		handler(file).ServeHTTP(w, httptest.NewRequest(http.MethodGet, c.path, nil))
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("GET %s: %d %s; want %d and %s", c.path, w.Code, w.Body, c.code, c.want)
		}
	}
	w := httptest.NewRecorder()
	handler(file+".gone").ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/items", nil))
	if w.Code != http.StatusInternalServerError {
		t.Errorf("without its file: %d", w.Code)
	}
}
