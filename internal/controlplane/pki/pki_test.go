package pki

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"
)

func spec(dir string) Spec {
	return Spec{Dir: dir, ServerSANs: []string{"localhost", "127.0.0.1", "10.41.0.1"}, NodeName: "n1", NodeSANs: []string{"10.41.0.1"}}
}

func ensure(t *testing.T, s Spec, now time.Time) *Files {
	t.Helper()
	f, err := Ensure(s, now)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func certOf(t *testing.T, file string) *x509.Certificate {
	t.Helper()
	certs, err := certutil.CertsFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return certs[0]
}

func TestRoles(t *testing.T) {
	f := ensure(t, spec(filepath.Join(t.TempDir(), "pki")), time.Now())
	for _, tt := range []struct {
		pair  Pair
		ca    Pair
		usage x509.ExtKeyUsage
		name  string
		org   string
		host  string
	}{
		{f.APIServer, f.CA, x509.ExtKeyUsageServerAuth, "kube-apiserver", "", "10.41.0.1"},
		{f.Kubelet, f.CA, x509.ExtKeyUsageServerAuth, "system:node:n1", "system:nodes", "n1"},
		{f.KubeletClient, f.CA, x509.ExtKeyUsageClientAuth, KubeletClientName, "", ""},
		{f.Admin, f.CA, x509.ExtKeyUsageClientAuth, AdminName, "system:masters", ""},
		{f.FrontProxyClient, f.FrontProxyCA, x509.ExtKeyUsageClientAuth, FrontProxyClientName, "", ""},
	} {
		c := certOf(t, tt.pair.CertFile)
		roots := x509.NewCertPool()
		roots.AddCert(certOf(t, tt.ca.CertFile))
		if _, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{tt.usage}, DNSName: tt.host}); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if c.Subject.CommonName != tt.name || strings.Join(c.Subject.Organization, ",") != tt.org {
			t.Errorf("%s: subject %s", tt.name, c.Subject)
		}
	}
	for _, secret := range []string{f.CA.KeyFile, f.FrontProxyCA.KeyFile, f.Admin.KeyFile, f.ServiceAccountKey, f.EncryptionConfig} {
		if info, err := os.Stat(secret); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v %v", secret, info.Mode(), err)
		}
	}
}

// content is every file below dir.
func content(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		m[e.Name()] = string(b)
	}
	return m
}

func changed(a, b map[string]string) (names []string) {
	for _, n := range []string{"ca.crt", "ca.key", "apiserver.crt", "apiserver-kubelet-client.crt", "kubelet.crt", "admin.crt",
		"front-proxy-ca.crt", "front-proxy-client.crt", "service-account.key", "encryption.yaml"} {
		if a[n] != b[n] {
			names = append(names, n)
		}
	}
	return names
}

