package cgroup

import (
	"bufio"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// dir is where a controller keeps a group; on version 2 they share a directory.
func dir(t *testing.T, path, controller string) string {
	t.Helper()
	g, err := group(path, Limits{})
	if err != nil {
		t.Fatal(err)
	}
	if Unified() {
		return g.Path("")
	}
	return g.Path(controller)
}

func TestMakeLimitsRemove(t *testing.T) {
	root := "tutti-test-" + strings.ToLower(rand.Text()[:8])
	path := root + "/burstable/pod"
	t.Cleanup(func() {
		if err := Remove(root); err != nil {
			t.Error(err)
		}
	})
	shown := func(controller, one, two string) string {
		t.Helper()
		name := one
		if Unified() {
			name = two
		}
		data, err := os.ReadFile(filepath.Join(dir(t, path, controller), name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	for _, memory := range []int64{64 << 20, 32 << 20} { // the second time it is changed
		if err := Make(path, Limits{CPUShares: 1024, CPUQuota: 20000, CPUPeriod: 100000, Memory: memory, Pids: 50}); err != nil {
			t.Fatal(err)
		}
		if got := shown("memory", "memory.limit_in_bytes", "memory.max"); got != strconv.FormatInt(memory, 10) {
			t.Errorf("memory %s, want %d", got, memory)
		}
	}
	if m, err := ReadMemory(path); err != nil || m.Limit != 32<<20 {
		t.Errorf("memory is read as %+v, %v", m, err)
	}
	if m, err := ReadMemory(root); err != nil || m.Limit != 0 {
		t.Errorf("memory of a group without a limit is read as %+v, %v", m, err)
	}
	if got := shown("cpu", "cpu.cfs_quota_us", "cpu.max"); !strings.HasPrefix(got, "20000") {
		t.Errorf("CPU quota %s", got)
	}
	if got := shown("pids", "pids.max", "pids.max"); got != "50" {
		t.Errorf("pids %s", got)
	}
	if Unified() {
		if data, err := os.ReadFile(filepath.Join(dir(t, path, ""), "memory.swap.max")); err == nil && string(data) != "0\n" {
			t.Errorf("swap %q", data)
		}
	}

	// A process in a group below is killed with it.
	inner := path + "/container"
	if err := Make(inner, Limits{}); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for _, controller := range []string{"memory", "cpu", "pids"} {
		procs := filepath.Join(dir(t, inner, controller), "cgroup.procs")
		if err := os.WriteFile(procs, []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
			_ = cmd.Process.Kill()
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := Remove(path); err != nil {
			t.Error(err)
		}
	}
	if err := <-ended; err == nil || !strings.Contains(err.Error(), "killed") {
		t.Errorf("process: %v", err)
	}
	if Exists(path) || !Exists(root) {
		t.Error("it removed too little or too much")
	}
}

// Nothing is killed to make a limit smaller than what is in use.
func TestLessMemoryThanIsUsed(t *testing.T) {
	root := "tutti-test-" + strings.ToLower(rand.Text()[:8])
	t.Cleanup(func() {
		if err := Remove(root); err != nil {
			t.Error(err)
		}
	})
	if err := Make(root+"/user", Limits{}); err != nil {
		t.Fatal(err)
	}
	// The shell keeps in memory what it has read.
	cmd := exec.Command("sh", "-c", `echo $$ >"$1"; all=$(head -c 16000000 /dev/zero | tr '\0' x); echo full; read end`,
		"sh", filepath.Join(dir(t, root+"/user", "memory"), "cgroup.procs"))
	end, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if said, err := bufio.NewReader(out).ReadString('\n'); err != nil || said != "full\n" {
		t.Errorf("the shell said %q, %v", said, err)
	}
	if err := Make(root, Limits{Memory: 4 << 20}); err == nil {
		t.Error("a group was limited to less memory than it uses")
	}
	if m, err := ReadMemory(root); err != nil || m.WorkSet < 16_000_000 || m.Usage < m.WorkSet {
		t.Errorf("memory is read as %+v, %v", m, err)
	}
	end.Close()
	if err := cmd.Wait(); err == nil || err.Error() != "exit status 1" { // of read, at the end of its input
		t.Errorf("the shell ended with %v", err)
	}
	if err := Make(root, Limits{Memory: 4 << 20}); err != nil {
		t.Error(err)
	}
}

func TestTheRootIsNoGroup(t *testing.T) {
	for _, path := range []string{"", "/", "a/.."} {
		if Make(path, Limits{}) == nil || Remove(path) == nil || Exists(path) {
			t.Errorf("%q was taken for a group", path)
		}
	}
}
