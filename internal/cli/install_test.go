package cli

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/systemd"
)

// host is a machine that systemd runs, as far as the commands see it.
type host struct {
	Machine
	did []string // what changed it, in order
}

func newHost(t *testing.T) *host {
	t.Helper()
	h := &host{}
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "run/systemd/system"), 0o755); err != nil {
		t.Fatal(err)
	}
	h.Services = &systemd.Manager{Root: root, Control: func(_ context.Context, args ...string) (string, error) {
		if args[0] != "show" {
			h.did = append(h.did, args[0])
		}
		return "", nil
	}}
	h.Cleanup = func(_ context.Context, dir api.DataDir, purge bool) error {
		h.did = append(h.did, map[bool]string{true: "purge", false: "cleanup"}[purge])
		if purge {
			return os.RemoveAll(string(dir))
		}
		return nil
	}
	h.Configure = func(dir api.DataDir, s api.Settings) (bool, error) {
		if s.Port == 70000 {
			return false, errors.New("--port 70000 is not a port")
		}
		h.did = append(h.did, "configure")
		return true, nil
	}
	t.Setenv(api.EnvDataDir, filepath.Join(t.TempDir(), "data"))
	return h
}

// run runs a command and checks what it did, and how it ended: with an exit
// code, and words in what it said.
func (h *host) run(t *testing.T, args string, code int, says, did string) {
	t.Helper()
	h.did = nil
	got, out, errs := run(t, h.Machine, strings.Fields(args)...)
	if got != code || !strings.Contains(out+errs, says) {
		t.Errorf("%s: exit code %d, want %d; it said %q, want %q", args, got, code, out+errs, says)
	}
	if code != 0 && strings.Count(errs, "\n") != 1 {
		t.Errorf("%s: %q is not one line", args, errs)
	}
	if all := strings.Join(h.did, " "); all != did {
		t.Errorf("%s: did %q, want %q", args, all, did)
	}
}

func TestService(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h := newHost(t)
	dir := os.Getenv(api.EnvDataDir)
	h.run(t, "uninstall", 0, "Nothing to uninstall", "")
	h.run(t, "install agent", 2, "this version installs servers only; have a unit of your own run `tutti agent --kubeconfig FILE`", "")
	h.run(t, "install everything", 2, "tutti install knows no role \"everything\"; leave it out, or say server", "")
	h.run(t, "install server now", 2, `"now"`, "")
	h.run(t, "install --port 70000", 1, "--port 70000", "")
	if _, err := os.Stat(dir); err == nil {
		t.Error("a refused install left its data directory")
	}

	h.run(t, "install", 0, "starts at every boot", "daemon-reload enable restart")
	h.run(t, "install server", 0, "Nothing to change", "daemon-reload enable start")
	h.run(t, "install --port 7000", 0, "Updated", "configure daemon-reload enable restart")
	h.run(t, "install --data-dir "+t.TempDir(), 1, "the service is installed for "+dir+"; say --data-dir "+dir+", or `tutti uninstall` first", "")

	h.run(t, "up", 0, "ready", "start")
	h.run(t, "up --port 7000", 0, "ready", "configure start")
	h.run(t, "stop", 0, "`tutti uninstall`", "stop cleanup")
	h.run(t, "stop --data-dir "+t.TempDir(), 0, "Stopped", "cleanup")

	diary := filepath.Join(dir, "volumes", "pv", "diary")
	if err := errors.Join(os.MkdirAll(filepath.Dir(diary), 0o755), os.WriteFile(filepath.Join(dir, "config.json"), nil, 0o600), os.WriteFile(diary, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	h.run(t, "uninstall", 1, dir+" holds volumes with data; `tutti uninstall --purge` deletes it, `tutti uninstall --keep-data` keeps it", "")
	h.run(t, "uninstall --purge --keep-data", 2, "--purge deletes the data and --keep-data keeps it; say one of them", "")
	h.run(t, "uninstall --keep-data", 0, "The data is kept", "stop cleanup disable daemon-reload reset-failed")
	if _, err := os.Stat(diary); err != nil {
		t.Error(err)
	}
	h.run(t, "install", 0, "starts at every boot", "daemon-reload enable restart")
	h.run(t, "uninstall --purge", 0, "are gone", "stop purge disable daemon-reload reset-failed")
	h.run(t, "install", 0, "starts at every boot", "daemon-reload enable restart")
	if err := os.WriteFile(filepath.Join(dir, "config.json"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	h.run(t, "uninstall", 0, "are gone", "stop purge disable daemon-reload reset-failed")
}

func TestInstallWithoutSystemd(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	h := newHost(t)
	h.run(t, "install", 0, "starts at every boot", "daemon-reload enable restart")
	if err := os.RemoveAll(filepath.Join(h.Services.Root, "run")); err != nil {
		t.Fatal(err)
	}
	h.run(t, "uninstall", 1, "systemd does not run this machine; boot it to uninstall its service", "")
	h.Services.Root = t.TempDir()
	h.run(t, "install", 1, "systemd does not run this machine; start it with `tutti up`, or have your init run `tutti server`", "")
	h.run(t, "uninstall", 0, "Nothing to uninstall", "")
}
