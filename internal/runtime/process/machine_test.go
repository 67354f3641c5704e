package process

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/runtime"
	"tutti.dev/tutti/internal/runtime/container"
	"tutti.dev/tutti/internal/runtime/runtimetest"
)

// The tests run on a machine of their own, since programs see its file system
// and its processes: in namespaces whose root has little more than a busybox.
// This program is run again twice, as the machine's first process and as what
// that starts.
const (
	stage     = "TUTTI_TEST_MACHINE"
	firstOne  = "first process"
	testsRun  = "tests"
	onMachine = "/keeper"
)

func TestMain(m *testing.M) {
	var code int
	var err error
	switch os.Getenv(stage) {
	case firstOne:
		code, err = beFirst()
	case testsRun:
		runtimetest.Binary, runtimetest.Layer = onMachine, "/layer"
		code = m.Run()
	default:
		code, err = startMachine()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func startMachine() (int, error) {
	dir, err := os.MkdirTemp("", "tutti-process-test-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	if err := runtimetest.Prepare(dir); err != nil {
		return 0, err
	}
	root := filepath.Join(dir, "machine")
	for _, d := range []string{"proc", "sys", "dev", "run/somewhere", "var/tmp", "tmp", "srv/data", "old", "layer"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return 0, err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	for _, c := range [][]string{
		{"-a", runtimetest.Layer + "/.", root}, {"-a", runtimetest.Layer + "/.", filepath.Join(root, "layer")},
		{runtimetest.Binary, root + onMachine}, {self, root + "/tests"},
	} {
		if out, err := exec.Command("cp", c...).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("cp %q: %s %w", c, out, err)
		}
	}
	// What go test wants to be told by way of files, it is not.
	args := slices.DeleteFunc(slices.Clone(os.Args[1:]), func(a string) bool { return strings.HasPrefix(a, "-test.testlogfile=") })
	first := exec.Command(self, args...)
	first.Env, first.Dir = append(os.Environ(), stage+"="+firstOne), root
	first.Stdout, first.Stderr = os.Stdout, os.Stderr
	first.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	_ = first.Run()
	return first.ProcessState.ExitCode(), nil
}

// beFirst makes the working directory the machine's root, runs the tests and
// reaps what is left to it meanwhile.
func beFirst() (int, error) {
	mount := func(source, target, kind string, flags uintptr) error {
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			return fmt.Errorf("mount %s on %s: %w", source, target, err)
		}
		return nil
	}
	root, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
	}{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE},
		{root, root, "", unix.MS_BIND},
		{"/sys", root + "/sys", "", unix.MS_BIND | unix.MS_REC},
		{"/dev", root + "/dev", "", unix.MS_BIND | unix.MS_REC},
		{"proc", root + "/proc", "proc", 0},
	} {
		if err := mount(m.source, m.target, m.kind, m.flags); err != nil {
			return 0, err
		}
	}
	if err := os.Chdir(root); err != nil {
		return 0, err
	}
	if err := unix.PivotRoot(".", "old"); err != nil {
		return 0, fmt.Errorf("pivot_root: %w", err)
	}
	// Mounts are shared among the machine's namespaces, as on any real one.
	for _, err := range []error{os.Chdir("/"), unix.Unmount("/old", unix.MNT_DETACH), mount("", "/", "", unix.MS_REC|unix.MS_SHARED), os.Remove("/old")} {
		if err != nil {
			return 0, err
		}
	}
	tests := exec.Command("/tests", os.Args[1:]...)
	tests.Env = append(os.Environ(), stage+"="+testsRun)
	tests.Stdout, tests.Stderr = os.Stdout, os.Stderr
	if err := tests.Start(); err != nil {
		return 0, err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err != nil && err != unix.EINTR {
			return 0, err
		}
		if pid == tests.Process.Pid {
			return status.ExitStatus(), nil
		}
	}
}

var images = runtimetest.Kind{
	New: func(m *runtimetest.Machine) (runtime.Runtime, error) {
		return New(container.Config{Dir: m.Dir, CgroupRoot: m.CgroupRoot, Keeper: m.Keeper, Log: slog.New(slog.DiscardHandler)})
	},
	Purge:       func(ctx context.Context, dir, root string) error { return container.Purge(ctx, dir, root) },
	Differences: runtimetest.Declared[Class],
}

// machines is of programs of the machine.
func machines(root runtime.MachineRoot) runtimetest.Kind {
	k := images
	k.Workload = func(w *runtime.Workload) { w.Layers, w.Machine = nil, root }
	return k
}

func TestContract(t *testing.T) { runtimetest.Run(t, images) }

func TestContractOnMachine(t *testing.T) { runtimetest.Run(t, machines(runtime.ReadOnlyRoot)) }

func TestRecovery(t *testing.T) { runtimetest.RunRecovery(t, machines(runtime.SharedRoot)) }
