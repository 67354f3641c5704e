// Package pki makes, keeps and renews the certificates and keys of a cluster, as files in one directory.
//
// There are two authorities with separate duties. The cluster authority (ca) signs what serves and whoever calls: the
// API server, the agents, the administrator. The front-proxy authority (front-proxy-ca) signs only the certificate by
// which the API server proves to extension API servers that the user it names in a header is real.
package pki

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apiserverv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	certutil "k8s.io/client-go/util/cert"
	"sigs.k8s.io/yaml"
)

const (
	// Lifetime is how long a certificate is valid; an authority lives ten times as long.
	Lifetime = 365 * 24 * time.Hour
	// RenewBefore is how long before its end a certificate is replaced.
	RenewBefore = 90 * 24 * time.Hour

	// KubeletClientName is the user as whom the API server calls agents.
	KubeletClientName = "kube-apiserver-kubelet-client"
	// FrontProxyClientName is the name by which extension API servers know this API server.
	FrontProxyClientName = "front-proxy-client"
	// AdminName is the user of the admin kubeconfig, a member of system:masters.
	AdminName = "tutti:admin"
)

// Spec says for whom the certificates are.
type Spec struct {
	// Dir is where the files are; it is made, 0700, when missing.
	Dir string
	// ServerSANs are the names and addresses at which the API server is reached.
	ServerSANs []string
	// NodeName is the node whose agent serves with the kubelet certificate.
	NodeName string
	// NodeSANs are further names and addresses at which that agent is reached.
	NodeSANs []string
}

// Pair is a certificate and its private key, both PEM files.
type Pair struct{ CertFile, KeyFile string }

// Files are the paths of everything that [Ensure] has made or found.
type Files struct {
	CA               Pair // the cluster authority
	APIServer        Pair // the API server's serving certificate
	KubeletClient    Pair // with which the API server calls agents
	Kubelet          Pair // the agent's serving certificate
	Admin            Pair // the administrator's client certificate
	FrontProxyCA     Pair // the front-proxy authority
	FrontProxyClient Pair // with which the API server calls extension API servers

	ServiceAccountKey string // PEM RSA key that signs service account tokens
	EncryptionConfig  string // EncryptionConfiguration that holds the key of Secrets at rest
}

// paths are the files below dir.
func paths(dir string) *Files {
	pair := func(name string) Pair {
		return Pair{CertFile: filepath.Join(dir, name+".crt"), KeyFile: filepath.Join(dir, name+".key")}
	}
	return &Files{
		CA:                pair("ca"),
		APIServer:         pair("apiserver"),
		KubeletClient:     pair("apiserver-kubelet-client"),
		Kubelet:           pair("kubelet"),
		Admin:             pair("admin"),
		FrontProxyCA:      pair("front-proxy-ca"),
		FrontProxyClient:  pair("front-proxy-client"),
		ServiceAccountKey: filepath.Join(dir, "service-account.key"),
		EncryptionConfig:  EncryptionConfigFile(dir),
	}
}

// EncryptionConfigFile is where the key of Secrets at rest is, below dir.
func EncryptionConfigFile(dir string) string { return filepath.Join(dir, "encryption.yaml") }

// Ensure makes what is missing, renews certificates that end soon, that lack a name of s or that another authority
// signed, and leaves everything else as it is. Files are replaced whole or not at all. A damaged file is an error that
// names the file and the cure; nothing that could be precious is overwritten. It may be called at any time, again and
// again, by one process at a time.
func Ensure(s Spec, now time.Time) (*Files, error) {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("make the certificate directory: %w", err)
	}
	f := paths(s.Dir)
	ca, err := ensureAuthority(f.CA, "tutti-ca", now)
	if err != nil {
		return nil, err
	}
	frontProxyCA, err := ensureAuthority(f.FrontProxyCA, "tutti-front-proxy-ca", now)
	if err != nil {
		return nil, err
	}
	for _, leaf := range []struct {
		pair Pair
		by   *authority
		as   subject
	}{
		{f.APIServer, ca, subject{name: "kube-apiserver", sans: s.ServerSANs, usage: serving}},
		{f.KubeletClient, ca, subject{name: KubeletClientName, usage: calling}},
		{f.Kubelet, ca, nodeSubject(s.NodeName, s.NodeSANs, serving)},
		{f.Admin, ca, subject{name: AdminName, groups: []string{"system:masters"}, usage: calling}},
		{f.FrontProxyClient, frontProxyCA, subject{name: FrontProxyClientName, usage: calling}},
	} {
		if err := ensureLeaf(leaf.pair, leaf.by, leaf.as, now); err != nil {
			return nil, err
		}
	}
	if err := ensureServiceAccountKey(f.ServiceAccountKey); err != nil {
		return nil, err
	}
	if err := ensureEncryptionConfig(f.EncryptionConfig); err != nil {
		return nil, err
	}
	return f, nil
}

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// damaged is the error for a file that cannot be used.
func damaged(file string, why error, cure string) error {
	return fmt.Errorf("%s is damaged (%v); %s", file, why, cure)
}

const (
	restore = "restore it from a backup"
	remake  = "remove it, it is made again at the next start"
)

