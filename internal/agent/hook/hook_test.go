package hook

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tutti.dev/tutti/internal/runtime"
)

func TestRun(t *testing.T) {
	var asked []string
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Path+" "+r.Header.Get("X-Why"))
		w.WriteHeader(http.StatusTeapot)
	}))
	defer web.Close()
	u, err := url.Parse(web.URL)
	if err != nil {
		t.Fatal(err)
	}
	host, portText, _ := net.SplitHostPort(u.Host)
	port, _ := strconv.Atoi(portText)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closedPort := closed.Addr().(*net.TCPAddr).Port
	closed.Close()

	exec := func(_ context.Context, id runtime.ID, argv []string) (int, []byte, error) {
		switch argv[0] {
		case "ok":
			return 0, nil, nil
		case "fail":
			return 3, []byte("no disk"), nil
		}
		return 0, nil, errors.New("not running")
	}
	command := func(s string) *v1.LifecycleHandler {
		return &v1.LifecycleHandler{Exec: &v1.ExecAction{Command: []string{s}}}
	}
	c := &v1.Container{Name: "c", Ports: []v1.ContainerPort{{Name: "web", ContainerPort: int32(port)}}}
	for name, test := range map[string]struct {
		handler *v1.LifecycleHandler
		err     string
	}{
		"exec":            {command("ok"), ""},
		"exec fails":      {command("fail"), `exited with 3, message: "no disk"`},
		"exec impossible": {command("x"), "not running"},
		"http": {&v1.LifecycleHandler{HTTPGet: &v1.HTTPGetAction{Path: "/a", Port: intstr.FromString("web"),
			HTTPHeaders: []v1.HTTPHeader{{Name: "X-Why", Value: "start"}}}}, ""},
		"https falls back to http": {&v1.LifecycleHandler{HTTPGet: &v1.HTTPGetAction{Path: "/b", Port: intstr.FromInt(port), Scheme: v1.URISchemeHTTPS}}, ""},
		"http refused":             {&v1.LifecycleHandler{HTTPGet: &v1.HTTPGetAction{Port: intstr.FromInt(closedPort)}}, "connection refused"},
		"tcp":                      {&v1.LifecycleHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(port)}}, ""},
		"tcp refused":              {&v1.LifecycleHandler{TCPSocket: &v1.TCPSocketAction{Port: intstr.FromInt(closedPort)}}, "connection refused"},
		"sleep of nothing":         {&v1.LifecycleHandler{Sleep: &v1.SleepAction{}}, ""},
		"empty":                    {&v1.LifecycleHandler{}, "no handler"},
	} {
		t.Run(name, func(t *testing.T) {
			err := Run(t.Context(), test.handler, c, runtime.ID{}, host, exec)
			if (err == nil) != (test.err == "") || err != nil && !strings.Contains(err.Error(), test.err) {
				t.Fatalf("error %v, want %q", err, test.err)
			}
		})
	}
	if got := strings.Join(asked, ","); !strings.Contains(got, "/a start") || !strings.Contains(got, "/b ") {
		t.Errorf("the server was asked %q", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Run(ctx, &v1.LifecycleHandler{Sleep: &v1.SleepAction{Seconds: 3600}}, c, runtime.ID{}, host, exec); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled sleep: %v", err)
	}
}
