package serve

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	utilexec "k8s.io/client-go/util/exec"
	kubeletconfig "k8s.io/kubelet/config/v1beta1"
	stats "k8s.io/kubelet/pkg/apis/stats/v1alpha1"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/volume"
)

const limit = 20 * time.Second

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// host is a runtime and an agent in one: it runs programs of this machine.
type host struct {
	runtime.Runtime // what is not needed here

	mu     sync.Mutex
	pods   []*v1.Pod
	status map[runtime.ID]runtime.Status
	netns  string
	// silent pods take and say nothing; it is told how an attachment ended.
	silent chan error
}

func (h *host) Pods() []*v1.Pod { return h.pods }

func (h *host) NetNS(types.UID) (string, error) {
	if h.netns == "" {
		return "", errors.New("not attached")
	}
	return h.netns, nil
}

func (h *host) Find(pod types.UID, container string) (runtime.Status, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	newest, found := runtime.Status{ID: runtime.ID{Attempt: -1}}, false
	for id, s := range h.status {
		if id.Pod == string(pod) && id.Name == container && id.Attempt > newest.Attempt {
			newest, found = s, true
		}
	}
	if !found {
		return newest, runtime.ErrNotFound
	}
	return newest, nil
}

func (h *host) Exec(ctx context.Context, _ runtime.ID, e runtime.Exec) (int, error) {
	cmd := exec.CommandContext(ctx, e.Args[0], e.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = e.Stdin, e.Stdout, e.Stderr
	if e.Resize != nil {
		size := <-e.Resize
		fmt.Fprintf(e.Stdout, "%dx%d\n", size.Width, size.Height)
	}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), nil
	}
	return 0, err
}

func (h *host) Attach(ctx context.Context, _ runtime.ID, s runtime.Streams) error {
	fmt.Fprintln(s.Stdout, "attached")
	if h.silent != nil {
		<-ctx.Done()
		h.silent <- ctx.Err()
		return ctx.Err()
	}
	_, err := io.Copy(s.Stdout, s.Stdin)
	return err
}

func (h *host) Stats(context.Context, runtime.ID) (runtime.Stats, error) {
	return runtime.Stats{Time: time.Now(), CPU: 3 * time.Second, Memory: 64 << 20, WorkSet: 32 << 20, Processes: 2, WritableLayer: 4096}, nil
}

// authority signs certificates.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newAuthority(t *testing.T) *authority {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return &authority{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

func (a *authority) sign(t *testing.T, name string, usage x509.ExtKeyUsage) (certPEM, keyPEM []byte) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}, a.cert, &key.PublicKey, a.key)
	must(t, err)
	keyDER, err := x509.MarshalECPrivateKey(key)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: keyDER})
}

const uid = "8f1a"

func testPod() *v1.Pod {
	id := func(attempt int) string { return fmt.Sprintf("tutti://%s_c_%d", uid, attempt) }
	return &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: uid},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "c"}, {Name: "new"}}},
		Status: v1.PodStatus{Phase: v1.PodRunning, ContainerStatuses: []v1.ContainerStatus{
			{Name: "c", ContainerID: id(1), State: v1.ContainerState{Running: &v1.ContainerStateRunning{}},
				LastTerminationState: v1.ContainerState{Terminated: &v1.ContainerStateTerminated{ContainerID: id(0)}}},
			{Name: "new", State: v1.ContainerState{Waiting: &v1.ContainerStateWaiting{Reason: "ImagePullBackOff"}}},
		}},
	}
}

type fixture struct {
	*host
	t    *testing.T
	dir  string
	url  string
	as   func(user string) *rest.Config
	http *http.Client // as admin
}

// reviewer is as much of an API server as authorization asks. It knows one
// token, "reader's".
func reviewer(t *testing.T) kubernetes.Interface {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/apis/authorization.k8s.io/v1/subjectaccessreviews":
			var review authorizationv1.SubjectAccessReview
			_ = json.NewDecoder(r.Body).Decode(&review)
			attrs := review.Spec.ResourceAttributes
			review.Status.Allowed = attrs.Name == "n1" && attrs.Resource == "nodes" &&
				(review.Spec.User == "admin" || review.Spec.User == "reader" && attrs.Subresource == "metrics" && attrs.Verb == "get")
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(review)
		case "/apis/authentication.k8s.io/v1/tokenreviews":
			var review authenticationv1.TokenReview
			_ = json.NewDecoder(r.Body).Decode(&review)
			review.Status.Authenticated = review.Spec.Token == "reader's"
			review.Status.User.Username = "reader"
			w.WriteHeader(http.StatusCreated)
			_ = json.NewEncoder(w).Encode(review)
		default:
			http.NotFound(w, r)
		}
	}))
	t.Cleanup(server.Close)
	return kubernetes.NewForConfigOrDie(&rest.Config{Host: server.URL})
}

