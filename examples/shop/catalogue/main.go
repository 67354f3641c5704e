// Command catalogue tells what the shop sells. Its list is a file, here from
// a ConfigMap, and read anew for each request: edit the ConfigMap and the
// shop follows.
package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"os"

	"tutti.dev/tutti/examples/shop/serve"
)

// Item is one thing for sale. Price is in cents.
type Item struct {
	ID    string `json:"id"`
	Name  string `json:"name"`
	Text  string `json:"text"`
	Price int    `json:"price"`
}

func main() {
	ctx, stop := serve.Context()
	defer stop()
	file := "/etc/catalogue/items.json"
	if f := os.Getenv("CATALOGUE_FILE"); f != "" {
		file = f
	}
	if err := serve.HTTP(ctx, ":8080", handler(file), nil); err != nil {
		slog.Error("catalogue ended", "error", err)
		os.Exit(1)
	}
}

func handler(file string) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /items", func(w http.ResponseWriter, _ *http.Request) {
		items, err := read(file)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		serve.JSON(w, http.StatusOK, items)
	})
	mux.HandleFunc("GET /items/{id}", func(w http.ResponseWriter, r *http.Request) {
		items, err := read(file)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		for _, it := range items {
			if it.ID == r.PathValue("id") {
				serve.JSON(w, http.StatusOK, it)
				return
			}
		}
		http.Error(w, fmt.Sprintf("no item %q", r.PathValue("id")), http.StatusNotFound)
	})
	return mux
}

func read(file string) ([]Item, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	var items []Item
	if err := json.Unmarshal(data, &items); err != nil {
		return nil, fmt.Errorf("read the catalogue %s: %w", file, err)
	}
	return items, nil
}
