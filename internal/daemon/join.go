package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	certutil "k8s.io/client-go/util/cert"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/controlplane"
	"tutti.dev/tutti/internal/controlplane/pki"
	"tutti.dev/tutti/internal/host/relay"
	"tutti.dev/tutti/internal/image"
)

// NodeCredentials makes the kubeconfig by which the machine of that address
// can join the cluster of dir as a node of that name. Nothing is kept: the
// node comes into being when its agent starts. It works whether a server runs
// or not.
func NodeCredentials(dir api.DataDir, node, address string) ([]byte, error) {
	s, found, err := readSettings(dir)
	switch {
	case err != nil:
		return nil, err
	case !found:
		return nil, errors.New("this machine has no cluster yet; start it with `tutti up`")
	case s.Agent:
		return nil, errors.New("this machine is a node of another's cluster; run this on the server")
	case node == s.NodeName:
		return nil, fmt.Errorf("%s is this machine's own name in the cluster; choose another for the node", node)
	case len(validation.IsDNS1123Subdomain(node)) > 0:
		return nil, fmt.Errorf("%q cannot be the name of a node; choose one of lower case letters, digits, '-' and '.'", node)
	}
	at, err := netip.ParseAddr(address)
	if err != nil {
		return nil, fmt.Errorf("%q is not an IP address; give the one at which this machine reaches the node", address)
	}
	server, err := netip.ParseAddr(s.Address)
	if err != nil || server.IsLoopback() || server == local {
		return nil, errors.New("the API listens for this machine alone; run `tutti up --address ADDRESS` with an address of it that the node reaches")
	}
	if server.IsUnspecified() {
		server = nodeAddress(at.String())
	}
	return pki.NodeKubeconfig(filepath.Join(string(dir), "pki"), "https://"+netip.AddrPortFrom(server, uint16(s.Port)).String(),
		node, []string{at.String()}, time.Now())
}

// membership is what a kubeconfig of NodeCredentials says.
type membership struct {
	node   string
	host   string // of the API
	port   int
	config *rest.Config // whose TLS is in memory
	leaf   *x509.Certificate
	file   string
}

const nodePrefix = "system:node:"

// readMembership reads the credentials of a node.
func readMembership(file string) (*membership, error) {
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist; make it on the server with `tutti node credentials`", file)
	}
	config, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil, fmt.Errorf("read the credentials of this node: %w", err)
	}
	if err := rest.LoadTLSFiles(config); err != nil {
		return nil, fmt.Errorf("read the credentials of this node: %w", err)
	}
	u, err := url.Parse(config.Host)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" {
		return nil, fmt.Errorf("%s names no API by https; make it on the server with `tutti node credentials`", file)
	}
	m := &membership{host: u.Hostname(), port: 443, config: config, file: file}
	if p := u.Port(); p != "" {
		if m.port, err = strconv.Atoi(p); err != nil {
			return nil, err
		}
	}
	if certs, err := certutil.ParseCertsPEM(config.CertData); err == nil {
		m.leaf = certs[0]
		m.node, _ = strings.CutPrefix(m.leaf.Subject.CommonName, nodePrefix)
	}
	if m.leaf == nil || nodePrefix+m.node != m.leaf.Subject.CommonName || len(config.KeyData) == 0 || len(config.CAData) == 0 {
		return nil, fmt.Errorf("%s holds no certificate of a node; make it on the server with `tutti node credentials`", file)
	}
	if time.Now().After(m.leaf.NotAfter) {
		return nil, fmt.Errorf("the certificate in %s has ended on %s; make another on the server with `tutti node credentials`", file, m.leaf.NotAfter.Format(time.DateOnly))
	}
	return m, nil
}

// serves wants a certificate with which the agent can serve at the address
// by which the cluster will know it.
func (m *membership) serves(at netip.Addr) error {
	if m.leaf.VerifyHostname(at.String()) != nil || !slices.Contains(m.leaf.ExtKeyUsage, x509.ExtKeyUsageServerAuth) {
		return fmt.Errorf("the certificate in %s is not for this machine's address %s; make it on the server with `tutti node credentials %s --address %[2]s`", m.file, at, m.node)
	}
	return nil
}