// newFixture serves on a real port. "admin" may do everything, "reader" may
// get metrics, and nobody else anything.
func newFixture(t *testing.T) *fixture {
	ca := newAuthority(t)
	client := reviewer(t)
	h := &host{pods: []*v1.Pod{testPod()}, status: map[runtime.ID]runtime.Status{}}
	for attempt, state := range []runtime.State{runtime.Exited, runtime.Running} {
		id := runtime.ID{Pod: uid, Name: "c", Attempt: attempt}
		h.status[id] = runtime.Status{ID: id, State: state, PID: os.Getpid(), StartedAt: time.Unix(1700000000, 0)}
	}
	dir := t.TempDir()
	certPEM, keyPEM := ca.sign(t, "n1", x509.ExtKeyUsageServerAuth)
	cert, err := tls.X509KeyPair(certPEM, keyPEM)
	must(t, err)
	s, err := New(Config{
		NodeName: "n1", Pods: h, Runtime: h, Dir: dir, Client: client, ClientCA: ca.pem,
		Configuration: kubeletconfig.KubeletConfiguration{Port: 10250, MaxPods: 7},
		Certificate:   func() (*tls.Certificate, error) { return &cert, nil },
		Flows:         func() ([]api.Flow, error) { return []api.Flow{testFlow}, nil },
	})
	must(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(limit):
			t.Error("the server does not stop")
		}
	})
	f := &fixture{host: h, t: t, dir: dir, url: "https://" + l.Addr().String()}
	f.as = func(user string) *rest.Config {
		config := &rest.Config{Host: f.url, TLSClientConfig: rest.TLSClientConfig{CAData: ca.pem}}
		if user != "" {
			config.CertData, config.KeyData = ca.sign(t, user, x509.ExtKeyUsageClientAuth)
		}
		return config
	}
	f.http, err = rest.HTTPClientFor(f.as("admin"))
	must(t, err)
	f.http.Timeout = limit
	return f
}

var testFlow = api.Flow{
	Protocol: "tcp", From: netip.MustParseAddr("10.42.0.2"), Open: 3,
	To: netip.MustParseAddrPort("10.43.0.9:80"), At: netip.MustParseAddrPort("10.42.0.3:8080"),
}

func TestFlows(t *testing.T) {
	code, body := newFixture(t).get(api.PathFlows)
	var all []api.Flow
	if err := json.Unmarshal([]byte(body), &all); err != nil || code != http.StatusOK || !slices.Equal(all, []api.Flow{testFlow}) {
		t.Errorf("%d %s: %v", code, body, err)
	}
}

