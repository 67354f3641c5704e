package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
	"tutti.dev/tutti/test/golden"
)

// run runs a command in a data directory of its own.
func run(t *testing.T, m Machine, args ...string) (code int, out, errs string) {
	t.Helper()
	t.Setenv("KUBECONFIG", "")
	if os.Getenv(api.EnvDataDir) == "" {
		t.Setenv(api.EnvDataDir, filepath.Join(t.TempDir(), "data"))
	}
	var o, e bytes.Buffer
	code = Main(t.Context(), m, args, strings.NewReader(""), &o, &e)
	return code, o.String(), e.String()
}

func TestExitCodes(t *testing.T) {
	for _, c := range []struct {
		name string
		args []string
		code int
		says string // on standard error, in one line
	}{
		{"unknown command", []string{"upp"}, 2, "tutti: tutti has no command \"upp\"; did you mean `tutti up`?"},
		{"command unlike any", []string{"frobnicate"}, 2, "tutti has no command \"frobnicate\"; `tutti --help` lists them"},
		{"unknown flag", []string{"up", "--no-such-flag"}, 2, "unknown flag: --no-such-flag; see `tutti up --help`"},
		{"unknown short flag", []string{"up", "-x"}, 2, "-x"},
		{"flag before the command", []string{"--no-such-flag", "up"}, 2, "--no-such-flag"},
		{"flag without its value", []string{"up", "--data-dir"}, 2, "--data-dir"},
		{"flag with a wrong value", []string{"up", "--timeout", "soon"}, 2, "--timeout"},
		{"argument missing", []string{"down"}, 2, "tutti down needs an application's name or the path it came from; see `tutti down --help`"},
		{"argument too many", []string{"down", "a", "b"}, 2, "tutti down takes an application's name or the path it came from, but also got \"b\"; see `tutti down --help`"},
		{"argument where none goes", []string{"version", "now"}, 2, "tutti version takes no arguments, but got \"now\"; see `tutti version --help`"},
		{"unknown output", []string{"status", "-o", "xml"}, 2, `unknown output format "xml"; the choice is json, or nothing for text`},
		{"unknown image command", []string{"image", "lod"}, 2, "did you mean `tutti image load`?"},
		{"agent of nothing", []string{"agent"}, 2, "tutti agent needs the credentials of a node; make them on the server with `tutti node credentials` and name the file with --kubeconfig"},
		{"a node without an address", []string{"node", "credentials", "n2"}, 2, "tutti node credentials needs the address of the node; give it with --address"},
		{"a node without a name", []string{"node", "credentials"}, 2, "tutti node credentials needs the node's name; see `tutti node credentials --help`"},
		{"image command without its arguments", []string{"image", "import", "x.tar"}, 2, "the image's name"},
		{"name for several paths", []string{"up", "a", "b", "--name", "c"}, 2, "--name is for one PATH, but there are 2; deploy them one by one"},
		{"no such path", []string{"up", "/no/such/app"}, 1, "/no/such/app does not exist; check the path"},
		{"status of nothing", []string{"status"}, 1, "this machine is not running; start it with `tutti up`"},
		{"images of nothing", []string{"image", "ls"}, 1, "start it with `tutti up`"},
		{"down without a machine", []string{"down", "shop"}, 1, "start it with `tutti up`"},
		{"kubeconfig of nothing", []string{"kubeconfig"}, 1, "start it with `tutti up`"},
		{"kubectl of nothing", []string{"kubectl", "get", "pods"}, 1, "this machine has no cluster yet ("},
		{"down of what has no name", []string{"down", "Foo Bar"}, 2, "\"Foo Bar\" is neither a path nor the name of an application; `tutti status` lists those that run"},
		{"kubectl's directory missing", []string{"kubectl", "get", "--data-dir"}, 2, "--data-dir needs a directory; give one after it"},
		{"import of nothing known", []string{"import", "unt"}, 2, "did you mean `tutti import unit`?"},
		{"import of no unit", []string{"import", "unit"}, 2, "tutti import unit needs a unit's file or name; see `tutti import unit --help`"},
		{"import of a unit that is not there", []string{"import", "unit", "/no/such.service"}, 1, "/no/such.service does not exist; check the path"},
		{"port of which unit", []string{"import", "unit", "a", "/x/b.service", "--port", "80"}, 2, "--port 80 is of one of 2 units; say of which, as in --port a=80"},
		{"port of another unit", []string{"import", "unit", "a", "--port", "b=80"}, 2, "--port b=80 is of a unit that is not imported; name one of those that are"},
		{"port that is none", []string{"import", "unit", "/x/a.service", "--port", "a=http"}, 2, `--port: "http" is no port; write 80, or 53/udp`},
		{"process without a number", []string{"import", "process", "nginx"}, 2, "\"nginx\" is no number of a process; `pgrep NAME` finds it"},
		{"process that is not there", []string{"import", "process", "4194304"}, 1, "there is no process 4194304; `ps ax` lists those that run"},
		{"help", []string{"--help"}, 0, ""},
		{"help of a command", []string{"help", "up"}, 0, ""},
		{"nothing", nil, 0, ""},
		{"version", []string{"version"}, 0, ""},
		{"completion", []string{"completion", "bash"}, 0, ""},
		{"completion of nothing known", []string{"completion", "dosh"}, 2, "dosh"},
	} {
		t.Run(c.name, func(t *testing.T) {
			code, _, errs := run(t, Machine{}, c.args...)
			if code != c.code {
				t.Errorf("exit code %d, want %d; it said %q", code, c.code, errs)
			}
			if c.says == "" {
				if errs != "" {
					t.Errorf("said %q", errs)
				}
				return
			}
			if !strings.HasPrefix(errs, "tutti: ") || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, c.says) {
				t.Errorf("said %q, want one line with %q", errs, c.says)
			}
		})
	}
}

