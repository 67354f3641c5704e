package controlplane

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
)

// patience is how long a test waits for anything.
const patience = 2 * time.Minute

// childConfig, in the environment, makes the test binary a server: one control plane can run in a process, once.
const childConfig = "TUTTI_TEST_CONTROLPLANE"

func TestMain(m *testing.M) {
	if c := os.Getenv(childConfig); c != "" {
		os.Exit(serve(c))
	}
	os.Exit(m.Run())
}

// serve runs a control plane until SIGTERM. It prints "ready" or the error.
func serve(config string) int {
	var cfg Config
	if err := json.Unmarshal([]byte(config), &cfg); err != nil {
		fmt.Println("error:", err)
		return 1
	}
	cfg.Log = testLog()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cp, err := New(cfg)
	if err == nil {
		began := time.Now()
		go func() { <-cp.Ready(); fmt.Println("ready", time.Since(began).Round(time.Millisecond)) }()
		err = cp.Run(ctx)
	}
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	fmt.Println("stopped")
	return 0
}

// testLog writes to stderr at the level of TUTTI_TEST_LOG, warnings without it.
func testLog() *slog.Logger {
	level := slog.LevelWarn
	if v := os.Getenv("TUTTI_TEST_LOG"); v != "" {
		level.UnmarshalText([]byte(v))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}

func testConfig(t *testing.T, dir string) Config {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return Config{
		DataDir:     dir,
		Listen:      []netip.AddrPort{netip.MustParseAddrPort(l.Addr().String())},
		Advertise:   netip.MustParseAddr("10.41.0.1"),
		ClusterCIDR: netip.MustParsePrefix("10.42.0.0/16"),
		ServiceCIDR: netip.MustParsePrefix("10.43.0.0/16"),
		DNSAddress:  netip.MustParseAddr("10.43.0.10"),
		NodeName:    "n1",
		Log:         testLog(),
	}
}

// child is a control plane in a process of its own.
type child struct {
	t     *testing.T
	cmd   *exec.Cmd
	lines chan string
}

func startChild(t *testing.T, cfg Config) *child {
	t.Helper()
	cfg.Log = nil
	b, err := json.Marshal(cfg)
	if err != nil {
		t.Fatal(err)
	}
	c := &child{t: t, cmd: exec.Command(os.Args[0]), lines: make(chan string, 16)}
	c.cmd.Env = append(os.Environ(), childConfig+"="+string(b))
	c.cmd.Stderr = os.Stderr
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.cmd.Process.Kill(); c.cmd.Wait() })
	go func() {
		defer close(c.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			c.lines <- s.Text()
		}
		io.Copy(io.Discard, out)
	}()
	return c
}

// line waits for the child's next line.
func (c *child) line() string {
	c.t.Helper()
	select {
	case l, ok := <-c.lines:
		if !ok {
			c.t.Fatalf("child ended: %v", c.cmd.Wait())
		}
		return l
	case <-time.After(patience):
		c.t.Fatal("child says nothing")
	}
	return ""
}

// expect waits for a line that starts with want.
func (c *child) expect(want string) string {
	c.t.Helper()
	l := c.line()
	if !strings.HasPrefix(l, want) {
		c.t.Fatalf("child says %q, want %q", l, want)
	}
	return l
}

// stop ends the child cleanly.
func (c *child) stop() {
	c.t.Helper()
	began := time.Now()
	c.cmd.Process.Signal(syscall.SIGTERM)
	c.expect("stopped")
	c.t.Logf("stopped after %s", time.Since(began).Round(time.Millisecond))
	if err := c.cmd.Wait(); err != nil {
		c.t.Errorf("child: %v", err)
	}
}

// adminClient reaches the API from outside, by TLS, with the admin kubeconfig.
func adminClient(t *testing.T, dir string) *kubernetes.Clientset {
	t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", filepath.Join(dir, "admin.kubeconfig"))
	if err != nil {
		t.Fatal(err)
	}
	c.QPS = -1
	client, err := kubernetes.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return client
}