// keep writes the credentials where the agent's parts read them.
func (m *membership) keep(dir string) (controlplane.NodeCertificates, error) {
	in := func(name string) string { return filepath.Join(dir, name) }
	c := controlplane.NodeCertificates{CertFile: in("node.crt"), KeyFile: in("node.key"), ClientCAFile: in("ca.crt")}
	err := os.MkdirAll(dir, 0o700)
	for file, text := range map[string][]byte{c.CertFile: m.config.CertData, c.KeyFile: m.config.KeyData, c.ClientCAFile: m.config.CAData} {
		err = errors.Join(err, os.WriteFile(file, text, 0o600))
	}
	if err != nil {
		return c, fmt.Errorf("keep the credentials of this node: %w", err)
	}
	return c, nil
}

// client is of the API, as the node.
func (m *membership) client(c controlplane.NodeCertificates) *rest.Config {
	return &rest.Config{
		Host: m.config.Host,
		TLSClientConfig: rest.TLSClientConfig{
			CertFile: c.CertFile, KeyFile: c.KeyFile, CAFile: c.ClientCAFile, ServerName: m.config.ServerName,
		},
		QPS: -1, // the API server has its own means of fairness
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
	}
}

// joinCluster makes the parts of this machine reach the API and the registry
// of another, and its pods too, at the addresses that they have everywhere.
func (s *server) joinCluster(ctx context.Context) error {
	controlplane.LogLibraries(s.log.Handler(), s.control.ready.Load)
	certificates, err := s.joined.keep(s.join("pki"))
	if err != nil {
		return err
	}
	node := s.joined.client(certificates)
	if err := s.known(ctx, node); err != nil {
		return err
	}
	s.rooms.api = clusterAPI{node: node, part: func(string) *rest.Config { return node }, certificates: certificates}
	if err := s.relay(ctx, "API", s.joined.port); err != nil {
		return err
	}
	if s.settings.RegistryPort == api.NoRegistry {
		return nil
	}
	if err := s.relay(ctx, "registry", s.settings.RegistryPort); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(s.joined.config.CAData)
	hosts, own := registryHosts(s.settings, s.nodeIP), image.Auth{Machine: true}
	s.rooms.images.UseBuiltin(image.Builtin{
		Hosts: hosts, Roots: roots, Admin: own,
		Certificate: func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(certificates.CertFile, certificates.KeyFile)
			return &pair, err
		},
	})
	s.rooms.registryAuth = func(namespace string, ref reference.Named) (image.Auth, bool) {
		return own, ownImage(hosts, namespace, ref)
	}
	return nil
}

// known ends a start that cannot become one. An API that is out of reach may
// come back: what runs here is looked after without it.
func (s *server) known(ctx context.Context, node *rest.Config) error {
	node = rest.CopyConfig(node)
	node.Timeout = 10 * time.Second
	c, err := kubernetes.NewForConfig(node)
	if err != nil {
		return fmt.Errorf("make a client of the API: %w", err)
	}
	err = c.RESTClient().Get().AbsPath("/version").Do(ctx).Error()
	var foreign x509.UnknownAuthorityError
	switch {
	case apierrors.IsUnauthorized(err) || errors.As(err, &foreign):
		return fmt.Errorf("the cluster at %s is not the one that %s is for; make it anew there with `tutti node credentials %s`", s.joined.config.Host, s.joined.file, s.joined.node)
	case err != nil:
		s.log.Warn("the API is out of reach", "url", s.joined.config.Host, "err", err)
	}
	return nil
}

// relay passes on what comes to a port of this machine, where its pods expect
// the server's, to the server.
func (s *server) relay(ctx context.Context, what string, port int) error {
	target := net.JoinHostPort(s.joined.host, strconv.Itoa(port))
	for _, a := range addresses(s.settings, port) {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a.String())
		if err != nil {
			return fmt.Errorf("listen on %s for the %s: %w", a, what, err)
		}
		s.parts.run(what+" at "+a.String(), func(ctx context.Context) error { relay.Serve(ctx, l, target); return nil })
	}
	return nil
}
