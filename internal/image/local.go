package image

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/sirupsen/logrus"
	bolt "go.etcd.io/bbolt"
)

const (
	namespace   = "tutti" // containerd wants one in every context
	snapshotter = "overlayfs"
	heldLease   = "held" // protects, during a collection, what is held without a name
	lockTimeout = time.Second
)

// Options say where and how images are kept.
type Options struct {
	// Dir holds everything; it is made when it does not exist.
	Dir string
	// PlainHTTP lists registries (host or host:port) that are spoken to
	// without TLS. Those on the loopback always are.
	PlainHTTP []string
	Log       *slog.Logger // nil discards
}

// Local is the Store of this machine. Only one process can have it open; its
// Handler lets others in. All methods are safe for concurrent use.
type Local struct {
	dir       string
	log       *slog.Logger
	plainHTTP []string
	client    *http.Client
	builtin   atomic.Pointer[builtin]
	platform  platforms.MatchComparer

	bolt      *bolt.DB
	backend   snapshots.Snapshotter
	db        *metadata.DB
	content   content.Store
	snapshots snapshots.Snapshotter
	names     images.Store
	leases    leases.Manager

	// change is held while names change, leases begin or garbage is
	// collected: what a collection takes for garbage must stay garbage.
	// It is taken before mu.
	change sync.Mutex

	mu      sync.Mutex
	images  map[string]*entry              // by name
	layers  map[string][]string            // by image ID, of images that are named or held
	holds   map[string]map[string]struct{} // holder → image IDs
	working map[string]int                 // leases in use
	used    map[string]time.Time           // by image ID: when it was last held or let go
	pulls   map[string]*pull
	serial  int // makes lease and ingest names unique

	// Collections and pulls.
	background sync.WaitGroup
	ctx        context.Context
	stop       context.CancelFunc
}

// entry is what is kept in memory of a named image.
type entry struct {
	Image
	repository string // docker.io/library/busybox
	pulled     bool   // it came from a registry
	manifest   string // digest of this platform's manifest
}

// Open opens the images below o.Dir and removes what an interrupted load or
// pull has left. The error of a damaged database names the file and the cure.
func Open(ctx context.Context, o Options) (_ *Local, err error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	takeLog.Do(func() { log.L = containerdLog(o.Log) })
	if err := os.MkdirAll(filepath.Join(o.Dir, "holds"), 0o700); err != nil {
		return nil, fmt.Errorf("open images: %w", err)
	}
	l := &Local{
		dir: o.Dir, log: o.Log, plainHTTP: o.PlainHTTP,
		client:   registryClient(nil),
		platform: platforms.Default(),
		images:   map[string]*entry{},
		layers:   map[string][]string{},
		holds:    map[string]map[string]struct{}{},
		working:  map[string]int{},
		used:     map[string]time.Time{},
		pulls:    map[string]*pull{},
	}
	l.ctx, l.stop = context.WithCancel(scoped(context.WithoutCancel(ctx)))
	defer func() {
		if err != nil {
			l.Close()
		}
	}()
	if err := l.openStores(); err != nil {
		return nil, err
	}
	return l, l.restore(scoped(ctx))
}

// registryClient gives up on an address that does not answer well before the
// pull as a whole does, so that the error can say so.
func registryClient(config *tls.Config) *http.Client {
	transport := docker.DefaultHTTPTransport(config)
	transport.DialContext = (&net.Dialer{Timeout: 10 * time.Second}).DialContext
	return &http.Client{Transport: transport}
}

// removeNameless removes unfinished blobs that do not say which they are: they
// were being made or removed when the last process was killed, and a collection
// passes over them.
func removeNameless(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		blob := filepath.Join(dir, e.Name())
		if ref, rerr := os.ReadFile(filepath.Join(blob, "ref")); len(ref) == 0 && (rerr == nil || errors.Is(rerr, fs.ErrNotExist)) {
			err = errors.Join(err, os.RemoveAll(blob))
		}
	}
	return err
}

