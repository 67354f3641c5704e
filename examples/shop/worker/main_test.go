package main

import (
	"context"
	"errors"
	"testing"
	"time"

	"tutti.dev/tutti/examples/shop/store"
)

func TestWorkGoesOnAfterAFailure(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	calls := 0
	work(ctx, func(context.Context) (store.Order, bool, error) {
		calls++
		switch calls {
		case 1:
			return store.Order{}, false, errors.New("connection refused")
		case 2:
			return store.Order{ID: 1}, true, nil
		case 3:
			return store.Order{}, false, nil
		}
		cancel()
		return store.Order{}, false, ctx.Err()
	}, time.Millisecond)
	if calls != 4 {
		t.Errorf("tried %d times, want 4", calls)
	}
}
