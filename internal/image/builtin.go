package image

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
)

// Builtin is the cluster's own registry as this machine reaches it.
type Builtin struct {
	// Hosts are its names (host:port). The first is the one that a push to no
	// registry in particular goes to.
	Hosts []string
	// Roots vouch for its certificate, and for that of no other registry.
	Roots *x509.CertPool
	// Admin is for callers of the Handler who bring no credentials: they are
	// this machine's administrators.
	Admin Auth
	// Mirrors are the registries, as images name them, whose images it has or
	// fetches, and the URL at which it asks for them.
	Mirrors map[string]string
	// Node is who pulls through a mirror.
	Node Auth
	// Certificate is this machine's, for Auth.Machine; nil is none.
	Certificate func() (*tls.Certificate, error)
}

type builtin struct {
	Builtin
	client  *http.Client
	machine *http.Client // shows Certificate
}

// UseBuiltin makes the cluster's registry known, in place of one before.
func (l *Local) UseBuiltin(b Builtin) {
	config := &tls.Config{RootCAs: b.Roots, MinVersion: tls.VersionTLS12}
	known := &builtin{b, registryClient(config), nil}
	if b.Certificate != nil {
		config = config.Clone()
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return b.Certificate() }
		known.machine = registryClient(config)
	}
	l.builtin.Store(known)
}

// builtinFor is the cluster's registry if the image is there, else nil.
func (l *Local) builtinFor(named reference.Named) *builtin {
	if b := l.builtin.Load(); b != nil && slices.Contains(b.Hosts, reference.Domain(named)) {
		return b
	}
	return nil
}

// mirrored are the ways to an image of which the cluster's registry keeps
// copies: through it, and where it would ask. There are none to others.
func (l *Local) mirrored(named reference.Named) ([]way, error) {
	b := l.builtin.Load()
	if b == nil || b.Mirrors[reference.Domain(named)] == "" {
		return nil, nil
	}
	upstream, err := url.Parse(b.Mirrors[reference.Domain(named)])
	if err != nil {
		return nil, err
	}
	at := func(host docker.RegistryHost, name string) way {
		host.Path, host.Capabilities = "/v2", docker.HostCapabilityPull|docker.HostCapabilityResolve
		return way{name, docker.NewResolver(docker.ResolverOptions{
			Hosts:   func(string) ([]docker.RegistryHost, error) { return []docker.RegistryHost{host}, nil },
			Headers: userAgent(),
		}), func(err error) bool { return !useless(err) }}
	}
	return []way{
		// The resolver says ?ns= to a host that is not the image's.
		at(docker.RegistryHost{
			Client: b.client, Scheme: "https", Host: b.Hosts[0],
			Header: http.Header{"Authorization": {"Bearer " + b.Node.RegistryToken}},
		}, named.String()),
		at(docker.RegistryHost{
			Client: l.client, Scheme: upstream.Scheme, Host: upstream.Host,
			Authorizer: docker.NewDockerAuthorizer(docker.WithAuthClient(l.client)),
		}, upstream.Host+strings.TrimPrefix(named.String(), reference.Domain(named))),
	}, nil
}

// adminAuths are what a caller of the Handler uses for an image.
func (l *Local) adminAuths(name string, given []Auth) []Auth {
	named, err := parseName(name)
	if err != nil || len(given) > 0 {
		return given
	}
	if b := l.builtinFor(named); b != nil {
		return []Auth{b.Admin}
	}
	return nil
}