// openStores opens the two databases and reads each once: a damaged one must
// be found here, not by the first pod.
func (l *Local) openStores() (err error) {
	names, layers := filepath.Join(l.dir, "metadata.db"), filepath.Join(l.dir, "layers", "metadata.db")
	reading := names
	// A database that has been cut short is a fault of memory when its pages
	// are touched, and bolt panics on pages that make no sense.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%v", r)
			l.bolt, l.backend = nil, nil // closing would wait for locks that the panic left
		}
		switch {
		case errors.Is(err, bolt.ErrTimeout):
			err = failed(nil, err, "open images: %s is in use by another process; stop that first", reading)
		case diskFull(err):
			err = l.diskFullError("open images", err)
		case err != nil:
			err = failed(nil, err, "open images: %s is damaged (%v); stop what runs, move %s away, then load or pull the images again", reading, err, l.dir)
		}
	}()
	l.bolt, err = bolt.Open(names, 0o600, &bolt.Options{Timeout: lockTimeout, NoStatistics: true})
	if err != nil {
		return err
	}
	if err := removeNameless(filepath.Join(l.dir, "content", "ingest")); err != nil {
		return err
	}
	blobs, err := local.NewStore(filepath.Join(l.dir, "content"))
	if err == nil { // a collection stops short of unfinished blobs where it finds no directory for finished ones
		err = os.MkdirAll(filepath.Join(l.dir, "content", "blobs"), 0o700)
	}
	if err != nil {
		return err
	}
	meta, err := storage.NewMetaStore(layers, func(o *bolt.Options) error {
		o.Timeout = lockTimeout
		return nil
	})
	if err != nil {
		return err
	}
	l.backend, err = overlay.NewSnapshotter(filepath.Dir(layers), overlay.WithUpperdirLabel, overlay.WithMetaStore(meta))
	if err != nil {
		return err
	}
	l.db = metadata.NewDB(l.bolt, blobs, map[string]snapshots.Snapshotter{snapshotter: l.backend})
	if err := l.db.Init(l.ctx); err != nil {
		return err
	}
	l.content, l.snapshots = l.db.ContentStore(), l.db.Snapshotter(snapshotter)
	l.names, l.leases = metadata.NewImageStore(l.db), metadata.NewLeaseManager(l.db)
	if err := l.bolt.View(func(tx *bolt.Tx) error { return readAll(tx) }); err != nil {
		return err
	}
	reading = layers
	return meta.WithTransaction(l.ctx, false, func(ctx context.Context) error {
		_, err := storage.IDMap(ctx)
		if errdefs.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// readAll visits every page of a database in use.
func readAll(tx *bolt.Tx) error {
	var visit func(*bolt.Bucket) error
	visit = func(b *bolt.Bucket) error {
		return b.ForEachBucket(func(k []byte) error { return visit(b.Bucket(k)) })
	}
	return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return visit(b) })
}

// restore fills the memory from disk.
func (l *Local) restore(ctx context.Context) error {
	stored, err := l.names.List(ctx)
	if err != nil {
		return fmt.Errorf("open images: list: %w", err)
	}
	for _, img := range stored {
		e, layers, err := l.describe(ctx, img)
		if ctx.Err() != nil {
			return fmt.Errorf("open images: %w", ctx.Err())
		}
		if err != nil {
			// Its name must go, or nothing could be fetched in its place.
			l.log.Error("image is damaged and was removed: load or pull it again", "image", img.Name, "err", err)
			if err := l.names.Delete(ctx, img.Name); err != nil {
				return fmt.Errorf("open images: remove damaged %s: %w", img.Name, err)
			}
			continue
		}
		l.images[e.Name], l.layers[e.ID] = e, layers
	}
	marks, err := os.ReadDir(filepath.Join(l.dir, "holds"))
	if err != nil {
		return fmt.Errorf("open images: %w", err)
	}
	for _, mark := range marks {
		hex, escaped, _ := strings.Cut(mark.Name(), ".")
		holder, err := url.PathUnescape(escaped)
		if err != nil {
			continue
		}
		id := "sha256:" + hex
		if _, ok := l.layers[id]; !ok {
			if l.layers[id], err = l.layersOfConfig(ctx, id); err != nil {
				l.log.Warn("layers of a held image are gone", "image", id, "holder", holder, "err", err)
				delete(l.layers, id)
				continue
			}
		}
		l.hold(holder, id)
	}
	// The last process may have ended before it collected what it let go of.
	l.collectLater()
	return nil
}

// Close ends pulls and collections and closes the databases. Loads and imports
// must have ended.
func (l *Local) Close() error {
	l.stop()
	l.mu.Lock()
	for _, p := range l.pulls {
		p.cancel(errClosed)
	}
	l.mu.Unlock()
	l.background.Wait()
	l.client.CloseIdleConnections()
	if b := l.builtin.Load(); b != nil {
		b.client.CloseIdleConnections()
	}
	var errs []error
	if l.backend != nil {
		errs = append(errs, l.backend.Close())
	}
	if l.bolt != nil {
		errs = append(errs, l.bolt.Close())
	}
	return errors.Join(errs...)
}

