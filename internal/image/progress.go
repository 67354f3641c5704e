package image

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Progress is how far a load, import, pull or push has come.
type Progress struct {
	Bytes       int64 `json:"bytes"`                 // of the archive read, or of the image downloaded, sent or present
	TotalBytes  int64 `json:"totalBytes,omitempty"`  // 0 when unknown; only a pull or push knows
	Layers      int   `json:"layers,omitempty"`      // unpacked, or sent
	TotalLayers int   `json:"totalLayers,omitempty"` // 0 when unknown yet
}

type progressKey struct{}

// WithProgress makes Load, Import, Pull and Push report to f while they work, about
// ten times a second. f must not block.
func WithProgress(ctx context.Context, f func(Progress)) context.Context {
	return context.WithValue(ctx, progressKey{}, f)
}

// reportInterval is fast enough for a bar that moves and slow enough to cost
// nothing.
const reportInterval = 100 * time.Millisecond

// progress gathers what the parts of one job report.
type progress struct {
	download bool   // the descriptors tell how many bytes there will be
	active   func() // called whenever bytes arrive

	mu       sync.Mutex
	now      Progress
	reported time.Time
	watchers []func(Progress)
}

// watch adds the callback of ctx, if it has one.
func (p *progress) watch(ctx context.Context) *progress {
	if f, ok := ctx.Value(progressKey{}).(func(Progress)); ok {
		p.mu.Lock()
		p.watchers = append(p.watchers, f)
		p.mu.Unlock()
	}
	return p
}

func (p *progress) update(change func(*Progress)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	before := p.now
	change(&p.now)
	p.now.Layers = min(p.now.Layers, p.now.TotalLayers)
	if before.Layers == p.now.Layers && before.TotalLayers == p.now.TotalLayers && time.Since(p.reported) < reportInterval {
		return
	}
	p.reported = time.Now()
	for _, f := range p.watchers {
		f(p.now)
	}
}

// expect adds to the totals what is going to be fetched and unpacked.
func (p *progress) expect(descs ...ocispec.Descriptor) {
	p.update(func(now *Progress) {
		for _, d := range descs {
			if p.download {
				now.TotalBytes += d.Size
			}
			if images.IsLayerType(d.MediaType) {
				now.TotalLayers++
			}
		}
	})
}

// reader counts what is read through it and remembers why reading failed.
func (p *progress) reader(r io.Reader) *countingReader { return &countingReader{r: r, progress: p} }

type countingReader struct {
	r        io.Reader
	progress *progress
	err      error // never io.EOF
}

func (c *countingReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	if n > 0 {
		if c.progress.active != nil {
			c.progress.active()
		}
		c.progress.update(func(now *Progress) { now.Bytes += int64(n) })
	}
	if err != nil && err != io.EOF {
		c.err = err
	}
	return n, err
}
