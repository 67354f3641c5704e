package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/image/registry"
)

func settings(change func(*api.Settings)) api.Settings {
	s := api.Settings{Port: 6443, RegistryPort: 5000, NodeName: "n", ClusterCIDR: "10.42.0.0/16", ServiceCIDR: "10.43.0.0/16"}
	change(&s)
	return s
}

func TestReadSettings(t *testing.T) {
	for _, c := range []struct {
		name  string
		files map[string]string
		found bool
		fails string
	}{
		{"absent", nil, false, ""},
		{"empty", map[string]string{}, false, ""},
		{"a start that failed", map[string]string{"lock": "12\n", "log/tutti.log": ""}, false, ""},
		{"someone else's", map[string]string{"passwd": ""}, false, "is not a data directory of tutti, and not empty (it has passwd); choose another with --data-dir"},
		{"ours", map[string]string{"config.json": `{"format":1,"port":7000}`, "etcd/x": ""}, true, ""},
		{"damaged", map[string]string{"config.json": `{"format":`}, false, "config.json is damaged (unexpected end of JSON input); restore it from a backup, or begin anew with `tutti stop --purge`"},
		{"cut to nothing", map[string]string{"config.json": `{}`}, false, "config.json is damaged (it has no format); restore it from a backup, or begin anew with `tutti stop --purge`"},
		{"newer", map[string]string{"config.json": `{"format":2}`}, false, " was written by a newer tutti (format 2, this one knows 1); install that version"},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			if c.files != nil {
				if err := os.Mkdir(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			for f, text := range c.files {
				f = filepath.Join(dir, f)
				if err := errors.Join(os.MkdirAll(filepath.Dir(f), 0o700), os.WriteFile(f, []byte(text), 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			s, found, err := readSettings(api.DataDir(dir))
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) || !strings.Contains(err.Error(), dir) {
					t.Errorf("error %v", err)
				}
				return
			}
			if err != nil || found != c.found || found && s.Port != 7000 {
				t.Errorf("got %+v, %v, %v", s, found, err)
			}
		})
	}
}

func TestMerge(t *testing.T) {
	kept := settings(func(s *api.Settings) { s.Port = 7000 })
	for _, c := range []struct {
		name          string
		asked, before api.Settings
		found         bool
		want          api.Settings
		fails         string
	}{
		{"asked for at first", api.Settings{NodeName: "n", Address: "10.0.0.1"}, api.Settings{}, false, settings(func(s *api.Settings) { s.Address = "10.0.0.1" }), ""},
		{"kept", api.Settings{}, kept, true, kept, ""},
		{"changed", api.Settings{Port: 7001}, kept, true, settings(func(s *api.Settings) { s.Port = 7001 }), ""},
		{"the same again", api.Settings{ClusterCIDR: "10.42.0.0/16"}, kept, true, kept, ""},
		{"what cannot change", api.Settings{ClusterCIDR: "10.1.0.0/16"}, kept, true, api.Settings{}, "--cluster-cidr cannot change from 10.42.0.0/16 to 10.1.0.0/16; leave it out, or begin anew with `tutti stop --purge`"},
		{"another name", api.Settings{NodeName: "m"}, kept, true, api.Settings{}, "--node-name cannot change"},
		{"a server where an agent was", api.Settings{}, settings(func(s *api.Settings) { s.Agent = true }), true, api.Settings{}, "this data directory is an agent's, of a cluster elsewhere; run `tutti agent` with it, or begin anew with `tutti stop --purge`"},
		{"an agent where a server was", api.Settings{Agent: true}, kept, true, api.Settings{}, "this data directory has a cluster of its own; choose another with --data-dir, or begin anew with `tutti stop --purge`"},
		{"no port", api.Settings{Port: 70000}, kept, true, api.Settings{}, "--port 70000 is not a port; choose one from 1 to 65535"},
		{"no registry", api.Settings{RegistryPort: -1}, kept, true, settings(func(s *api.Settings) { s.Port, s.RegistryPort = 7000, -1 }), ""},
		{"no port for the registry", api.Settings{RegistryPort: -2}, kept, true, api.Settings{}, "--registry-port -2 is not a free port; choose another from 1 to 65535, or -1 for no registry"},
		{"one port for two", api.Settings{RegistryPort: 7000}, kept, true, api.Settings{}, "--registry-port 7000"},
		{"mirrors", api.Settings{Mirrors: "docker.io,quay.io=http://10.0.0.1:5001"}, kept, true, settings(func(s *api.Settings) { s.Port, s.Mirrors = 7000, "docker.io,quay.io=http://10.0.0.1:5001" }), ""},
		{"mirrors without a registry", api.Settings{RegistryPort: -1, Mirrors: "docker.io"}, kept, true, api.Settings{}, "--mirrors needs the registry, which --registry-port -1 turns off; leave out one of them"},
		{"no registry", api.Settings{Mirrors: "library"}, kept, true, api.Settings{}, `--mirrors: "library" is not a registry; name it as images do, such as docker.io or quay.io`},
		{"a mirror twice", api.Settings{Mirrors: "quay.io,quay.io"}, kept, true, api.Settings{}, "--mirrors: quay.io is there twice; leave one out"},
		{"a mirror with a path", api.Settings{Mirrors: "quay.io=https://10.0.0.1/quay"}, kept, true, api.Settings{}, `--mirrors: "https://10.0.0.1/quay" is not the address of a registry; give https://HOST[:PORT], without a path or a password`},
		{"reserved", api.Settings{SystemReserved: "memory=1Gi"}, kept, true, settings(func(s *api.Settings) { s.Port, s.SystemReserved = 7000, "memory=1Gi" }), ""},
		{"nothing to reserve", api.Settings{SystemReserved: "gpu=1"}, kept, true, api.Settings{}, `--system-reserved: "gpu=1" keeps nothing; give a list such as`},
		{"no address", api.Settings{Address: "here"}, kept, true, api.Settings{}, `--address "here" is not an IP address; give one of this machine's, or 0.0.0.0 for all`},
		{"no name", api.Settings{NodeName: "A_b"}, api.Settings{}, false, api.Settings{}, `"A_b" cannot be the name of a node; choose one of lower case letters, digits, '-' and '.' with --node-name`},
		{"no network", api.Settings{NodeName: "n", ServiceCIDR: "10.43.0.1/16"}, api.Settings{}, false, api.Settings{}, `--service-cidr "10.43.0.1/16" is not an IPv4 network of at least a /28; give one such as 10.42.0.0/16`},
		{"too small a network", api.Settings{NodeName: "n", ClusterCIDR: "10.43.0.0/25"}, api.Settings{}, false, api.Settings{}, `--cluster-cidr "10.43.0.0/25" is not an IPv4 network of at least a /24`},
		{"networks overlap", api.Settings{NodeName: "n", ClusterCIDR: "10.43.0.0/16"}, api.Settings{}, false, api.Settings{}, "--cluster-cidr 10.43.0.0/16 and --service-cidr 10.43.0.0/16 overlap; choose others"},
		{"pods where the machine is", api.Settings{NodeName: "n", ClusterCIDR: "10.40.0.0/15"}, api.Settings{}, false, api.Settings{}, "--cluster-cidr 10.40.0.0/15 has 10.41.0.1 in it, by which pods know this machine; choose another"},
		{"Services where the machine is", api.Settings{NodeName: "n", ServiceCIDR: "10.41.0.0/24"}, api.Settings{}, false, api.Settings{}, "--service-cidr 10.41.0.0/24 has 10.41.0.1 in it, by which pods know this machine; choose another"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := merge(c.asked, c.before, c.found)
			if c.fails != "" {
				if err == nil || !strings.Contains(err.Error(), c.fails) {
					t.Errorf("error %v", err)
				}
			} else if err != nil || got != c.want {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
}

func TestSettingsAreKept(t *testing.T) {
	dir := api.DataDir(t.TempDir())
	want := settings(func(s *api.Settings) { s.Address = "0.0.0.0" })
	for range 2 {
		if err := writeSettings(dir, want); err != nil {
			t.Fatal(err)
		}
		if got, found, err := readSettings(dir); err != nil || !found || got != want {
			t.Errorf("got %+v, %v, %v", got, found, err)
		}
	}
}

func TestTwoAtOnce(t *testing.T) {
	dir := api.DataDir(t.TempDir())
	unlock, err := lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	pid, _ := json.Marshal(os.Getpid())
	if _, err := lock(dir); err == nil || !strings.Contains(err.Error(), "process "+string(pid)+" serves "+string(dir)+" already; stop it with `tutti stop`, or choose another directory with --data-dir") {
		t.Errorf("the second: %v", err)
	}
	unlock()
	unlock, err = lock(dir)
	if err != nil {
		t.Fatalf("after the first has gone: %v", err)
	}
	unlock()
}

func TestPortInUse(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	p := port{"the test", "tcp", netip.MustParseAddrPort(l.Addr().String()), "end it"}
	want := fmt.Sprintf("tcp port %d, for the test, is in use by process %d (daemon.test); end it", p.at.Port(), os.Getpid())
	if err := p.free(); err == nil || err.Error() != want {
		t.Errorf("while it is: %v", err)
	}
	l.Close()
	if err := p.free(); err != nil {
		t.Errorf("after: %v", err)
	}
	elsewhere := port{"the test", "udp", netip.MustParseAddrPort("192.0.2.1:5353"), "end it"}
	if err := elsewhere.free(); err != nil {
		t.Errorf("of an address that is not there yet: %v", err)
	}
}

func TestCheckAddress(t *testing.T) {
	for _, good := range []string{"", "127.0.0.1", "0.0.0.0", "10.41.0.1"} {
		if err := checkAddress(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	const want = "--address 192.0.2.1 is no address of this machine; `ip address` lists them, and 127.0.0.1 takes it back"
	if err := checkAddress("192.0.2.1"); err == nil || err.Error() != want {
		t.Errorf("error %v", err)
	}
}

func TestCheckOverlay(t *testing.T) {
	file := filepath.Join(t.TempDir(), "filesystems")
	for text, want := range map[string]string{
		"nodev\ttmpfs\nnodev\toverlay\n": "<nil>",
		"nodev\ttmpfs\n":                 "the kernel has no overlay file system; load it with `modprobe overlay`",
	} {
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := checkOverlay(file); fmt.Sprint(err) != want {
			t.Errorf("error %v, want %s", err, want)
		}
	}
}

// What is asked of the control socket and cannot be given.
func TestControlRefuses(t *testing.T) {
	c := &control{}
	for want, handle := range map[string]http.HandlerFunc{
		"the image store is not open yet; `tutti up` waits for it\n":                         c.image,
		"this machine serves no registry; stop it, and start it with --registry-port 5000\n": c.collectRegistry,
		"pods must be true or false; it is false when left out\n":                            c.stopNow,
	} {
		w := httptest.NewRecorder()
		handle(w, httptest.NewRequest(http.MethodPost, "/?pods=maybe", nil))
		if w.Body.String() != want {
			t.Errorf("got %q, want %q", w.Body, want)
		}
	}
	c.collect.Store(&registry.Registry{})
	for query, want := range map[string]string{
		"untagged=maybe": "untagged must be true or false; it is false when left out\n",
		"mirrors=maybe":  "mirrors must be true or false; it is false when left out\n",
	} {
		w := httptest.NewRecorder()
		c.collectRegistry(w, httptest.NewRequest(http.MethodPost, "/?"+query, nil))
		if got := w.Body.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func TestMessage(t *testing.T) {
	if got := message(fmt.Errorf("start: %w", context.Canceled)); got != "interrupted while starting; `tutti up` starts anew" {
		t.Errorf("got %q", got)
	}
	s := &server{dir: "/d"}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errNotRoot)
	if err := s.until(ctx, "the node", nil); err.Error() != "the server needs root, to make containers and networks; run it with sudo" {
		t.Errorf("error %v", err)
	}
	if got := s.late("the node").Error(); got != "the node is not ready after 10m0s; the log says why (/d/log/tutti.log)" {
		t.Errorf("got %q", got)
	}
}

// The address that pods know the machine by keeps its ports without being told.
func TestOwnPorts(t *testing.T) {
	var got []string
	for _, p := range ownPorts(settings(func(*api.Settings) {})) {
		got = append(got, fmt.Sprintf("%s %s:%d", p.Protocol, p.HostIP, p.HostPort))
	}
	if want := "tcp 127.0.0.1:6443, tcp 127.0.0.1:5000, tcp 0.0.0.0:10250"; strings.Join(got, ", ") != want {
		t.Errorf("got %v", got)
	}
}

func TestCheckCgroups(t *testing.T) {
	for _, c := range []struct {
		name    string
		dirs    []string
		unified string
		fails   string
	}{
		{"unified", nil, "cpuset cpu io memory pids", ""},
		{"unified without memory", nil, "cpuset cpu io pids", " has no memory controller; mount cgroups there (any systemd does), or start with cgroup_enable=memory"},
		{"unified without cpu", nil, "cpuset memory", "no cpu controller"},
		{"each by itself", []string{"memory", "cpu"}, "", ""},
		{"without memory", []string{"cpu"}, "", "no memory controller"},
		{"nothing", nil, "", "no memory controller"},
	} {
		t.Run(c.name, func(t *testing.T) {
			root := t.TempDir()
			for _, d := range c.dirs {
				if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if c.unified != "" {
				if err := os.WriteFile(filepath.Join(root, "cgroup.controllers"), []byte(c.unified+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			err := checkCgroups(root)
			if (err == nil) != (c.fails == "") || err != nil && !strings.Contains(err.Error(), c.fails) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestListenAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"":          "[127.0.0.1:6443 10.41.0.1:6443]",
		"127.0.0.1": "[127.0.0.1:6443 10.41.0.1:6443]",
		"10.0.0.1":  "[127.0.0.1:6443 10.41.0.1:6443 10.0.0.1:6443]",
		"0.0.0.0":   "[0.0.0.0:6443]",
	} {
		got := listenAddresses(settings(func(s *api.Settings) { s.Address = address }))
		var text []string
		for _, a := range got {
			text = append(text, a.String())
		}
		if s := "[" + strings.Join(text, " ") + "]"; s != want {
			t.Errorf("%q: got %s, want %s", address, s, want)
		}
	}
}

func TestNames(t *testing.T) {
	if got := cgroupRoot(api.DefaultDataDir); got != "tutti" {
		t.Errorf("got %s", got)
	}
	if a, b := cgroupRoot("/a"), cgroupRoot("/b"); a == b || a != cgroupRoot("/a/") || !strings.HasPrefix(a, "tutti-") {
		t.Errorf("got %s and %s", a, b)
	}
	if got := serviceDNS(netip.MustParsePrefix("10.43.0.0/16")).String(); got != "10.43.0.10" {
		t.Errorf("got %s", got)
	}
}

func TestStepsReachEveryListener(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	s := newSteps(w)
	boom := errors.New("boom")
	_ = s.do("before", func() error { return nil })
	heard := make(chan []api.Step, 1)
	go func() {
		var all []api.Step
		_ = s.follow(nil, func(step api.Step) error { all = append(all, step); return nil })
		heard <- all
	}()
	if err := s.do("after", func() error { return boom }); err != boom {
		t.Errorf("error %v", err)
	}
	s.end()
	s.end()
	type brief struct {
		name, message string
		state         api.StepState
	}
	want := []brief{{"before", "", api.StepStarted}, {"before", "", api.StepDone}, {"after", "", api.StepStarted}, {"after", "boom", api.StepFailed}}
	check := func(who string, all []api.Step) {
		var got []brief
		for _, st := range all {
			got = append(got, brief{st.Name, st.Message, st.State})
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %v", who, got)
		}
	}
	select {
	case all := <-heard:
		check("the follower", all)
	case <-time.After(10 * time.Second):
		t.Fatal("the follower was not told of the end")
	}
	var piped []api.Step
	for d := json.NewDecoder(r); ; {
		var st api.Step
		if d.Decode(&st) != nil {
			break
		}
		piped = append(piped, st)
	}
	check("the pipe", piped)
}