// Get implements Store. Besides names it takes the first digits, at least
// four, of an image's ID or digest.
func (l *Local) Get(_ context.Context, name string) (Image, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, err := find(l.images, name)
	if err != nil {
		return Image{}, err
	}
	return e.Image, nil
}

// List implements Store; images come in the order of their names.
func (l *Local) List(context.Context) ([]Image, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := make([]Image, 0, len(l.images))
	for _, name := range slices.Sorted(maps.Keys(l.images)) {
		all = append(all, l.images[name].Image)
	}
	return all, nil
}

// Hold implements Store. The hold outlives this process; Holders tells which
// there are. An image without layers has one empty directory.
func (l *Local) Hold(_ context.Context, img Image, holder string) ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	layers, ok := l.layers[img.ID]
	if !ok {
		return nil, failed(ErrNotFound, nil, "hold image %s: it is no longer on this machine", img.Name)
	}
	if _, ok := l.holds[holder][img.ID]; !ok {
		// No sync: when the machine goes down, so does the holder.
		if err := os.WriteFile(l.mark(holder, img.ID), nil, 0o600); err != nil {
			return nil, fmt.Errorf("hold image %s for %s: %w", img.Name, holder, err)
		}
		l.hold(holder, img.ID)
	}
	l.used[img.ID] = time.Now()
	return slices.Clone(layers), nil
}

func (l *Local) hold(holder, id string) {
	if l.holds[holder] == nil {
		l.holds[holder] = map[string]struct{}{}
	}
	l.holds[holder][id] = struct{}{}
}

func (l *Local) mark(holder, id string) string {
	return filepath.Join(l.dir, "holds", strings.TrimPrefix(id, "sha256:")+"."+url.PathEscape(holder))
}

// Release ends all holds of holder; an unknown holder is no error. Layers that
// nothing else protects are removed in the background.
func (l *Local) Release(_ context.Context, holder string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range l.holds[holder] {
		if err := os.Remove(l.mark(holder, id)); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("release images of %s: %w", holder, err)
		}
		l.used[id] = time.Now()
	}
	released := l.holds[holder]
	if len(released) == 0 {
		return nil
	}
	delete(l.holds, holder)
	kept := l.kept()
	for id := range released {
		if _, ok := kept[id]; !ok {
			l.collectLater()
			break
		}
	}
	return nil
}

// Holders returns who holds images, so that a caller which has restarted can
// release those it no longer knows.
func (l *Local) Holders() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Sorted(maps.Keys(l.holds))
}

// kept returns the IDs that are named (true) or only held (false). l.mu is held.
func (l *Local) kept() map[string]bool {
	kept := map[string]bool{}
	for _, ids := range l.holds {
		for id := range ids {
			kept[id] = false
		}
	}
	for _, e := range l.images {
		kept[e.ID] = true
	}
	return kept
}

// Remove takes an image's name away and, when nothing else protects them, its
// content and layers. An image given by its ID loses all its names. The last
// name of an image that is held is refused with ErrHeld, unless force is set:
// the layers then stay until the last hold is released.
func (l *Local) Remove(ctx context.Context, name string, force bool) error {
	ctx = scoped(ctx)
	l.change.Lock()
	defer l.change.Unlock()
	going, err := l.going(name, force)
	if err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	for _, name := range going {
		if err := l.names.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("remove image %s: %w", name, err)
		}
		l.mu.Lock()
		delete(l.images, name)
		l.mu.Unlock()
	}
	return l.collect(ctx)
}

// going returns the names that a removal of name takes away.
func (l *Local) going(name string, force bool) ([]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	e, err := find(l.images, name)
	if err != nil {
		return nil, err
	}
	byID := strings.HasPrefix(strings.TrimPrefix(e.ID, "sha256:"), strings.TrimPrefix(name, "sha256:"))
	var going, left []string
	for _, other := range l.images {
		switch {
		case other == e || byID && other.ID == e.ID:
			going = append(going, other.Name)
		case other.ID == e.ID:
			left = append(left, other.Name)
		}
	}
	if force || len(left) > 0 {
		return going, nil
	}
	for holder, ids := range l.holds {
		if _, ok := ids[e.ID]; ok {
			return nil, failed(ErrHeld, nil, "%s is in use by %s; stop that first, or force the removal", e.Name, holder)
		}
	}
	return going, nil
}