func TestReadable(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admin.kubeconfig")
	if err := readable(file); err == nil || err.Error() != "this machine has no cluster yet ("+file+" is not there); start it with `tutti up`" {
		t.Errorf("error %v", err)
	}
}

func TestStatusOfNothingAsJSON(t *testing.T) {
	code, out, errs := run(t, Machine{}, "status", "-o", "json")
	if code != 1 || !strings.Contains(out, `"ready": false`) || !strings.Contains(out, `"apps": []`) || strings.Count(errs, "\n") != 1 {
		t.Errorf("exit code %d, output %s, error %s", code, out, errs)
	}
}

func TestHelp(t *testing.T) {
	for _, c := range []string{"", "up", "down", "status", "stop", "install", "uninstall", "server", "kubectl", "kubeconfig", "image", "image import", "image push", "image gc", "import", "import unit", "import process", "version"} {
		name := strings.ReplaceAll("tutti "+c, " ", "-")
		t.Run(name, func(t *testing.T) {
			_, got, _ := run(t, Machine{}, append([]string{"help"}, strings.Fields(c)...)...)
			golden.Check(t, filepath.Join("testdata", strings.TrimSuffix(name, "-")+".txt"), got)
		})
	}
}

func TestServeGetsItsSettings(t *testing.T) {
	var dir api.DataDir
	var settings api.Settings
	m := Machine{Serve: func(_ context.Context, d api.DataDir, s api.Settings, _ io.WriteCloser) error {
		dir, settings = d, s
		return errors.New("no:\n  such luck")
	}}
	want := api.Settings{Address: "10.0.0.1", Port: 7000, RegistryPort: -1, NodeName: "n", ClusterCIDR: "10.1.0.0/16", ServiceCIDR: "10.2.0.0/16"}
	code, _, errs := run(t, m, append([]string{"server", "--data-dir", "/d/../e"}, arguments(want)...)...)
	if code != 1 || errs != "tutti: no: such luck\n" {
		t.Errorf("exit code %d, said %q", code, errs)
	}
	if dir != "/e" || settings != want {
		t.Errorf("got %s %+v", dir, settings)
	}
}

