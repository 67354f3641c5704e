package translate

import (
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/runtime"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestGolden translates each pod of testdata and compares with what stands
// beside it.
func TestGolden(t *testing.T) {
	pods, err := filepath.Glob("testdata/*.pod.yaml")
	if err != nil || len(pods) == 0 {
		t.Fatalf("no pods: %v", err)
	}
	m := Machine{MemoryBytes: 16 << 30, DataDir: "/data"}
	for _, file := range pods {
		t.Run(filepath.Base(file), func(t *testing.T) {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			var p v1.Pod
			if err := yaml.UnmarshalStrict(b, &p); err != nil {
				t.Fatal(err)
			}
			var out struct {
				Pod       runtime.Pod
				Network   network.Pod
				Workloads []runtime.Workload
				Errors    []string
			}
			out.Pod = Pod(&p, "host", "/ns")
			if out.Network, err = Network(&p); err != nil {
				out.Errors = append(out.Errors, err.Error())
			}
			for i := range p.Spec.Containers {
				c := &p.Spec.Containers[i]
				w, err := Workload(Input{
					Pod: &p, Container: c, Image: image.Image{Config: image.Config{User: "app:staff", WorkingDir: "/home", StopSignal: "SIGQUIT"}},
					ImageID: "repo@sha256:1", Layers: []string{"/l"}, Args: []string{"/bin/app"}, Env: []string{"A=1"},
					Process: p.Spec.RuntimeClassName != nil, OnMachine: c.Image == "host",
				}, m)
				if err != nil {
					out.Errors = append(out.Errors, err.Error())
					continue
				}
				out.Workloads = append(out.Workloads, w)
			}
			got, err := json.MarshalIndent(out, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(file, ".pod.yaml") + ".golden.json"
			if *update {
				if err := os.WriteFile(golden, append(got, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if strings.TrimSpace(string(want)) != string(got) {
				t.Errorf("%s differs; got:\n%s", golden, got)
			}
		})
	}
}

func TestCapabilities(t *testing.T) {
	tests := []struct {
		name      string
		add, drop string
		has, not  string
		count     int // 0: any
	}{
		{"default", "", "", "CAP_CHOWN", "CAP_SYS_ADMIN", 14},
		{"drop all", "", "ALL", "", "CAP_CHOWN", -1},
		{"drop all, add one", "NET_BIND_SERVICE", "ALL", "CAP_NET_BIND_SERVICE", "CAP_CHOWN", 1},
		{"add", "SYS_TIME", "", "CAP_SYS_TIME", "CAP_SYS_ADMIN", 15},
		{"prefix and case", "cap_sys_time", "", "CAP_SYS_TIME", "CAP_SYS_ADMIN", 15},
		{"add all", "ALL", "", "CAP_SYS_ADMIN", "", 0},
		{"add all, drop one", "ALL", "MKNOD", "CAP_SYS_ADMIN", "CAP_MKNOD", 0},
		{"drop one", "", "MKNOD", "CAP_CHOWN", "CAP_MKNOD", 13},
	}
	list := func(s string) (l []v1.Capability) {
		for _, f := range strings.Fields(s) {
			l = append(l, v1.Capability(f))
		}
		return l
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := capabilities(&v1.Capabilities{Add: list(tt.add), Drop: list(tt.drop)})
			all := " " + strings.Join(got, " ") + " "
			if tt.has != "" && !strings.Contains(all, " "+tt.has+" ") || tt.not != "" && strings.Contains(all, " "+tt.not+" ") {
				t.Errorf("got %v", got)
			}
			if tt.count > 0 && len(got) != tt.count || tt.count < 0 && len(got) != 0 {
				t.Errorf("got %d: %v", len(got), got)
			}
		})
	}
}

func TestUser(t *testing.T) {
	number := func(n int64) *int64 { return &n }
	yes := true
	tests := []struct {
		name        string
		image       string
		user, group *int64
		nonRoot     bool
		want, err   string
	}{
		{"image", "app", nil, nil, false, "app", ""},
		{"image with group", "app:staff", nil, nil, false, "app:staff", ""},
		{"pod", "app:staff", number(7), nil, false, "7", ""},
		{"pod and group", "app:staff", number(7), number(8), false, "7:8", ""},
		{"image and group", "app:staff", nil, number(8), false, "app:8", ""},
		{"nobody and group", "", nil, number(8), false, "0:8", ""},
		{"root refused", "", nil, nil, true, "", "image will run as root"},
		{"root by number refused", "0:5", nil, nil, true, "", "image will run as root"},
		{"root asked for", "", number(0), nil, true, "", "runAsUser breaks non-root policy"},
		{"name cannot be known", "app", nil, nil, true, "", "non-numeric user (app)"},
		{"number will do", "5", nil, nil, true, "5", ""},
		{"own number will do", "app", number(5), nil, true, "5", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			sc := &v1.SecurityContext{RunAsUser: tt.user, RunAsGroup: tt.group}
			if tt.nonRoot {
				sc.RunAsNonRoot = &yes
			}
			got, err := userOf(&v1.Pod{}, &v1.Container{Name: "c"}, sc, tt.image)
			if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestStopSignal(t *testing.T) {
	usr1 := v1.SIGUSR1
	for _, tt := range []struct {
		image string
		pod   *v1.Signal
		want  syscall.Signal
	}{{"", nil, syscall.SIGTERM}, {"SIGQUIT", nil, syscall.SIGQUIT}, {"3", nil, syscall.SIGQUIT}, {"SIGQUIT", &usr1, syscall.SIGUSR1}} {
		got, err := StopSignal(&v1.Container{Lifecycle: &v1.Lifecycle{StopSignal: tt.pod}}, image.Config{StopSignal: tt.image})
		if err != nil || got != tt.want {
			t.Errorf("%v: got %v, %v", tt, got, err)
		}
	}
	if _, err := StopSignal(&v1.Container{}, image.Config{StopSignal: "SIGNONE"}); err == nil {
		t.Error("an unknown signal is taken")
	}
}
