// Command orders takes orders and lists them. "orders migrate" waits for the
// database and prepares it: the pod's init container.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"

	"tutti.dev/tutti/examples/shop/serve"
	"tutti.dev/tutti/examples/shop/store"
)

func main() {
	ctx, stop := serve.Context()
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		slog.Error("orders ended", "error", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	db, err := store.Open(ctx)
	if err != nil {
		return err
	}
	defer db.Close()
	switch {
	case len(args) == 0:
		return serve.HTTP(ctx, ":8080", handler(db), db.Ready)
	case len(args) == 1 && args[0] == "migrate":
		return db.Migrate(ctx)
	default:
		return fmt.Errorf("unknown arguments %q: there is only migrate", args)
	}
}

// book is what the API needs of the table of orders.
type book interface {
	Place(ctx context.Context, key, item string, price int) (store.Order, error)
	List(ctx context.Context, limit int) ([]store.Order, error)
}

// purchase is the body of POST /orders.
type purchase struct {
	Key   string `json:"key"`
	Item  string `json:"item"`
	Price int    `json:"price"`
}

func (p purchase) validate() error {
	switch {
	case p.Key == "":
		return errors.New("key is missing")
	case p.Item == "":
		return errors.New("item is missing")
	case p.Price < 0:
		return errors.New("price is negative")
	}
	return nil
}

func handler(b book) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, r *http.Request) {
		var p purchase
		err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<16)).Decode(&p)
		if err == nil {
			err = p.validate()
		}
		if err != nil {
			http.Error(w, "not an order: "+err.Error(), http.StatusBadRequest)
			return
		}
		order, err := b.Place(r.Context(), p.Key, p.Item, p.Price)
		if err != nil {
			unavailable(w, err)
			return
		}
		slog.Info("order placed", "order", order.ID, "item", order.Item)
		serve.JSON(w, http.StatusCreated, order)
	})
	mux.HandleFunc("GET /orders", func(w http.ResponseWriter, r *http.Request) {
		orders, err := b.List(r.Context(), 50)
		if err != nil {
			unavailable(w, err)
			return
		}
		serve.JSON(w, http.StatusOK, orders)
	})
	return mux
}

func unavailable(w http.ResponseWriter, err error) {
	slog.Warn("database failed", "error", err)
	http.Error(w, "the database does not answer", http.StatusServiceUnavailable)
}