func (f *fixture) get(path string) (int, string) {
	f.t.Helper()
	resp, err := f.http.Get(f.url + path)
	must(f.t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(f.t, err)
	return resp.StatusCode, string(body)
}

func (f *fixture) log(attempt int, lines ...string) *os.File {
	f.t.Helper()
	path := LogFile(f.dir, f.pods[0], "c", attempt)
	must(f.t, os.MkdirAll(filepath.Dir(path), 0o755))
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(f.t, err)
	f.t.Cleanup(func() { file.Close() })
	for _, line := range lines {
		_, err := fmt.Fprintln(file, line)
		must(f.t, err)
	}
	return file
}

func TestAuthorization(t *testing.T) {
	f := newFixture(t)
	for _, test := range []struct {
		user, path string
		code       int
	}{
		{"", "/pods", http.StatusUnauthorized},
		{"nobody", "/pods", http.StatusForbidden},
		{"reader", "/pods", http.StatusForbidden},
		{"reader", "/metrics/resource", http.StatusOK},
		{"reader", "/exec/ns/p/c?command=true&output=1", http.StatusForbidden},
		{"admin", "/pods", http.StatusOK},
		{"admin", "/healthz", http.StatusOK},
		{"reader", "/metrics/cadvisor", http.StatusOK},
		{"reader", "/configz", http.StatusForbidden},
		{"reader", "/logs/", http.StatusForbidden},
		{"reader", api.PathFlows, http.StatusForbidden},
		{"admin", "/nothing", http.StatusNotFound},
	} {
		client, err := rest.HTTPClientFor(f.as(test.user))
		must(t, err)
		resp, err := client.Get(f.url + test.path)
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != test.code {
			t.Errorf("%q asks for %s: %d, want %d", test.user, test.path, resp.StatusCode, test.code)
		}
	}
	for token, code := range map[string]int{"reader's": http.StatusOK, "nobody's": http.StatusUnauthorized} {
		config := f.as("")
		config.BearerToken = token
		client, err := rest.HTTPClientFor(config)
		must(t, err)
		resp, err := client.Get(f.url + "/metrics/resource")
		must(t, err)
		resp.Body.Close()
		if resp.StatusCode != code {
			t.Errorf("with %s token: %d", token, resp.StatusCode)
		}
	}
	// A certificate of another authority is nobody's.
	foreign := f.as("")
	foreign.CertData, foreign.KeyData = newAuthority(t).sign(t, "admin", x509.ExtKeyUsageClientAuth)
	client, err := rest.HTTPClientFor(foreign)
	must(t, err)
	resp, err := client.Get(f.url + "/pods")
	must(t, err)
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a foreign certificate: %d", resp.StatusCode)
	}
}

func TestLogs(t *testing.T) {
	f := newFixture(t)
	f.log(0, "2026-01-02T03:04:05.000000000Z stdout F before")
	f.log(1, "2026-01-02T03:04:05.000000000Z stdout F one", "2026-01-02T03:04:06.000000000Z stderr P tw", "2026-01-02T03:04:07.000000000Z stderr F o")
	for query, want := range map[string]string{
		"":                                "one\ntwo\n",
		"?previous=true":                  "before\n",
		"?tailLines=1":                    "o\n",
		"?timestamps=true&stream=Stdout":  "2026-01-02T03:04:05.000000000Z one\n",
		"?sinceTime=2026-01-02T03:04:06Z": "two\n",
		"?limitBytes=2":                   "on",
		"?stream=Stdout":                  "one\n",
		"?sinceSeconds=1":                 "",
	} {
		if code, body := f.get("/containerLogs/ns/p/c" + query); code != http.StatusOK || body != want {
			t.Errorf("%s: %d %q, want %q", query, code, body, want)
		}
	}
	for path, want := range map[string]string{
		"/containerLogs/ns/none/c":              `404 pod "none" does not exist`,
		"/containerLogs/ns/p/none":              `404 container "none" not found in pod "p"`,
		"/containerLogs/ns/p/new":               `400 container "new" in pod "p" is waiting to start: trying and failing to pull image`,
		"/containerLogs/ns/p/c?tailLines=-1":    `422 tailLines: Invalid value: -1: must be greater than or equal to 0`,
		"/containerLogs/ns/p/new?previous=true": `400 previous terminated container "new" in pod "p" not found`,
	} {
		code, body := f.get(path)
		if got := fmt.Sprintf("%d %s", code, strings.TrimSpace(body)); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}

func TestLogsFollow(t *testing.T) {
	f := newFixture(t)
	file := f.log(1, "2026-01-02T03:04:05.000000000Z stdout F one")
	resp, err := f.http.Get(f.url + "/containerLogs/ns/p/c?follow=true")
	must(t, err)
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	read := func(want string) {
		t.Helper()
		if !lines.Scan() || lines.Text() != want {
			t.Fatalf("%q (%v), want %q", lines.Text(), lines.Err(), want)
		}
	}
	read("one")
	fmt.Fprintln(file, "2026-01-02T03:04:06.000000000Z stdout F two")
	read("two")
	id := runtime.ID{Pod: uid, Name: "c", Attempt: 1}
	f.mu.Lock()
	f.status[id] = runtime.Status{ID: id, State: runtime.Exited}
	f.mu.Unlock()
	fmt.Fprintln(file, "2026-01-02T03:04:07.000000000Z stdout F last words")
	read("last words")
	if lines.Scan() {
		t.Fatalf("more after the end: %q", lines.Text())
	}
}

func TestExec(t *testing.T) {
	f := newFixture(t)
	location := func(path string, query url.Values) *url.URL {
		u, err := url.Parse(f.url + path + "?" + query.Encode())
		must(t, err)
		return u
	}
	executors := map[string]func(*url.URL) (remotecommand.Executor, error){
		"SPDY": func(u *url.URL) (remotecommand.Executor, error) {
			return remotecommand.NewSPDYExecutor(f.as("admin"), "POST", u)
		},
		"WebSocket": func(u *url.URL) (remotecommand.Executor, error) {
			return remotecommand.NewWebSocketExecutorForProtocols(f.as("admin"), "GET", u.String(), "v4.channel.k8s.io")
		},
	}
	for name, newExecutor := range executors {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			query := url.Values{"command": {"sh", "-c", "echo out; echo err >&2; exit 3"}, "output": {"1"}, "error": {"1"}}
			executor, err := newExecutor(location("/exec/ns/p/"+uid+"/c", query))
			must(t, err)
			var out, errOut bytes.Buffer
			err = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &errOut})
			var exit utilexec.ExitError
			if !errors.As(err, &exit) || exit.ExitStatus() != 3 || out.String() != "out\n" || errOut.String() != "err\n" {
				t.Errorf("%v, %q, %q", err, out.String(), errOut.String())
			}

			executor, err = newExecutor(location("/exec/ns/p/none", query))
			must(t, err)
			if err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdout: &out, Stderr: &errOut}); err == nil {
				t.Error("a container that is not there ran a program")
			}
		})
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	t.Run("stdin and terminal size", func(t *testing.T) {
		executor, err := executors["SPDY"](location("/exec/ns/p/c", url.Values{"command": {"cat"}, "input": {"1"}, "output": {"1"}, "tty": {"1"}}))
		must(t, err)
		var out bytes.Buffer
		sizes := sizeQueue{{Width: 80, Height: 24}}
		must(t, executor.StreamWithContext(ctx, remotecommand.StreamOptions{
			Stdin: strings.NewReader("hello"), Stdout: &out, Tty: true, TerminalSizeQueue: &sizes}))
		if out.String() != "80x24\nhello" {
			t.Errorf("%q", out.String())
		}
	})
	t.Run("attach", func(t *testing.T) {
		executor, err := executors["SPDY"](location("/attach/ns/p/c", url.Values{"input": {"1"}, "output": {"1"}}))
		must(t, err)
		var out bytes.Buffer
		must(t, executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: strings.NewReader("hello"), Stdout: &out}))
		if out.String() != "attached\nhello" {
			t.Errorf("%q", out.String())
		}
	})
}