func TestRenewal(t *testing.T) {
	now := time.Now()
	leaves := "apiserver.crt apiserver-kubelet-client.crt kubelet.crt admin.crt front-proxy-client.crt"
	for name, tt := range map[string]struct {
		spec func(*Spec)
		now  time.Time
		want string
	}{
		"nothing to do":    {now: now.Add(time.Hour)},
		"still long valid": {now: now.Add(Lifetime - RenewBefore - time.Hour)},
		"near the end":     {now: now.Add(Lifetime - RenewBefore + time.Hour), want: leaves},
		"long ended":       {now: now.Add(3 * Lifetime), want: leaves},
		"new server name":  {spec: func(s *Spec) { s.ServerSANs = append(s.ServerSANs, "192.0.2.7") }, now: now, want: "apiserver.crt"},
		"fewer names":      {spec: func(s *Spec) { s.ServerSANs = s.ServerSANs[:1] }, now: now},
		"other node":       {spec: func(s *Spec) { s.NodeName = "n2" }, now: now, want: "kubelet.crt"},
	} {
		t.Run(name, func(t *testing.T) {
			s := spec(t.TempDir())
			ensure(t, s, now)
			before := content(t, s.Dir)
			if tt.spec != nil {
				tt.spec(&s)
			}
			ensure(t, s, tt.now)
			if got := strings.Join(changed(before, content(t, s.Dir)), " "); got != tt.want {
				t.Errorf("changed %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDamage(t *testing.T) {
	for name, tt := range map[string]struct {
		file string
		do   func(file string) error
		cure string // "" when it heals by itself
	}{
		"authority's certificate":      {"ca.crt", truncate, "); restore it from a backup"},
		"authority's key":              {"ca.key", garbage, "restore it from a backup"},
		"authority's key lost":         {"ca.key", os.Remove, "ca.crt is there; restore it from a backup"},
		"authority's certificate lost": {"ca.crt", os.Remove, ""},
		"certificate":                  {"apiserver.crt", truncate, "remove it"},
		"key":                          {"kubelet.key", garbage, "remove it"},
		"key lost":                     {"kubelet.key", os.Remove, ""},
		"service account key":          {"service-account.key", truncate, "restore it from a backup"},
		"encryption key":               {"encryption.yaml", truncate, "restore it from a backup"},
		"encryption key garbled":       {"encryption.yaml", garbage, "restore it from a backup"},
	} {
		t.Run(name, func(t *testing.T) {
			s := spec(t.TempDir())
			ensure(t, s, time.Now())
			file := filepath.Join(s.Dir, tt.file)
			if err := tt.do(file); err != nil {
				t.Fatal(err)
			}
			_, err := Ensure(s, time.Now())
			if tt.cure == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if err == nil {
				t.Fatal("no error")
			}
			for _, part := range []string{file, tt.cure} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not say %q", err, part)
				}
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %q", err)
			}
		})
	}
}

// An authority is precious: what is wrong with it is told, never repaired.
func TestAuthority(t *testing.T) {
	now := time.Now()
	for name, tt := range map[string]struct {
		do   func(dir string) error
		now  time.Time
		want string // DIR is the directory
	}{
		"key lost": {func(dir string) error { return os.Remove(filepath.Join(dir, "ca.key")) }, now, "DIR/ca.key is missing but DIR/ca.crt is there; restore it from a backup"},
		"another key": {func(dir string) error {
			return os.Rename(filepath.Join(dir, "kubelet.key"), filepath.Join(dir, "ca.key"))
		}, now, "DIR/ca.crt and DIR/ca.key do not belong together; restore both from a backup"},
		"ended": {nil, now.AddDate(50, 0, 0), "DIR/ca.crt has ended on DATE; remove it to have it signed again with the same key"},
	} {
		t.Run(name, func(t *testing.T) {
			s := spec(t.TempDir())
			ensure(t, s, now)
			if tt.do != nil {
				if err := tt.do(s.Dir); err != nil {
					t.Fatal(err)
				}
			}
			_, err := Ensure(s, tt.now)
			ends := certOf(t, filepath.Join(s.Dir, "ca.crt")).NotAfter.Format(time.DateOnly)
			if want := strings.NewReplacer("DIR", s.Dir, "DATE", ends).Replace(tt.want); err == nil || err.Error() != want {
				t.Errorf("error %v, want %s", err, want)
			}
		})
	}
}

func truncate(file string) error { return os.Truncate(file, 0) }
func garbage(file string) error  { return os.WriteFile(file, []byte("\x00garbage"), 0o600) }

func TestAdminKubeconfig(t *testing.T) {
	dir := t.TempDir()
	f := ensure(t, spec(dir), time.Now())
	file := filepath.Join(dir, "admin.kubeconfig")
	if err := f.WriteAdminKubeconfig(file, "https://127.0.0.1:6443"); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v %v", info, err)
	}
	c, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Host != "https://127.0.0.1:6443" || len(c.CAData) == 0 || len(c.CertData) == 0 || len(c.KeyData) == 0 {
		t.Errorf("%+v", c)
	}
}
