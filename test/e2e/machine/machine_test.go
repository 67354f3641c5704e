package machine

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func start(t *testing.T) *Machine {
	t.Helper()
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func TestTwoMachinesAreApart(t *testing.T) {
	a, b := start(t), start(t)
	for _, m := range []*Machine{a, b} {
		l, err := m.Listen("tcp", IP+":80")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, m.Dir) }))
	}
	for _, m := range []*Machine{a, b} {
		for name, c := range map[string]*http.Client{"itself": m.Client(), "outside": m.OutsideClient()} {
			resp, err := c.Get("http://" + IP)
			if err != nil {
				t.Fatalf("from %s: %v", name, err)
			}
			body, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if string(body) != m.Dir {
				t.Errorf("from %s: reached %s, not %s", name, body, m.Dir)
			}
		}
	}
}

func TestStateShowsWhatIsLeft(t *testing.T) {
	m := start(t)
	before, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	if again, err := m.State(); err != nil || len(Left(before, again)) > 0 {
		t.Fatalf("an idle machine changed: %v %q", err, Left(before, again))
	}
	r := m.Run(10*time.Second, "sh", "-c", `sleep 1000 >/dev/null 2>&1 & ip link add left type veth peer name over &&
		nft add table ip left && mkdir -p "$TUTTI_DATA_DIR/m" && mount -t tmpfs tmpfs "$TUTTI_DATA_DIR/m" && echo 1 >/proc/sys/net/ipv4/conf/lo/forwarding`)
	if r.Err != nil {
		t.Fatal(r)
	}
	after, err := m.State()
	if err != nil {
		t.Fatal(err)
	}
	left := strings.Join(Left(before, after), "\n")
	for _, want := range []string{"+ process sleep 1000", "left", "+ nft table ip left", "+ mount / on " + m.Dir + "/m", "+ data directory",
		"+ setting /proc/sys/net/ipv4/conf/lo/forwarding:1", "- setting /proc/sys/net/ipv4/conf/lo/forwarding:0"} {
		if !strings.Contains(left, want) {
			t.Errorf("no %q in\n%s", want, left)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), m.Dir) {
		t.Error("the machine's mounts reach the host")
	}
}

func TestCloseEndsEverything(t *testing.T) {
	m, err := New()
	if err != nil {
		t.Fatal(err)
	}
	// In its own session and process namespace, as a container would be.
	r := m.Run(10*time.Second, "sh", "-c", "setsid unshare --pid --fork sleep 1000 >/dev/null 2>&1 &")
	if r.Err != nil {
		t.Fatal(r)
	}
	var sleeper Process
	for deadline := time.Now().Add(10 * time.Second); sleeper.PID == 0; {
		if sleeper, err = m.find("sleep", func(p Process) bool { return p.Name() == "sleep" }); err != nil && time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if sleeper.Running() {
		t.Error("a process outlives its machine")
	}
	if _, err := os.Stat(m.temp); !os.IsNotExist(err) {
		t.Errorf("the directory is still there: %v", err)
	}
}

// TestKilledProgramIsSweptUp runs itself again as the program that is killed.
func TestKilledProgramIsSweptUp(t *testing.T) {
	const killed = "MACHINE_TEST_KILLED"
	if os.Getenv(killed) != "" {
		m := start(t)
		if err := os.MkdirAll(m.Dir, 0o755); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(m.Dir))
		group := filepath.Join("/sys/fs/cgroup", fmt.Sprintf("tutti-%x", sum[:4]))
		if _, err := os.Stat("/sys/fs/cgroup/pids"); err == nil { // version 1
			group = filepath.Join("/sys/fs/cgroup/pids", filepath.Base(group))
		}
		if err := os.Mkdir(group, 0o755); err != nil {
			t.Fatal(err)
		}
		fmt.Println(m.temp, group)
		time.Sleep(time.Minute)
		return
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), killed+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var temp, group string
	if _, err := fmt.Fscanln(out, &temp, &group); err != nil {
		t.Fatal(err)
	}
	gone := func(dir string) bool {
		_, err := os.Stat(dir)
		return os.IsNotExist(err)
	}
	start(t)
	if gone(temp) || gone(group) {
		t.Error("a machine in use was swept up")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	cmd.Wait()
	start(t)
	if !gone(temp) || !gone(group) {
		t.Errorf("%s and %s outlive the program", temp, group)
	}
}

func TestTimeout(t *testing.T) {
	m := start(t)
	if r := m.Run(200*time.Millisecond, "sleep", "100"); r.Err == nil || r.Took > 10*time.Second {
		t.Errorf("not stopped in time: %v", r)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if _, err := m.Dial(ctx, "tcp", net.JoinHostPort(IP, "9")); err == nil {
		t.Error("reached a port that nobody has")
	}
}
