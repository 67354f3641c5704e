package daemon

import (
	"fmt"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"k8s.io/apiserver/pkg/authentication/authenticator"

	"tutti.dev/tutti/internal/api"
)

func TestMirrors(t *testing.T) {
	for list, want := range map[string]map[string]string{
		"":                                    {},
		"none":                                {},
		"docker.io":                           {"docker.io": "https://registry-1.docker.io"},
		"quay.io,a.test:5000=http://10.0.0.1": {"quay.io": "https://quay.io", "a.test:5000": "http://10.0.0.1"},
	} {
		if got, err := parseMirrors(list); err != nil || !maps.Equal(got, want) {
			t.Errorf("%q: %v, %v", list, got, err)
		}
	}
	own := []string{"10.41.0.1:5000", "localhost:5000"}
	if err := othersOnly(map[string]string{"localhost:5000": "https://localhost:5000"}, own); err == nil || !strings.Contains(err.Error(), "--mirrors: localhost:5000 is the cluster's own registry; leave it out") {
		t.Errorf("its own mirror: %v", err)
	}
	if err := othersOnly(map[string]string{"localhost:5001": "http://localhost:5001"}, own); err != nil {
		t.Error(err)
	}
}

func TestRegistryHosts(t *testing.T) {
	node := netip.MustParseAddr("192.0.2.10")
	for address, want := range map[string]string{
		"":          "[10.41.0.1:5000 localhost:5000 127.0.0.1:5000]",
		"192.0.2.9": "[10.41.0.1:5000 localhost:5000 127.0.0.1:5000 192.0.2.9:5000]",
		"0.0.0.0":   "[10.41.0.1:5000 localhost:5000 127.0.0.1:5000 192.0.2.10:5000]",
	} {
		if got := fmt.Sprint(registryHosts(settings(func(s *api.Settings) { s.Address = address }), node)); got != want {
			t.Errorf("%q: got %s, want %s", address, got, want)
		}
	}
}

func TestOwnImage(t *testing.T) {
	hosts := []string{"10.41.0.1:5000", "localhost:5000"}
	for name, want := range map[string]bool{
		"10.41.0.1:5000/shop/web:1":    true,
		"localhost:5000/shop/front/it": true,
		"10.41.0.1:5000/shop2/web":     false,
		"10.41.0.1:5000/other/shop/x":  false,
		"10.41.0.1:5000/shop":          false,
		"10.41.0.1:5001/shop/web":      false,
		"example.com/shop/web":         false,
		"shop/web":                     false,
	} {
		ref, err := reference.ParseDockerRef(name)
		if err != nil {
			t.Fatal(err)
		}
		if got := ownImage(hosts, "shop", ref); got != want {
			t.Errorf("%s: %v, want %v", name, got, want)
		}
	}
}

func TestNoCredentials(t *testing.T) {
	a := &access{authn: authenticator.RequestFunc(func(*http.Request) (*authenticator.Response, bool, error) { return nil, false, nil })}
	_, err := a.Authenticate(httptest.NewRequest(http.MethodGet, "/v2/", nil))
	if err == nil || err.Error() != "no credentials; log in with a token of this cluster (`tutti kubectl create token`)" {
		t.Errorf("error %v", err)
	}
}
