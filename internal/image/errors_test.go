package image

import (
	"context"
	"errors"
	"net/http"
	"testing"

	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
)

// What no registry of the other tests brings about.
func TestWords(t *testing.T) {
	l := &Local{}
	named, err := parseName("example.com/shop/web:1")
	if err != nil {
		t.Fatal(err)
	}
	stalled, cancel := context.WithCancelCause(t.Context())
	cancel(errStalled)
	denied := remoteerrors.ErrUnexpectedStatus{StatusCode: http.StatusUnauthorized}
	digest := "web@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	_, imported := l.Import(t.Context(), digest, nil, Config{})
	_, tagless := l.PushName(digest, "shop")
	_, nowhere := l.PushName("shop/web:1", "shop")
	two := map[string]*entry{"a": {Image: Image{Name: "a", ID: "sha256:aaaa1"}}, "b": {Image: Image{Name: "b", ID: "sha256:aaaa2"}}}
	_, several := find(two, "aaaa")
	for want, err := range map[string]error{
		"pull example.com/shop/web:1: example.com has sent nothing for 2m0s; try again":                                                                    l.pullError(stalled, named, false, context.Canceled),
		"push example.com/shop/web:1: example.com refuses access; check the name, the user and the password":                                               l.pushError(t.Context(), named, true, denied),
		"push example.com/shop/web:1: example.com refuses access without a password; give one with --username and --password-stdin, or log in with docker": l.pushError(t.Context(), named, false, denied),
		"push example.com/shop/web:1: the image is not whole on this machine; pull or load it again":                                                       l.pushError(t.Context(), named, false, errdefs.ErrNotFound),
		`import image: "` + digest + `" gives a digest, which only the content can; name it with a tag`:                                                    imported,
		`push image: "` + digest + `" names a digest; an image is pushed to a tag`:                                                                         tagless,
		`push image: "shop/web:1" names no registry, and this machine serves none; name one, such as registry.example.com/shop/web:1`:                      nowhere,
		`"aaaa" begins the ID of several images; give more digits`:                                                                                         several,
	} {
		if err == nil || err.Error() != want {
			t.Errorf("got %v\nwant %s", err, want)
		}
	}
	if !errors.Is(imported, ErrName) {
		t.Errorf("not a name: %v", imported)
	}
}