// The client of an attachment is killed; its pod says nothing, so that nobody
// would find out by writing to it.
func TestAttachCutOff(t *testing.T) {
	f := newFixture(t)
	f.silent = make(chan error, 1)
	for name, stdin := range map[string]io.Reader{"output only": nil, "stdin": strings.NewReader("hello")} {
		t.Run(name, func(t *testing.T) {
			query := url.Values{"output": {"1"}}
			if stdin != nil {
				query.Set("input", "1")
			}
			u, err := url.Parse(f.url + "/attach/ns/p/c?" + query.Encode())
			must(t, err)
			executor, err := remotecommand.NewSPDYExecutor(f.as("admin"), "POST", u)
			must(t, err)
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			out := writer(func([]byte) { cancel() })
			_ = executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: out})
			select {
			case <-f.silent:
			case <-time.After(limit):
				t.Fatal("the attachment goes on without its client")
			}
		})
	}
}

type writer func([]byte)

func (w writer) Write(p []byte) (int, error) {
	w(p)
	return len(p), nil
}

type sizeQueue []remotecommand.TerminalSize

func (q *sizeQueue) Next() *remotecommand.TerminalSize {
	if len(*q) == 0 {
		return nil
	}
	size := (*q)[0]
	*q = (*q)[1:]
	return &size
}

