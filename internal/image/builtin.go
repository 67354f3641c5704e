package image

import (
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"slices"

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
}

type builtin struct {
	Builtin
	client *http.Client
}

// UseBuiltin makes the cluster's registry known, in place of one before.
func (l *Local) UseBuiltin(b Builtin) {
	l.builtin.Store(&builtin{b, registryClient(&tls.Config{RootCAs: b.Roots, MinVersion: tls.VersionTLS12})})
}

// builtinFor is the cluster's registry if the image is there, else nil.
func (l *Local) builtinFor(named reference.Named) *builtin {
	if b := l.builtin.Load(); b != nil && slices.Contains(b.Hosts, reference.Domain(named)) {
		return b
	}
	return nil
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
