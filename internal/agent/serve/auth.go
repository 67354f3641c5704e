package serve

import (
	"fmt"
	"net/http"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/authenticatorfactory"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
)

// auth lets in those whom the API server knows and who may do to this node
// what they ask: a kubelet's rules, so that roles written for one hold here.
type auth struct {
	node  string
	authn authenticator.Request
	authz authorizer.Authorizer
}

func newAuth(cfg Config) (*auth, error) {
	ca, err := dynamiccertificates.NewStaticCAContent("client-ca", cfg.ClientCA)
	if err != nil {
		return nil, fmt.Errorf("read the authority of clients: %w", err)
	}
	authn, _, err := authenticatorfactory.DelegatingAuthenticatorConfig{
		ClientCertificateCAContentProvider: ca,
		TokenAccessReviewClient:            cfg.Client.AuthenticationV1(),
		TokenAccessReviewTimeout:           10 * time.Second,
		WebhookRetryBackoff:                options.DefaultAuthWebhookRetryBackoff(),
		CacheTTL:                           2 * time.Minute,
	}.New()
	if err != nil {
		return nil, fmt.Errorf("set up authentication of the kubelet endpoints: %w", err)
	}
	authz, err := authorizerfactory.DelegatingAuthorizerConfig{
		SubjectAccessReviewClient: cfg.Client.AuthorizationV1(),
		AllowCacheTTL:             5 * time.Minute,
		DenyCacheTTL:              30 * time.Second,
		WebhookRetryBackoff:       options.DefaultAuthWebhookRetryBackoff(),
	}.New()
	if err != nil {
		return nil, fmt.Errorf("set up authorization of the kubelet endpoints: %w", err)
	}
	return &auth{node: cfg.NodeName, authn: authn, authz: authz}, nil
}

func (a *auth) wrap(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, ok, err := a.authn.AuthenticateRequest(r)
		if err != nil || !ok {
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
			return
		}
		verb, subresources := verbs[r.Method], subresources(r.URL.Path)
		for _, subresource := range subresources {
			decision, _, err := a.authz.Authorize(r.Context(), authorizer.AttributesRecord{
				User: who.User, Verb: verb, APIVersion: "v1", Resource: "nodes", Subresource: subresource,
				Name: a.node, ResourceRequest: true, Path: r.URL.Path,
			})
			if err != nil {
				http.Error(w, fmt.Sprintf("Authorization error (user=%s, verb=%s, resource=nodes, subresource=%s)",
					who.User.GetName(), verb, subresource), http.StatusInternalServerError)
				return
			}
			if decision == authorizer.DecisionAllow {
				next.ServeHTTP(w, r)
				return
			}
		}
		http.Error(w, fmt.Sprintf("Forbidden (user=%s, verb=%s, resource=nodes, subresource(s)=%v)",
			who.User.GetName(), verb, subresources), http.StatusForbidden)
	})
}

var verbs = map[string]string{
	http.MethodPost: "create", http.MethodGet: "get", http.MethodPut: "update",
	http.MethodPatch: "patch", http.MethodDelete: "delete",
}

// subresources of the node that stand for a path: any one is enough.
func subresources(path string) []string {
	below := func(prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }
	switch {
	case below("/stats"):
		return []string{"stats"}
	case below("/metrics"):
		return []string{"metrics"}
	case below("/logs"):
		return []string{"log"}
	case below("/pods"), below("/runningpods"):
		return []string{"pods", "proxy"}
	case below("/configz"):
		return []string{"configz", "proxy"}
	case below("/healthz"):
		return []string{"healthz", "proxy"}
	}
	return []string{"proxy"}
}
