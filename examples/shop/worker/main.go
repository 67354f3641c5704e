// Command worker ships what has been paid, one order after the other. Any
// number of workers may run: each order is shipped once.
package main

import (
	"context"
	"log/slog"
	"os"
	"time"

	"tutti.dev/tutti/examples/shop/serve"
	"tutti.dev/tutti/examples/shop/store"
)

func main() {
	ctx, stop := serve.Context()
	defer stop()
	db, err := store.Open(ctx)
	if err != nil {
		slog.Error("worker ended", "error", err)
		os.Exit(1)
	}
	defer db.Close()
	work(ctx, db.ShipOne, time.Second)
}

// work ships until ctx ends; it rests when there is nothing to ship or the
// database does not answer.
func work(ctx context.Context, ship func(context.Context) (store.Order, bool, error), rest time.Duration) {
	for ctx.Err() == nil {
		order, found, err := ship(ctx)
		if found {
			slog.Info("order shipped", "order", order.ID, "item", order.Item)
			continue
		}
		if err != nil && ctx.Err() == nil {
			slog.Warn("database failed", "error", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(rest):
		}
	}
}