// listenIn makes a network namespace in which a server echoes on loopback.
func listenIn(t *testing.T, dir string) (netns string, port int) {
	netns = filepath.Join(dir, "netns")
	must(t, os.WriteFile(netns, nil, 0o600))
	type result struct {
		l   net.Listener
		err error
	}
	made := make(chan result, 1)
	go func() {
		goruntime.LockOSThread() // and the thread ends with the goroutine
		l, err := func() (net.Listener, error) {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return nil, err
			}
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return nil, err
			}
			if err := netlink.LinkSetUp(lo); err != nil {
				return nil, err
			}
			if err := volume.Bind("/proc/thread-self/ns/net", netns); err != nil {
				return nil, err
			}
			return net.Listen("tcp", "127.0.0.1:0")
		}()
		made <- result{l, err}
	}()
	r := <-made
	must(t, r.err)
	t.Cleanup(func() {
		r.l.Close()
		must(t, volume.UnmountBelow(netns))
	})
	go func() {
		for {
			conn, err := r.l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return netns, r.l.Addr().(*net.TCPAddr).Port
}

func TestPortForward(t *testing.T) {
	f := newFixture(t)
	transport, upgrader, err := spdy.RoundTripperFor(f.as("admin"))
	must(t, err)
	u, err := url.Parse(f.url + "/portForward/ns/p")
	must(t, err)
	// A pod without a network must not become a way to the machine's.
	if conn, _, err := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u).Dial("portforward.k8s.io"); err == nil {
		conn.Close()
		t.Fatal("connected to a pod that is not attached")
	}
	netns, port := listenIn(t, t.TempDir())
	f.netns = netns
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u)
	stop, ready := make(chan struct{}), make(chan struct{})
	pf, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, []string{fmt.Sprintf("0:%d", port)}, stop, ready, io.Discard, io.Discard)
	must(t, err)
	ended := make(chan error, 1)
	go func() { ended <- pf.ForwardPorts() }()
	select {
	case <-ready:
	case err := <-ended:
		t.Fatal(err)
	case <-time.After(limit):
		t.Fatal("not ready")
	}
	ports, err := pf.GetPorts()
	must(t, err)
	for range 3 {
		conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", ports[0].Local))
		must(t, err)
		must(t, conn.SetDeadline(time.Now().Add(limit)))
		_, err = conn.Write([]byte("hello"))
		must(t, err)
		must(t, conn.(*net.TCPConn).CloseWrite())
		got, err := io.ReadAll(conn)
		must(t, err)
		if string(got) != "hello" {
			t.Fatalf("%q came back", got)
		}
		conn.Close()
	}
	close(stop)
	must(t, <-ended)
}

func TestPodsAndStats(t *testing.T) {
	f := newFixture(t)
	f.log(1, "2026-01-02T03:04:05.000000000Z stdout F one")
	_, body := f.get("/pods")
	var list v1.PodList
	must(t, json.Unmarshal([]byte(body), &list))
	if list.Kind != "PodList" || len(list.Items) != 1 || list.Items[0].Name != "p" {
		t.Errorf("%+v", list)
	}
	if code, body := f.get("/runningpods/"); code != http.StatusOK || !strings.Contains(body, `"name":"p"`) {
		t.Errorf("%d %s", code, body)
	}
	code, body := f.get("/stats/summary")
	var summary stats.Summary
	if err := json.Unmarshal([]byte(body), &summary); err != nil {
		t.Fatalf("%d %s: %v", code, body, err)
	}
	pod := summary.Pods[0]
	if len(pod.Containers) != 1 || *pod.CPU.UsageCoreNanoSeconds != 3e9 || *pod.Memory.WorkingSetBytes != 32<<20 ||
		*pod.Containers[0].Rootfs.UsedBytes != 4096 || *pod.Containers[0].Logs.UsedBytes == 0 || *summary.Node.Memory.WorkingSetBytes == 0 || *summary.Node.CPU.UsageCoreNanoSeconds == 0 {
		t.Errorf("%s", body)
	}
	_, body = f.get("/metrics/resource")
	for _, want := range []string{
		`container_cpu_usage_seconds_total{container="c",namespace="ns",pod="p"} 3 `,
		`pod_memory_working_set_bytes{namespace="ns",pod="p"} 3.3554432e+07 `,
		`container_start_time_seconds{container="c",namespace="ns",pod="p"} 1.7e+09`,
		"node_cpu_usage_seconds_total ", "node_memory_working_set_bytes ", "resource_scrape_error 0",
	} {
		if !slices.ContainsFunc(strings.Split(body, "\n"), func(line string) bool { return strings.HasPrefix(line, want) }) {
			t.Errorf("no %s in:\n%s", want, body)
		}
	}
	_, body = f.get("/metrics")
	for _, want := range []string{
		`kubelet_node_name{node="n1"} 1`, "kubelet_running_pods 1", `kubelet_running_containers{container_state="running"} 1`, "process_start_time_seconds ", "go_goroutines ",
	} {
		if !strings.Contains(body, "\n"+want) {
			t.Errorf("no %s in:\n%s", want, body)
		}
	}
}

