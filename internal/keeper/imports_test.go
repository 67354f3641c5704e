package keeper

import (
	"os"
	"os/exec"
	"strings"
	"testing"
)

// The keeper and libcontainer's init, which is the same program, start in
// milliseconds and stay small because of what they do not import.
func TestImports(t *testing.T) {
	for _, c := range []struct {
		pkg, cgo string
		never    []string
	}{
		{"tutti.dev/tutti/cmd/tutti-keeper", "1", []string{"k8s.io/", "sigs.k8s.io/", "github.com/containerd/containerd/", "go.etcd.io/", "net/http"}},
		// The agent's side stays free of libcontainer and its constructor.
		{"tutti.dev/tutti/internal/runtime/container", "0", []string{"k8s.io/", "github.com/opencontainers/runc/"}},
		{"tutti.dev/tutti/internal/keeper", "0", []string{"k8s.io/", "github.com/opencontainers/", "github.com/containerd/containerd/"}},
	} {
		cmd := exec.Command("go", "list", "-deps", "-tags", "seccomp netgo osusergo", c.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+c.cgo)
		out, err := cmd.Output()
		if err != nil {
			t.Fatal(err)
		}
		for dep := range strings.FieldsSeq(string(out)) {
			for _, never := range c.never {
				if strings.HasPrefix(dep, never) {
					t.Errorf("%s imports %s", c.pkg, dep)
				}
			}
		}
	}
}
