package image

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestReclaimable(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	named := func(name, id string, pulled bool, ago time.Duration) *entry {
		return &entry{Image: Image{Name: name, ID: id, Time: now.Add(-ago)}, pulled: pulled}
	}
	for _, c := range []struct {
		name string
		all  []*entry
		held string
		used map[string]time.Time
		want []string
	}{
		{name: "the oldest first", all: []*entry{named("b", "2", true, time.Hour), named("a", "1", true, 2*time.Hour)}, want: []string{"a", "b"}},
		{name: "the least recently used first", all: []*entry{named("b", "2", true, time.Hour), named("a", "1", true, 2*time.Hour)},
			used: map[string]time.Time{"1": now.Add(-30 * time.Minute)}, want: []string{"b", "a"}},
		{name: "not what came by hand", all: []*entry{named("a", "1", false, time.Hour)}},
		{name: "not what has one name by hand", all: []*entry{named("a", "1", true, time.Hour), named("b", "1", false, time.Hour)}},
		{name: "not what is held", all: []*entry{named("a", "1", true, time.Hour), named("b", "1", true, time.Hour)}, held: "1"},
		{name: "not what just came", all: []*entry{named("a", "1", true, time.Minute)}},
		{name: "not what was just used", all: []*entry{named("a", "1", true, time.Hour)}, used: map[string]time.Time{"1": now.Add(-time.Minute)}},
		{name: "once with several names", all: []*entry{named("a", "1", true, 2*time.Hour), named("b", "1", true, time.Hour)}, want: []string{"b"}},
	} {
		var got []string
		for _, img := range reclaimable(c.all, func(id string) bool { return id == c.held }, c.used, now) {
			got = append(got, img.Name)
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestReclaim(t *testing.T) {
	r, l := newRegistry(t), open(t, t.TempDir())
	for i := range 4 {
		r.push(t, "team/app", fmt.Sprint(i), imageOf(t, here(), ocispec.ImageConfig{User: fmt.Sprint(i)}, tarOf(t, text("f", fmt.Sprint(i)))))
		if _, err := l.Pull(t.Context(), fmt.Sprintf("%s/team/app:%d", r.host, i), nil); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := l.Import(t.Context(), "mine", bytes.NewReader(tarOf(t, text("g", "1"))), Config{}); err != nil {
		t.Fatal(err)
	}
	all, never := func(int64) bool { return false }, func(int64) bool { return true }
	freed, err := l.Reclaim(t.Context(), all)
	if err != nil || freed != 0 {
		t.Errorf("%d bytes of images that had just come were freed, %v", freed, err)
	}
	// That an image came from a registry is known after a restart, and lost
	// when the same is loaded by hand.
	l = reopen(t, l)
	var saved bytes.Buffer
	if err := l.Save(t.Context(), r.host+"/team/app:3", &saved); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Load(t.Context(), &saved); err != nil {
		t.Fatal(err)
	}
	held, err := l.Get(t.Context(), r.host+"/team/app:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.Hold(t.Context(), held, "pod"); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	for _, e := range l.images {
		e.Time = time.Now().Add(-time.Hour)
	}
	l.mu.Unlock()
	names := func() (list []string) {
		images, err := l.List(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, img := range images {
			list = append(list, img.Name)
		}
		return list
	}
	before := names()
	if freed, err := l.Reclaim(t.Context(), never); err != nil || freed != 0 || !slices.Equal(names(), before) {
		t.Errorf("%d bytes were freed though none were needed, %v", freed, err)
	}
	if freed, err := l.Reclaim(t.Context(), func(freed int64) bool { return freed > 0 }); err != nil || freed == 0 || len(names()) != len(before)-1 {
		t.Errorf("%d bytes freed, left %q, %v; want one image less", freed, names(), err)
	}
	if _, err := l.Reclaim(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	if got, want := names(), []string{r.host + "/team/app:0", r.host + "/team/app:3", "docker.io/library/mine:latest"}; !slices.Equal(got, want) {
		t.Errorf("left %q, want %q", got, want)
	}
}
