package controlplane

import (
	"context"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestKilled writes as fast as it can, kills the process in the middle, and wants every acknowledged write back.
func TestKilled(t *testing.T) {
	cfg := testConfig(t, t.TempDir())
	c := startChild(t, cfg)
	c.expect("ready")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	maps := adminClient(t, cfg.DataDir).CoreV1().ConfigMaps("default")
	var mu sync.Mutex
	var acknowledged []string
	var writers sync.WaitGroup
	enough := make(chan struct{})
	for w := range 4 {
		writers.Go(func() {
			for i := 0; ; i++ {
				name := fmt.Sprintf("m-%d-%d", w, i)
				if _, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}); err != nil {
					return // killed
				}
				mu.Lock()
				if acknowledged = append(acknowledged, name); len(acknowledged) == 200 {
					close(enough)
				}
				mu.Unlock()
			}
		})
	}
	select {
	case <-enough:
	case <-ctx.Done():
		t.Fatal("too slow")
	}
	c.cmd.Process.Kill()
	c.cmd.Wait()
	writers.Wait()

	c = startChild(t, cfg)
	t.Log("after a kill,", c.expect("ready"))
	list, err := adminClient(t, cfg.DataDir).CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	for _, m := range list.Items {
		have[m.Name] = true
	}
	for _, name := range acknowledged {
		if !have[name] {
			t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	t.Logf("%d acknowledged writes, all kept", len(acknowledged))
	c.stop()
}

// TestCannotStart wants one line that names the culprit and the cure.
func TestCannotStart(t *testing.T) {
	used := t.TempDir() // a store that was written and closed
	c := startChild(t, testConfig(t, used))
	c.expect("ready")
	c.stop()

	db := filepath.Join("etcd", "member", "snap", "db")
	const store = "open the store in …/etcd: …; restore …/etcd from a backup, or move it away to start with an empty cluster"
	for name, tt := range map[string]struct {
		damage func(t *testing.T, cfg *Config)
		want   string // with … for what differs
	}{
		"port taken": {
			func(t *testing.T, cfg *Config) {
				l, err := net.Listen("tcp", cfg.Listen[0].String())
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { l.Close() })
			},
			"listen on 127.0.0.1:…: address already in use; stop the program that uses it (ss -ltnp 'sport = :…' names it) or choose another port",
		},
		"address of another machine": {
			func(t *testing.T, cfg *Config) {
				cfg.Listen = append(cfg.Listen, netip.AddrPortFrom(netip.MustParseAddr("192.0.2.1"), cfg.Listen[0].Port()))
			},
			"listen on 192.0.2.1:…: …: no interface of this machine has the address 192.0.2.1; choose another with --address",
		},
		"database cut short": {truncated(db, 8192), store},
		"database garbled":   {garbled(db), store},
		"database emptied":   {truncated(db, 0), store},
		"log garbled":        {garbled(filepath.Join("etcd", "member", "wal")), store},
		"encryption key lost": {
			func(t *testing.T, cfg *Config) {
				if err := os.Remove(filepath.Join(cfg.DataDir, "pki", "encryption.yaml")); err != nil {
					t.Fatal(err)
				}
			},
			"encryption.yaml is missing but …/etcd/member is there; restore it from a backup, it is the only key to the Secrets in etcd",
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, t.TempDir())
			if err := os.CopyFS(cfg.DataDir, os.DirFS(used)); err != nil {
				t.Fatal(err)
			}
			tt.damage(t, &cfg)
			c := startChild(t, cfg)
			line := c.expect("error: ")
			t.Log(line)
			for _, part := range strings.Split(tt.want, "…") {
				if !strings.Contains(line, part) {
					t.Errorf("%q does not say %q", line, part)
				}
			}
			if more, ok := <-c.lines; ok {
				t.Errorf("more than one line: %q", more)
			}
		})
	}
}

func truncated(file string, size int64) func(*testing.T, *Config) {
	return func(t *testing.T, cfg *Config) {
		if err := os.Truncate(filepath.Join(cfg.DataDir, file), size); err != nil {
			t.Fatal(err)
		}
	}
}

// garbled overwrites the start of each file at or below path.
func garbled(path string) func(*testing.T, *Config) {
	return func(t *testing.T, cfg *Config) {
		err := filepath.WalkDir(filepath.Join(cfg.DataDir, path), func(file string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			f, err := os.OpenFile(file, os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteAt([]byte(strings.Repeat("garbage ", 4096)), 0)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestConfig(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"relative directory":     {func(c *Config) { c.DataDir = "data" }, "absolute"},
		"nowhere to listen":      {func(c *Config) { c.Listen = nil }, "listen"},
		"loopback advertised":    {func(c *Config) { c.Advertise = netip.MustParseAddr("127.0.0.1") }, "advertised"},
		"nothing advertised":     {func(c *Config) { c.Advertise = netip.Addr{} }, "advertised"},
		"pod network small":      {func(c *Config) { c.ClusterCIDR = netip.MustParsePrefix("10.42.0.0/25") }, "pod network"},
		"networks overlap":       {func(c *Config) { c.ServiceCIDR = netip.MustParsePrefix("10.42.8.0/24") }, "overlap"},
		"DNS elsewhere":          {func(c *Config) { c.DNSAddress = netip.MustParseAddr("10.44.0.10") }, "DNS"},
		"DNS at the API's":       {func(c *Config) { c.DNSAddress = netip.MustParseAddr("10.43.0.1") }, "DNS"},
		"no node name":           {func(c *Config) { c.NodeName = "" }, "node name"},
		"no logger":              {func(c *Config) { c.Log = nil }, "logger"},
		"directory is a file":    {func(c *Config) { c.DataDir = "/proc/self/status" }, "directory"},
		"everything is as meant": {},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t, t.TempDir())
			if tt.change != nil {
				tt.change(&cfg)
			}
			_, err := New(cfg)
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

func TestBeginStore(t *testing.T) {
	exists := func(name string) bool {
		_, err := os.Stat(name)
		return err == nil
	}
	dir := filepath.Join(t.TempDir(), "etcd")
	mark, member := filepath.Join(dir, unfinished), filepath.Join(dir, "member")
	begin := func() {
		t.Helper()
		if err := beginStore(dir); err != nil {
			t.Fatal(err)
		}
	}
	begin()
	if !exists(mark) {
		t.Fatal("a new store is not marked")
	}
	if err := os.MkdirAll(filepath.Join(member, "wal"), 0o700); err != nil {
		t.Fatal(err)
	}
	begin()
	if exists(member) || !exists(mark) {
		t.Fatal("a store that never took a write was not begun again")
	}
	if err := os.Mkdir(member, 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := finishStore(dir); err != nil {
			t.Fatal(err)
		}
	}
	begin()
	if !exists(member) || exists(mark) {
		t.Fatal("a store that took writes was touched")
	}
}
