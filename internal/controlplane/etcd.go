package controlplane

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3rpc"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/server/egressselector"
)

const (
	// etcdEndpoint names the store towards clients; it is never resolved or dialled.
	etcdEndpoint = "http://etcd.invalid:2379"
	// pipeBuffer is the size of each direction of a connection to the store.
	pipeBuffer = 16 << 10
	etcdStart  = time.Minute
	// lockWait is how long another process may hold the database.
	lockWait = 5 * time.Second
	etcdStop = 10 * time.Second
)

// store is the embedded etcd. It listens nowhere: its clients in this process reach it through memory.
type store struct {
	log    *slog.Logger
	dir    string
	etcd   *embed.Etcd
	server *grpc.Server
	pipe   *bufconn.Listener
	failed chan error // gets the first fatal error
}

// startStore opens the data in dir, or makes it, and returns when the store takes writes. Every acknowledged write has
// been synced to disk.
func startStore(ctx context.Context, dir string, log *slog.Logger, foreign slog.Handler) (*store, error) {
	s := &store{log: log, dir: dir, failed: make(chan error, 1)}
	if err := beginStore(dir); err != nil {
		return nil, fmt.Errorf("make the store in %s: %w", dir, err)
	}
	if err := checkDatabase(dir); err != nil {
		return nil, s.unusable(err)
	}
	cfg := embed.NewConfig()
	cfg.Name = "tutti"
	cfg.Dir = dir
	nowhere := url.URL{Scheme: "http", Host: "127.0.0.1:2380"} // recorded for peers; there are none
	cfg.ListenPeerUrls, cfg.ListenClientUrls = []url.URL{}, []url.URL{}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = []url.URL{nowhere}, []url.URL{nowhere}
	cfg.InitialCluster = cfg.Name + "=" + nowhere.String()
	// Ticks only pace elections. A single member waits one election time-out at start, so it is short.
	cfg.TickMs, cfg.ElectionMs = 20, 100
	// Entries kept in memory for followers that lag behind: the defaults (10,000 and 5,000) can hold 100 MB.
	cfg.SnapshotCount, cfg.SnapshotCatchUpEntries = 1000, 100
	cfg.QuotaBackendBytes = 8 << 30
	// What nobody writes to has a version too: bookmarks tell it to watchers, which can then go on from there after this
	// process or a compaction. Every ten minutes, the default, is later than the compactions.
	cfg.WatchProgressNotifyInterval = 5 * time.Second
	// The zero that a Config begins with calls every request slow.
	cfg.WarningUnaryRequestDuration = embed.DefaultWarningUnaryRequestDuration
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(etcdLogger(foreign, s.fail))

	started := make(chan error, 1)
	go func() {
		err := errors.New("ended while starting")
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%v", p)
			}
			started <- err
		}()
		s.etcd, err = embed.StartEtcd(cfg)
	}()
	wait, cancel := context.WithTimeout(ctx, etcdStart)
	defer cancel()
	select {
	case err := <-s.failed: // starting may hang for ever after this
		return nil, s.unusable(err)
	case err := <-started:
		if err != nil {
			return nil, s.unusable(err)
		}
	case <-wait.Done():
		return nil, fmt.Errorf("open the store in %s: %w", dir, wait.Err())
	}

	s.pipe = bufconn.Listen(pipeBuffer)
	// The same keep-alive policy as etcd's own listeners; gRPC's default would cut off Kubernetes' clients.
	s.server = v3rpc.Server(s.etcd.Server, nil, nil, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: cfg.GRPCKeepAliveMinTime}))
	go s.server.Serve(s.pipe) //nolint:errcheck // returns nil after Stop, and nothing else can end a pipe

	select {
	case <-s.etcd.Server.ReadyNotify():
		if err := finishStore(dir); err != nil {
			s.stop()
			return nil, fmt.Errorf("make the store in %s: %w", dir, err)
		}
		return s, nil
	case err := <-s.failed:
		s.stop()
		return nil, s.unusable(err)
	case <-wait.Done():
		s.stop()
		return nil, fmt.Errorf("open the store in %s: not ready: %w", dir, wait.Err())
	}
}

// unfinished is a file in the store's directory from before its first start until it has taken writes. A start that was
// cut short in between can leave a log without members, with which etcd never gets ready again.
const unfinished = "unfinished"

// beginStore makes the directory of a new store, or again that of one which never took a write. It touches no other.
func beginStore(dir string) error {
	mark := filepath.Join(dir, unfinished)
	switch _, err := os.Stat(mark); {
	case err == nil:
		return os.RemoveAll(filepath.Join(dir, "member"))
	case !errors.Is(err, fs.ErrNotExist):
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, "member")); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// A power cut may take the mark and what it marks together, nothing else: nobody has been told of a write yet.
	return os.WriteFile(mark, nil, 0o600)
}

// finishStore says for good that the store may hold what somebody relies on. It returns when that is on the disk: a mark
// that came back after a power cut would cost all data.
func finishStore(dir string) error {
	err := os.Remove(filepath.Join(dir, unfinished))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// checkDatabase finds the damage on which etcd would crash, in goroutines where nothing can catch it.
func checkDatabase(dir string) error {
	file := filepath.Join(dir, "member", "snap", "db")
	info, err := os.Stat(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		if _, err := os.Stat(filepath.Join(dir, "member", "wal")); errors.Is(err, fs.ErrNotExist) {
			return nil // a first start that was cut short
		}
		return fmt.Errorf("%s is empty", file)
	}
	db, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockWait})
	if err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		if tx.Size() > info.Size() {
			return fmt.Errorf("%s has %d bytes and says that it has %d", file, info.Size(), tx.Size())
		}
		return nil
	})
}

func (s *store) unusable(err error) error {
	return fmt.Errorf("open the store in %s: %s; restore %s from a backup, or move it away to start with an empty cluster",
		s.dir, strings.Join(strings.Fields(err.Error()), " "), filepath.Clean(s.dir))
}

func (s *store) fail(err error) {
	select {
	case s.failed <- err:
	default:
	}
}

// failure is the first error that the store cannot survive.
func (s *store) failure() <-chan error { return s.failed }

// egress is how the API server's storage dials the store.
func (s *store) egress(egressselector.NetworkContext) (utilnet.DialFunc, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) { return s.pipe.DialContext(ctx) }, nil
}

// client returns a client of the store. The caller closes it.
func (s *store) client() (*clientv3.Client, error) {
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{etcdEndpoint},
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return s.pipe.DialContext(ctx) })},
	})
}

// stop closes the store; nobody may use it any more.
func (s *store) stop() {
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		s.server.Stop()
		s.etcd.Close()
	}()
	select {
	case <-stopped:
	case <-time.After(etcdStop):
		// Nothing is lost: what was acknowledged is on disk.
		s.log.Warn("store did not close in time", "dir", s.dir, "after", etcdStop)
	}
}