func ensureAuthority(p Pair, name string, now time.Time) (*authority, error) {
	cert, err := readCert(p.CertFile, restore)
	if err != nil {
		return nil, err
	}
	key, err := readKey(p.KeyFile, restore)
	if err != nil {
		return nil, err
	}
	switch {
	case cert == nil:
		// A key without a certificate is a first start that was cut short: the key is written first.
		if key == nil {
			if key, err = newKey(p.KeyFile); err != nil {
				return nil, err
			}
		}
		cert, err = certutil.NewSelfSignedCACert(certutil.Config{CommonName: name, NotBefore: now.Add(-skew)}, key)
		if err != nil {
			return nil, fmt.Errorf("sign %s: %w", p.CertFile, err)
		}
		if err := writeFile(p.CertFile, certPEM(cert), 0o644); err != nil {
			return nil, err
		}
	case key == nil:
		return nil, fmt.Errorf("%s is missing but %s is there; %s", p.KeyFile, p.CertFile, restore)
	case !matches(cert, key):
		return nil, fmt.Errorf("%s and %s do not belong together; restore both from a backup", p.CertFile, p.KeyFile)
	case !cert.IsCA:
		return nil, damaged(p.CertFile, errors.New("not an authority's certificate"), restore)
	case now.After(cert.NotAfter):
		return nil, fmt.Errorf("%s has ended on %s; remove it to have it signed again with the same key",
			p.CertFile, cert.NotAfter.Format(time.DateOnly))
	}
	return &authority{cert: cert, key: key}, nil
}

// skew is how far the clocks of other machines may lag behind.
const skew = 5 * time.Minute

// subject is whom a certificate names.
type subject struct {
	name   string
	groups []string
	sans   []string
	usage  []x509.ExtKeyUsage
}

func nodeSubject(node string, sans []string, usage []x509.ExtKeyUsage) subject {
	return subject{name: "system:node:" + node, groups: []string{"system:nodes"}, sans: append([]string{node}, sans...), usage: usage}
}

var (
	serving = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	calling = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
)

// serves reports whether c still does for s, signed by ca, at the time now.
func (s subject) serves(c *x509.Certificate, ca *authority, now time.Time) bool {
	if c.Subject.CommonName != s.name || !slices.Equal(c.Subject.Organization, s.groups) || !slices.Equal(c.ExtKeyUsage, s.usage) {
		return false
	}
	if now.Before(c.NotBefore) || now.After(c.NotAfter.Add(-RenewBefore)) || c.CheckSignatureFrom(ca.cert) != nil {
		return false
	}
	for _, san := range s.sans {
		if c.VerifyHostname(san) != nil {
			return false
		}
	}
	return true
}

func ensureLeaf(p Pair, ca *authority, s subject, now time.Time) error {
	cert, err := readCert(p.CertFile, remake)
	if err != nil {
		return err
	}
	key, err := readKey(p.KeyFile, remake)
	if err != nil {
		return err
	}
	if cert != nil && key != nil && matches(cert, key) && s.serves(cert, ca, now) {
		return nil
	}
	if key == nil {
		if key, err = newKey(p.KeyFile); err != nil {
			return err
		}
	}
	if cert, err = ca.sign(s, key.Public(), now); err != nil {
		return fmt.Errorf("sign %s: %w", p.CertFile, err)
	}
	return writeFile(p.CertFile, certPEM(cert), 0o644)
}

// sign makes the certificate of a subject.
func (ca *authority) sign(s subject, key crypto.PublicKey, now time.Time) (*x509.Certificate, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("draw a serial number: %w", err)
	}
	template := x509.Certificate{
		SerialNumber: serial.Add(serial, big.NewInt(1)),
		Subject:      pkix.Name{CommonName: s.name, Organization: s.groups},
		NotBefore:    now.Add(-skew),
		NotAfter:     now.Add(Lifetime),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  s.usage,
	}
	for _, san := range s.sans {
		if ip := net.ParseIP(san); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, san)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, ca.cert, key, ca.key)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func ensureServiceAccountKey(file string) error {
	key, err := readKey(file, restore+", or remove it: a new one is made and tokens given so far end")
	if err != nil || key != nil {
		return err
	}
	// RSA, because verifiers of OpenID tokens take RS256 by default.
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("make %s: %w", file, err)
	}
	return writeKey(file, rsaKey)
}

func ensureEncryptionConfig(file string) error {
	b, err := readFile(file)
	if err != nil {
		return err
	}
	if b != nil {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if _, err := encryptionconfig.LoadEncryptionConfig(ctx, file, false, ""); err != nil {
			return damaged(file, oneLine(err), restore+", it is the only key to the Secrets in etcd")
		}
		return nil
	}
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return fmt.Errorf("draw a key: %w", err)
	}
	b, err = yaml.Marshal(apiserverv1.EncryptionConfiguration{
		TypeMeta: metav1.TypeMeta{Kind: "EncryptionConfiguration", APIVersion: apiserverv1.SchemeGroupVersion.String()},
		Resources: []apiserverv1.ResourceConfiguration{{
			Resources: []string{"secrets"},
			Providers: []apiserverv1.ProviderConfiguration{
				{Secretbox: &apiserverv1.SecretboxConfiguration{Keys: []apiserverv1.Key{{
					Name: "1", Secret: base64.StdEncoding.EncodeToString(secret),
				}}}},
				{Identity: &apiserverv1.IdentityConfiguration{}},
			},
		}},
	})
	if err != nil {
		return fmt.Errorf("make %s: %w", file, err)
	}
	return writeFile(file, b, 0o600)
}
