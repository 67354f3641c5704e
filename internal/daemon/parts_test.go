package daemon

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestPartsEndInReverseOrder(t *testing.T) {
	p := newParts(slog.New(slog.DiscardHandler))
	var mu sync.Mutex
	var ended []string
	note := func(name string) {
		mu.Lock()
		defer mu.Unlock()
		ended = append(ended, name)
	}
	p.run("store", func(ctx context.Context) error { <-ctx.Done(); note("store"); return nil })
	p.opened("network", func() error { note("network"); return errors.New("told to the log") })
	p.run("agent", func(ctx context.Context) error { <-ctx.Done(); note("agent"); return ctx.Err() })
	p.close()
	p.close()
	if got := strings.Join(ended, " "); got != "agent network store" {
		t.Errorf("ended %s", got)
	}
	select {
	case err := <-p.failed:
		t.Errorf("failed: %v", err)
	default:
	}
}

func TestPartThatEndsByItselfFails(t *testing.T) {
	for want, f := range map[string]func(context.Context) error{
		"agent: ended by itself; the log says why": func(context.Context) error { return nil },
		"agent: broken": func(context.Context) error { return errors.New("broken") },
	} {
		p := newParts(slog.New(slog.DiscardHandler))
		p.run("agent", f)
		select {
		case err := <-p.failed:
			if err.Error() != want {
				t.Errorf("got %v, want %s", err, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatal("nobody was told")
		}
		p.close()
	}
}