func TestCAdvisor(t *testing.T) {
	f := newFixture(t)
	f.pods[0].Spec.Containers[0].Image = "busybox:1"
	f.pods[0].Spec.Containers[0].Resources.Limits = v1.ResourceList{
		v1.ResourceCPU: resource.MustParse("200m"), v1.ResourceMemory: resource.MustParse("64Mi")}
	_, body := f.get("/metrics/cadvisor")
	own := cgroup(os.Getpid())
	if !strings.HasPrefix(own, "/") {
		t.Errorf("own control group %q", own)
	}
	c := fmt.Sprintf(`{container="c",%%sid="%s",image="busybox:1",name="8f1a_c_1",namespace="ns",pod="p"} %%s`, own)
	for name, want := range map[string]string{
		"container_memory_usage_bytes":       "6.7108864e+07 ",
		"container_memory_working_set_bytes": "3.3554432e+07 ",
		"container_processes":                "2 ",
		"container_start_time_seconds":       "1.7e+09 ",
		"container_spec_cpu_period":          "100000 ",
		"container_spec_cpu_quota":           "20000 ",
		"container_spec_memory_limit_bytes":  "6.7108864e+07 ",
	} {
		if want = name + fmt.Sprintf(c, "", want); !strings.Contains(body, want) {
			t.Errorf("no %s in:\n%s", want, body)
		}
	}
	for _, want := range []string{
		"container_cpu_usage_seconds_total" + fmt.Sprintf(c, `cpu="total",`, "3 "),
		"container_fs_usage_bytes" + fmt.Sprintf(c, `device="",`, "4096 "),
		`container_cpu_usage_seconds_total{container="",cpu="total",id="/",image="",name="",namespace="",pod=""} `,
		`container_memory_working_set_bytes{container="",id="/",image="",name="",namespace="",pod=""} `,
		"machine_memory_bytes ",
	} {
		if !strings.Contains(body, want) {
			t.Errorf("no %s in:\n%s", want, body)
		}
	}
	if strings.Contains(body, `container="new"`) {
		t.Errorf("a container that does not run:\n%s", body)
	}
}

// What went over a pod's own link is told, and what stayed in it is not.
func TestCAdvisorNetwork(t *testing.T) {
	f := newFixture(t)
	netns, _ := listenIn(t, t.TempDir())
	f.netns = netns
	cmd := exec.Command("nsenter", "--net="+netns, "sh", "-c", "ip link add eth0 type veth peer name other && exec sleep 60")
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	id := runtime.ID{Pod: uid, Name: "c", Attempt: 1}
	f.mu.Lock()
	f.status[id] = runtime.Status{ID: id, State: runtime.Running, PID: cmd.Process.Pid}
	f.mu.Unlock()
	for deadline := time.Now().Add(limit); ; {
		_, body := f.get("/metrics/cadvisor")
		if strings.Contains(body, `container_network_transmit_bytes_total{container="",id="",image="",interface="eth0",name="",namespace="ns",pod="p"} 0 `) {
			if strings.Contains(body, `interface="lo"`) {
				t.Errorf("loopback is told:\n%s", body)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no eth0 in:\n%s", body)
		}
	}
}

func TestNodeLogs(t *testing.T) {
	file, err := os.CreateTemp(nodeLogs, "tutti-test-*.log")
	must(t, err)
	defer os.Remove(file.Name())
	_, err = file.WriteString("of the machine")
	must(t, errors.Join(err, file.Close()))
	f, name := newFixture(t), filepath.Base(file.Name())
	if code, body := f.get("/logs/"); code != http.StatusOK || !strings.Contains(body, name) {
		t.Errorf("%d %s", code, body)
	}
	if code, body := f.get("/logs/" + name); code != http.StatusOK || body != "of the machine" {
		t.Errorf("%d %s", code, body)
	}
}

func TestConfigz(t *testing.T) {
	f := newFixture(t)
	code, body := f.get("/configz")
	var answer struct{ KubeletConfig map[string]any }
	must(t, json.Unmarshal([]byte(body), &answer))
	if c := answer.KubeletConfig; code != http.StatusOK || c["maxPods"] != 7.0 || c["port"] != 10250.0 || c["syncFrequency"] != nil {
		t.Errorf("%d %s", code, body)
	}
}
