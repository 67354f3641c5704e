package daemon

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/authenticatorfactory"
	identity "k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/kubernetes"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/controlplane"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/image/registry"
)

// startRegistry serves images at the API's addresses and makes this machine
// use them.
func (s *server) startRegistry(ctx context.Context) error {
	if s.settings.RegistryPort == api.NoRegistry {
		return nil
	}
	client, err := s.client(controlplane.RegistryUser)
	if err != nil {
		return err
	}
	certificates := s.rooms.api.certificates
	ca, err := os.ReadFile(certificates.ClientCAFile)
	if err != nil {
		return fmt.Errorf("read the cluster's authority: %w", err)
	}
	access, err := newAccess(client, ca)
	if err != nil {
		return err
	}
	// They are known to this process alone and end with it.
	admin, err := access.issue(controlplane.Admin())
	if err != nil {
		return err
	}
	node, err := access.issue(controlplane.Node(s.settings.NodeName))
	if err != nil {
		return err
	}
	log := s.log.With("room", "registry")
	mirrors, err := parseMirrors(s.settings.Mirrors)
	if err != nil {
		return err
	}
	hosts := registryHosts(s.settings, s.nodeIP)
	if err := othersOnly(mirrors, hosts); err != nil {
		return err
	}
	reg := registry.New(registry.Options{Dir: s.join("registry"), Access: access, Mirrors: mirrors, Log: log})
	s.parts.opened("registry", func() error { reg.Close(); return nil })
	if err := s.serveRegistry(ctx, reg, certificates, log); err != nil {
		return err
	}

	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca) // newAccess has judged it
	s.rooms.images.UseBuiltin(image.Builtin{
		Hosts: hosts, Roots: roots, Admin: image.Auth{RegistryToken: admin}, Mirrors: mirrors, Node: image.Auth{RegistryToken: node},
	})
	s.rooms.registryAuth = func(namespace string, ref reference.Named) (image.Auth, bool) {
		return image.Auth{RegistryToken: node}, ownImage(hosts, namespace, ref)
	}
	s.control.collect.Store(reg)
	return nil
}

func (s *server) serveRegistry(ctx context.Context, reg http.Handler, c controlplane.NodeCertificates, log *slog.Logger) error {
	serve := &http.Server{
		Handler: reg,
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { // it is renewed while we run
				pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
				return &pair, err
			},
			ClientAuth: tls.RequestClientCert, // judged with all other credentials
		},
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	var listeners []net.Listener
	for _, a := range addresses(s.settings, s.settings.RegistryPort) {
		l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", a.String())
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return fmt.Errorf("listen on %s for the registry: %w", a, err)
		}
		listeners = append(listeners, l)
	}
	s.parts.run("registry's listener", func(ctx context.Context) error {
		ended := make(chan error, len(listeners))
		for _, l := range listeners {
			go func() { ended <- serve.ServeTLS(l, "", "") }()
		}
		select {
		case err := <-ended:
			serve.Close()
			return err
		case <-ctx.Done():
		}
		// A pull or push that takes longer is cut off; clients try again.
		grace, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if serve.Shutdown(grace) != nil {
			serve.Close()
		}
		return nil
	})
	return nil
}

// registryHosts are the names of the registry on this machine, first the one
// that means the same to its pods.
func registryHosts(s api.Settings, node netip.Addr) []string {
	port := strconv.Itoa(s.RegistryPort)
	hosts := []string{net.JoinHostPort(local.String(), port), net.JoinHostPort("localhost", port)}
	for _, a := range addresses(s, s.RegistryPort) {
		host := a.String()
		if a.Addr().IsUnspecified() {
			host = net.JoinHostPort(node.String(), port)
			hosts = append(hosts, net.JoinHostPort(loop.String(), port))
		}
		if host != hosts[0] {
			hosts = append(hosts, host)
		}
	}
	return hosts
}

// othersOnly refuses a mirror of the registry itself.
func othersOnly(mirrors map[string]string, own []string) error {
	for _, h := range own {
		if mirrors[h] != "" {
			return fmt.Errorf("--mirrors: %s is the cluster's own registry; leave it out", h)
		}
	}
	return nil
}