func TestStop(t *testing.T) {
	for _, c := range []struct {
		name    string
		files   []string
		args    []string
		code    int
		cleaned bool
	}{
		{"nothing there", nil, nil, 0, false},
		{"someone else's", []string{"etc/passwd"}, []string{"--purge"}, 1, false},
		{"ours", []string{"config.json", "etcd/x"}, nil, 0, true},
		{"ours, purged", []string{"config.json", "etcd/x"}, []string{"--purge"}, 0, true},
		{"a start that failed", []string{"lock", "log/tutti.log"}, []string{"--purge"}, 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			for _, f := range c.files {
				f = filepath.Join(dir, f)
				if err := errors.Join(os.MkdirAll(filepath.Dir(f), 0o755), os.WriteFile(f, nil, 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv(api.EnvDataDir, dir)
			cleaned := false
			m := Machine{Cleanup: func(_ context.Context, d api.DataDir, purge bool) error {
				cleaned = true
				if string(d) != dir || purge != (len(c.args) > 0) {
					t.Errorf("cleanup of %s, purge %v", d, purge)
				}
				return nil
			}}
			code, _, errs := run(t, m, append([]string{"stop"}, c.args...)...)
			if code != c.code || cleaned != c.cleaned {
				t.Errorf("exit code %d, cleaned %v; it said %q", code, cleaned, errs)
			}
		})
	}
}

func TestTakeDataDir(t *testing.T) {
	for _, c := range []struct {
		args, rest string
		dir        string
	}{
		{"get pods", "get pods", "/old"},
		{"--data-dir /new get pods", "get pods", "/new"},
		{"get pods --data-dir=/new -o yaml", "get pods -o yaml", "/new"},
		{"exec x -- ls --data-dir /a", "exec x -- ls --data-dir /a", "/old"},
	} {
		rest, dir, err := takeDataDir(strings.Fields(c.args), "/old")
		if err != nil || strings.Join(rest, " ") != c.rest || dir != c.dir {
			t.Errorf("%s: got %v %s %v", c.args, rest, dir, err)
		}
	}
}

// serve answers on a control socket as a server does.
func serve(t *testing.T, answer http.HandlerFunc) {
	t.Helper()
	dir := api.DataDir(t.TempDir())
	t.Setenv(api.EnvDataDir, string(dir))
	l, err := net.Listen("unix", dir.Socket())
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: answer}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

func TestServerNotReady(t *testing.T) {
	serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"ready": false}`) })
	if code, _, errs := run(t, Machine{}, "status"); code != 1 || errs != "tutti: this machine is starting; `tutti up` waits for it\n" {
		t.Errorf("exit code %d, said %q", code, errs)
	}
}

func TestImageFileMissing(t *testing.T) {
	serve(t, func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"ready": true}`) })
	if code, _, errs := run(t, Machine{}, "image", "load", "/no/such.tar"); code != 1 || errs != "tutti: /no/such.tar does not exist; check the path\n" {
		t.Errorf("exit code %d, said %q", code, errs)
	}
}

func TestServerDoesNotEnd(t *testing.T) {
	dir := api.DataDir(t.TempDir())
	t.Setenv(api.EnvDataDir, string(dir))
	if err := errors.Join(os.WriteFile(dir.Config(), nil, 0o600), os.WriteFile(dir.Lock(), []byte("42\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	release, err := hold(t.Context(), dir.Lock())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	code, _, errs := run(t, Machine{}, "stop", "--timeout", "50ms")
	if want := "tutti: the server (pid 42) does not end; wait with --timeout, or `kill -9 42` and run this again\n"; code != 1 || errs != want {
		t.Errorf("exit code %d, said %q", code, errs)
	}
}

func TestServerEndsEarly(t *testing.T) {
	c := &command{dataDir: "/d"}
	err := follow(strings.NewReader(""), progress.New(io.Discard), api.StepReady, nil)
	if err == nil || err.Error() != "the server ended; its log says why" {
		t.Errorf("error %v", err)
	}
	if err := c.why(err); err.Error() != "the server ended before it was ready; /d/log/tutti.log says why" {
		t.Errorf("error %v", err)
	}
}
