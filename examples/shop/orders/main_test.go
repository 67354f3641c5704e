package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"tutti.dev/tutti/examples/shop/store"
)

// memory is a book without a database.
type memory struct {
	orders []store.Order
	err    error
}

func (m *memory) Place(_ context.Context, key, item string, price int) (store.Order, error) {
	if m.err != nil {
		return store.Order{}, m.err
	}
	for _, o := range m.orders {
		if o.Key == key {
			return o, nil
		}
	}
	o := store.Order{ID: int64(len(m.orders) + 1), Key: key, Item: item, Price: price, State: store.Paid}
	m.orders = append(m.orders, o)
	return o, nil
}

func (m *memory) List(context.Context, int) ([]store.Order, error) { return m.orders, m.err }

func TestHandler(t *testing.T) {
	m := &memory{}
	broken := &memory{err: errors.New("connection refused")}
	for _, c := range []struct {
		name, method, body string
		book               *memory
		code               int
		want               string
	}{
		{"place", "POST", `{"key":"k","item":"tea","price":450}`, m, http.StatusCreated, `"id":1`},
		{"place again", "POST", `{"key":"k","item":"tea","price":450}`, m, http.StatusCreated, `"id":1`},
		{"list", "GET", "", m, http.StatusOK, `"item":"tea"`},
		{"no key", "POST", `{"item":"tea"}`, m, http.StatusBadRequest, "key is missing"},
		{"no item", "POST", `{"key":"k"}`, m, http.StatusBadRequest, "item is missing"},
		{"bad price", "POST", `{"key":"k","item":"tea","price":-1}`, m, http.StatusBadRequest, "price is negative"},
		{"no JSON", "POST", `tea`, m, http.StatusBadRequest, "not an order"},
		{"no database", "GET", "", broken, http.StatusServiceUnavailable, "does not answer"},
		{"no database to write", "POST", `{"key":"k","item":"tea"}`, broken, http.StatusServiceUnavailable, "does not answer"},
	} {
		w := httptest.NewRecorder()
		handler(c.book).ServeHTTP(w, httptest.NewRequest(c.method, "/orders", strings.NewReader(c.body)))
		if w.Code != c.code || !strings.Contains(w.Body.String(), c.want) {
			t.Errorf("%s: %d %s; want %d and %s", c.name, w.Code, w.Body, c.code, c.want)
		}
	}
	if len(m.orders) != 1 {
		t.Errorf("one key made %d orders", len(m.orders))
	}
}