// ownImage says whether an image is in a repository of the namespace.
func ownImage(hosts []string, namespace string, ref reference.Named) bool {
	for _, h := range hosts {
		if reference.Domain(ref) == h {
			return strings.HasPrefix(reference.Path(ref), namespace+"/")
		}
	}
	return false
}

// How long the API's answers count: a push asks for the same many times a
// second, and rights that are taken away must end soon.
const (
	whoTTL     = 10 * time.Second
	allowedTTL = 10 * time.Second
	deniedTTL  = 2 * time.Second
)

// access lets the API say who may use the registry.
type access struct {
	authn authenticator.Request
	authz authorizer.Authorizer
	own   map[[sha256.Size]byte]identity.Info // by digest of the token
}

func newAccess(client kubernetes.Interface, ca []byte) (*access, error) {
	clients, err := dynamiccertificates.NewStaticCAContent("client-ca", ca)
	if err != nil {
		return nil, fmt.Errorf("read the cluster's authority: %w", err)
	}
	a := &access{own: map[[sha256.Size]byte]identity.Info{}}
	a.authn, _, err = authenticatorfactory.DelegatingAuthenticatorConfig{
		ClientCertificateCAContentProvider: clients,
		TokenAccessReviewClient:            client.AuthenticationV1(),
		TokenAccessReviewTimeout:           10 * time.Second,
		WebhookRetryBackoff:                options.DefaultAuthWebhookRetryBackoff(),
		CacheTTL:                           whoTTL,
	}.New()
	if err != nil {
		return nil, fmt.Errorf("set up authentication of the registry: %w", err)
	}
	a.authz, err = authorizerfactory.DelegatingAuthorizerConfig{
		SubjectAccessReviewClient: client.AuthorizationV1(),
		AllowCacheTTL:             allowedTTL,
		DenyCacheTTL:              deniedTTL,
		WebhookRetryBackoff:       options.DefaultAuthWebhookRetryBackoff(),
	}.New()
	if err != nil {
		return nil, fmt.Errorf("set up authorization of the registry: %w", err)
	}
	return a, nil
}

// issue returns a token that stands for u. All are issued before the first
// request.
func (a *access) issue(u identity.Info) (string, error) {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return "", fmt.Errorf("draw a token: %w", err)
	}
	token := hex.EncodeToString(secret)
	a.own[sha256.Sum256([]byte(token))] = u
	return token, nil
}

// Authenticate implements registry.Access. What is a bearer's token to the
// API is here also what docker sends as a password, with any user name.
func (a *access) Authenticate(r *http.Request) (registry.User, error) {
	token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	ask := r
	if _, password, ok := r.BasicAuth(); ok {
		token = password
		ask = r.Clone(r.Context())
		ask.Header.Set("Authorization", "Bearer "+password)
	}
	if u := a.own[sha256.Sum256([]byte(token))]; u != nil {
		return u, nil
	}
	who, ok, err := a.authn.AuthenticateRequest(ask)
	if err != nil {
		return nil, err
	}
	if !ok {
		return nil, errors.New("no credentials; log in with a token of this cluster (`tutti kubectl create token`)")
	}
	return who.User, nil
}

// Allowed implements registry.Access.
func (a *access) Allowed(ctx context.Context, u registry.User, verb registry.Verb, namespace, name string) (bool, error) {
	who, ok := u.(identity.Info)
	if !ok {
		return false, nil // nobody whom the API knows
	}
	resource := api.RegistryResource
	if namespace == "" && name != "" {
		resource = api.MirrorResource
	}
	decision, _, err := a.authz.Authorize(ctx, authorizer.AttributesRecord{
		User: who, Verb: string(verb), Namespace: namespace, Name: name, ResourceRequest: true,
		APIGroup: api.RegistryGroup, APIVersion: "*", Resource: resource,
	})
	if err != nil {
		return false, fmt.Errorf("ask the API what %s may do: %w", who.GetName(), err)
	}
	return decision == authorizer.DecisionAllow, nil
}