// Collect removes everything that no name, hold or running job protects,
// failed downloads kept for another attempt included.
func (l *Local) Collect(ctx context.Context) error {
	l.change.Lock()
	defer l.change.Unlock()
	return l.collect(scoped(ctx))
}

// collect does the work of Collect; l.change is held.
func (l *Local) collect(ctx context.Context) error {
	l.mu.Lock()
	kept := l.kept()
	for id := range l.layers {
		if _, ok := kept[id]; !ok {
			delete(l.layers, id)
			delete(l.used, id)
		}
	}
	working := maps.Clone(l.working)
	l.mu.Unlock()

	present, err := l.leases.List(ctx)
	if err != nil {
		return fmt.Errorf("collect unused images: list leases: %w", err)
	}
	for _, lease := range present {
		if working[lease.ID] == 0 {
			if err := l.leases.Delete(ctx, lease); err != nil && !errdefs.IsNotFound(err) {
				return fmt.Errorf("collect unused images: end lease: %w", err)
			}
		}
	}
	var held *leases.Lease
	for id, named := range kept {
		if named {
			continue
		}
		if held == nil {
			lease, err := l.leases.Create(ctx, leases.WithID(heldLease))
			if err != nil {
				return fmt.Errorf("collect unused images: protect those in use: %w", err)
			}
			held = &lease
		}
		// The configuration leads to the layers: unpacking labels it so.
		if err := l.leases.AddResource(ctx, *held, leases.Resource{Type: "content", ID: id}); err != nil {
			return fmt.Errorf("collect unused images: protect %s in use: %w", id, err)
		}
	}
	if _, err := l.db.GarbageCollect(ctx); err != nil {
		return fmt.Errorf("collect unused images: %w", err)
	}
	return nil
}

// collectLater collects in the background.
func (l *Local) collectLater() {
	if l.ctx.Err() != nil {
		return
	}
	l.background.Go(func() {
		if err := l.Collect(l.ctx); err != nil && l.ctx.Err() == nil {
			l.log.Error("unused images stay on disk", "err", err)
		}
	})
}

// lease begins to protect what is written with the returned context. The name
// of an earlier lease that was kept continues it. end(true) ends the
// protection; end(false) keeps it for another attempt.
func (l *Local) lease(ctx context.Context, name string) (_ context.Context, end func(drop bool), err error) {
	ctx = scoped(ctx)
	l.change.Lock()
	defer l.change.Unlock()
	if _, err := l.leases.Create(ctx, leases.WithID(name)); err != nil && !errdefs.IsAlreadyExists(err) {
		return nil, nil, fmt.Errorf("protect what is written: %w", err)
	}
	l.mu.Lock()
	l.working[name]++
	l.mu.Unlock()
	return leases.WithLease(ctx, name), func(drop bool) {
		l.change.Lock()
		defer l.change.Unlock()
		l.mu.Lock()
		l.working[name]--
		last := l.working[name] == 0
		if last {
			delete(l.working, name)
		}
		l.mu.Unlock()
		if !last || !drop {
			return
		}
		if err := l.leases.Delete(context.WithoutCancel(ctx), leases.Lease{ID: name}); err != nil && !errdefs.IsNotFound(err) {
			l.log.Warn("lease stays until the next collection", "lease", name, "err", err)
		}
	}, nil
}

// unique returns a name that no other job of this process has.
func (l *Local) unique(what string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.serial++
	return fmt.Sprintf("%s-%d-%d", what, os.Getpid(), l.serial)
}

// scoped prepares a context for containerd.
func scoped(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, namespace)
}

// takeLog makes containerd, which has one log per process, write what it
// warns about to the first store's. What it fails at comes back as an error.
var takeLog sync.Once

func containerdLog(to *slog.Logger) *log.Entry {
	logger := logrus.New()
	logger.SetLevel(logrus.WarnLevel)
	logger.SetFormatter(forward{to})
	return logrus.NewEntry(logger)
}

type forward struct{ to *slog.Logger }

func (f forward) Format(e *logrus.Entry) ([]byte, error) {
	f.to.Debug("containerd", "msg", e.Message, "fields", e.Data)
	return nil, nil
}
