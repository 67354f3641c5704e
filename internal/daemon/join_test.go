package daemon

import (
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/controlplane/pki"
)

// serverDir makes the data directory of a server that has run once.
func serverDir(t *testing.T, s api.Settings) api.DataDir {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := writeSettings(api.DataDir(dir), s); err != nil {
		t.Fatal(err)
	}
	if _, err := pki.Ensure(pki.Spec{Dir: filepath.Join(dir, "pki"), NodeName: s.NodeName}, time.Now()); err != nil {
		t.Fatal(err)
	}
	return api.DataDir(dir)
}

func TestNodeCredentials(t *testing.T) {
	open := settings(func(s *api.Settings) { s.Address = "192.0.2.10" })
	dir := serverDir(t, open)
	text, err := NodeCredentials(dir, "n2", "192.0.2.20")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "n2")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := readMembership(file)
	if err != nil {
		t.Fatal(err)
	}
	if m.node != "n2" || m.host != "192.0.2.10" || m.port != 6443 {
		t.Errorf("read %+v", m)
	}
	if err := m.serves(netip.MustParseAddr("192.0.2.20")); err != nil {
		t.Error(err)
	}
	if err := m.serves(netip.MustParseAddr("192.0.2.21")); err == nil || err.Error() !=
		strings.ReplaceAll("the certificate in FILE is not for this machine's address 192.0.2.21; make it on the server with `tutti node credentials n2 --address 192.0.2.21`", "FILE", file) {
		t.Errorf("another address: %v", err)
	}

	bare := serverDir(t, open)
	if err := os.RemoveAll(filepath.Join(string(bare), "pki")); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		dir           api.DataDir
		node, address string
		says          string
	}{
		{dir, "n2", "there", `"there" is not an IP address; give the one at which this machine reaches the node`},
		{dir, "N 2", "192.0.2.20", `"N 2" cannot be the name of a node; choose one of lower case letters, digits, '-' and '.'`},
		{dir, "n", "192.0.2.20", "n is this machine's own name in the cluster; choose another for the node"},
		{api.DataDir(t.TempDir()), "n2", "192.0.2.20", "this machine has no cluster yet; start it with `tutti up`"},
		{bare, "n2", "192.0.2.20", strings.ReplaceAll("no authority is in DIR/pki; start this machine with `tutti up`", "DIR", string(bare))},
		{serverDir(t, settings(func(s *api.Settings) { s.Agent = true })), "n2", "192.0.2.20", "this machine is a node of another's cluster; run this on the server"},
		{serverDir(t, settings(func(*api.Settings) {})), "n2", "192.0.2.20", "the API listens for this machine alone; run `tutti up --address ADDRESS` with an address of it that the node reaches"},
	} {
		if _, err := NodeCredentials(c.dir, c.node, c.address); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s at %s: %v, want %q", c.node, c.address, err, c.says)
		}
	}
}

// An API that is somebody else's ends a start, one that is away does not.
func TestKnown(t *testing.T) {
	dir := string(serverDir(t, settings(func(*api.Settings) {})))
	other := httptest.NewTLSServer(http.NotFoundHandler())
	defer other.Close()
	other.Config.ErrorLog = log.New(io.Discard, "", 0)
	for url, says := range map[string]string{
		other.URL:             "the cluster at URL is not the one that FILE is for; make it anew there with `tutti node credentials n2`",
		"https://127.0.0.1:1": "",
	} {
		file := filepath.Join(dir, "n2")
		text, err := pki.NodeKubeconfig(filepath.Join(dir, "pki"), url, "n2", nil, time.Now())
		if err == nil {
			err = os.WriteFile(file, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		s := &server{log: slog.New(slog.DiscardHandler)}
		if s.joined, err = readMembership(file); err != nil {
			t.Fatal(err)
		}
		c, err := s.joined.keep(filepath.Join(dir, "kept"))
		if err != nil {
			t.Fatal(err)
		}
		err = s.known(t.Context(), s.joined.client(c))
		says = strings.NewReplacer("URL", url, "FILE", file).Replace(says)
		if says == "" && err != nil || says != "" && (err == nil || err.Error() != says) {
			t.Errorf("%s: %v, want %q", url, err, says)
		}
	}
}

func TestReadMembership(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	files, err := pki.Ensure(pki.Spec{Dir: dir, NodeName: "n"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := files.WriteAdminKubeconfig(in("admin"), "https://192.0.2.10"); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		server string
		at     time.Time
	}{"plain": {"http://192.0.2.10", time.Now()}, "old": {"https://192.0.2.10", time.Now().Add(-2 * pki.Lifetime)}} {
		text, err := pki.NodeKubeconfig(dir, c.server, "n2", nil, c.at)
		if err == nil {
			err = os.WriteFile(in(name), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for file, says := range map[string]string{
		"none":  "none does not exist; make it on the server with `tutti node credentials`",
		"admin": "admin holds no certificate of a node; make it on the server with `tutti node credentials`",
		"plain": "plain names no API by https; make it on the server with `tutti node credentials`",
		"old":   "the certificate in FILE has ended on DATE; make another on the server with `tutti node credentials`",
	} {
		says = strings.NewReplacer("FILE", in(file), "DATE", time.Now().Add(-pki.Lifetime).Format(time.DateOnly)).Replace(says)
		if _, err := readMembership(in(file)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, want %q", file, err, says)
		}
	}
}
