package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"
)

// pulledLabel marks, in the database, a name whose content came from a
// registry. Names without it, those of earlier versions too, are never
// reclaimed: what a person loaded or imported by hand is nowhere else.
const pulledLabel = "tutti.dev/pulled"

// youth is how long an image is left alone after it came or was last used:
// somebody may be about to use it.
const youth = 2 * time.Minute

// Reclaim implements Store. When an image was used last is known since Open;
// before that, when it came counts.
func (l *Local) Reclaim(ctx context.Context, enough func(freed int64) bool) (freed int64, err error) {
	l.mu.Lock()
	all := make([]*entry, 0, len(l.images))
	for _, e := range l.images {
		all = append(all, e)
	}
	list := reclaimable(all, l.held, l.used, time.Now())
	l.mu.Unlock()
	for _, img := range list {
		if ctx.Err() != nil || enough(freed) {
			break
		}
		switch err := l.Remove(ctx, img.ID, false); {
		case errors.Is(err, ErrHeld), errors.Is(err, ErrNotFound): // since
		case err != nil:
			return freed, fmt.Errorf("reclaim %s: %w", img.Name, err)
		default:
			l.log.Info("removed an unused image", "image", img.Name, "bytes", img.Size)
			freed += img.Size
		}
	}
	return freed, ctx.Err()
}

// held says whether somebody holds an image. l.mu is held.
func (l *Local) held(id string) bool {
	for _, ids := range l.holds {
		if _, ok := ids[id]; ok {
			return true
		}
	}
	return false
}

// reclaimable returns what may go, one entry an image whatever its names, the
// least recently used first.
func reclaimable(all []*entry, held func(id string) bool, used map[string]time.Time, now time.Time) []Image {
	images, stays := map[string]Image{}, map[string]bool{}
	for _, e := range all {
		img, ok := images[e.ID]
		if !ok || e.Time.After(img.Time) {
			img = e.Image
		}
		if last := used[e.ID]; last.After(img.Time) {
			img.Time = last
		}
		images[e.ID] = img
		if !e.pulled || now.Sub(img.Time) < youth || !ok && held(e.ID) {
			stays[e.ID] = true
		}
	}
	var list []Image
	for id, img := range images {
		if !stays[id] {
			list = append(list, img)
		}
	}
	slices.SortFunc(list, func(a, b Image) int { return cmp.Or(a.Time.Compare(b.Time), cmp.Compare(a.Name, b.Name)) })
	return list
}
