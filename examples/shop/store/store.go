// Package store keeps the shop's orders in PostgreSQL. Where and as whom to
// connect comes from the usual variables: PGHOST, PGUSER, PGPASSWORD,
// PGDATABASE.
package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The states of an order, in the order of its life.
const (
	Paid    = "paid"
	Shipped = "shipped"
)

// Order is one purchase. Price is in cents and was the price at that time.
type Order struct {
	ID      int64     `json:"id"`
	Key     string    `json:"key"`
	Item    string    `json:"item"`
	Price   int       `json:"price"`
	State   string    `json:"state"`
	Created time.Time `json:"created"`
}

// Orders is the table of orders.
type Orders struct{ pool *pgxpool.Pool }

// Open makes a pool of connections; it connects when it is first used.
func Open(ctx context.Context) (*Orders, error) {
	pool, err := pgxpool.New(ctx, "connect_timeout=3")
	if err != nil {
		return nil, fmt.Errorf("read the database settings: %w", err)
	}
	return &Orders{pool}, nil
}

// Close closes every connection.
func (o *Orders) Close() { o.pool.Close() }

// Ready says whether the database answers.
func (o *Orders) Ready(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return o.pool.Ping(ctx)
}

// Migrate waits for the database and brings its tables up to date. Several
// may call it at once.
func (o *Orders) Migrate(ctx context.Context) error {
	for {
		err := o.Ready(ctx)
		if err == nil {
			break
		}
		slog.Info("waiting for the database", "error", err)
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for the database: %w", err)
		case <-time.After(500 * time.Millisecond):
		}
	}
	return pgx.BeginFunc(ctx, o.pool, func(tx pgx.Tx) error {
		// One at a time: "if not exists" alone is a race in PostgreSQL.
		if _, err := tx.Exec(ctx, `select pg_advisory_xact_lock(1)`); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, `create table if not exists orders (
			id      bigint generated always as identity primary key,
			key     text not null unique,
			item    text not null,
			price   integer not null check (price >= 0),
			state   text not null,
			created timestamptz not null default now())`)
		if err != nil {
			return fmt.Errorf("create the table of orders: %w", err)
		}
		return nil
	})
}

const columns = `id, key, item, price, state, created`

// Place stores a paid order. The key makes it repeatable: a second call with
// the same key returns the first order.
func (o *Orders) Place(ctx context.Context, key, item string, price int) (Order, error) {
	rows, err := o.pool.Query(ctx, `insert into orders (key, item, price, state) values ($1, $2, $3, $4)
		on conflict (key) do update set key = excluded.key returning `+columns, key, item, price, Paid)
	if err != nil {
		return Order{}, fmt.Errorf("place an order: %w", err)
	}
	order, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[Order])
	if err != nil {
		return Order{}, fmt.Errorf("place an order: %w", err)
	}
	return order, nil
}

// List returns the newest orders, at most limit.
func (o *Orders) List(ctx context.Context, limit int) ([]Order, error) {
	rows, err := o.pool.Query(ctx, `select `+columns+` from orders order by id desc limit $1`, limit)
	if err != nil {
		return nil, fmt.Errorf("list the orders: %w", err)
	}
	orders, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Order])
	if err != nil {
		return nil, fmt.Errorf("list the orders: %w", err)
	}
	return orders, nil
}

// ShipOne ships the oldest paid order that no other worker holds. It returns
// false when there is none.
func (o *Orders) ShipOne(ctx context.Context) (Order, bool, error) {
	rows, err := o.pool.Query(ctx, `update orders set state = $1 where id = (
		select id from orders where state = $2 order by id for update skip locked limit 1) returning `+columns, Shipped, Paid)
	if err != nil {
		return Order{}, false, fmt.Errorf("ship an order: %w", err)
	}
	order, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByPos[Order])
	if errors.Is(err, pgx.ErrNoRows) {
		return Order{}, false, nil
	}
	if err != nil {
		return Order{}, false, fmt.Errorf("ship an order: %w", err)
	}
	return order, true, nil
}
