package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"
)

// maxUploads is how many blobs of one image are sent at once.
const maxUploads = 3

// PushName says where an image goes. A name without a registry is one of the
// cluster's own registry, and without a namespace it is in the given one.
func (l *Local) PushName(to, namespace string) (string, error) {
	named, err := parseName(to)
	if err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	if _, ok := named.(reference.Digested); ok {
		return "", failed(ErrName, nil, "push image: %q names a digest; an image is pushed to a tag", to)
	}
	if reference.Domain(named) != "docker.io" || strings.HasPrefix(to, "docker.io/") {
		return named.String(), nil
	}
	b := l.builtin.Load()
	if b == nil {
		return "", failed(ErrName, nil, "push image: %q names no registry, and this machine serves none; name one, such as registry.example.com/%s", to, to)
	}
	path := reference.Path(named)
	if !strings.Contains(to, "/") {
		path = namespace + strings.TrimPrefix(path, "library")
	}
	return b.Hosts[0] + "/" + path + ":" + named.(reference.Tagged).Tag(), nil
}

// Push sends the image of this machine called name to a registry, where it is
// called to; both are names as Pull takes them, to with a registry. What the
// registry has is not sent again. Of an image for several platforms it sends
// all if all are here, else this machine's. It returns the digest that was
// tagged. Idempotent. auths are tried in order.
func (l *Local) Push(ctx context.Context, name, to string, auths []Auth) (string, error) {
	named, err := parseName(to)
	if err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	l.mu.Lock()
	e, err := find(l.images, name)
	l.mu.Unlock()
	if err != nil {
		return "", fmt.Errorf("push image: %w", err)
	}
	// A removal meanwhile must not take what is being read.
	ctx, end, err := l.lease(ctx, l.unique("push"))
	if err != nil {
		return "", fmt.Errorf("push %s: %w", named, err)
	}
	defer end(true)
	desc, err := l.pushable(ctx, e.Name)
	if err != nil {
		return "", fmt.Errorf("push %s: %w", named, err)
	}
	p := (&progress{download: true, active: func() {}}).watch(ctx)
	if len(auths) == 0 {
		auths = []Auth{{}}
	}
	for _, auth := range auths {
		if err = l.pushAs(ctx, named, desc, auth, p); err == nil {
			return desc.Digest.String(), nil
		}
		if !denied(err) {
			break
		}
	}
	return "", l.pushError(ctx, named, auths[0] != Auth{}, err)
}

// pushable is what there is to send of an image: its index if it is whole.
func (l *Local) pushable(ctx context.Context, name string) (ocispec.Descriptor, error) {
	stored, err := l.names.Get(ctx, name)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	whole := true
	var visit func(ocispec.Descriptor) error
	visit = func(d ocispec.Descriptor) error {
		if _, err := l.content.Info(ctx, d.Digest); errdefs.IsNotFound(err) {
			whole = false
			return nil
		} else if err != nil {
			return err
		}
		children, err := images.Children(ctx, l.content, d)
		if err != nil {
			return err
		}
		for _, c := range children {
			if err := visit(c); err != nil {
				return err
			}
		}
		return nil
	}
	if err := visit(stored.Target); err != nil {
		return ocispec.Descriptor{}, err
	}
	if whole || !images.IsIndexType(stored.Target.MediaType) {
		return stored.Target, nil
	}
	children, err := images.Children(ctx, l.content, stored.Target)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	best, err := l.choose(children)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return best[0], nil
}

func (l *Local) pushAs(ctx context.Context, named reference.Named, desc ocispec.Descriptor, auth Auth, p *progress) error {
	pusher, err := l.resolver(named, auth).Pusher(ctx, named.String())
	if err != nil {
		return err
	}
	counted := func(h images.Handler) images.Handler {
		return images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
			p.expect(d)
			children, err := h.Handle(ctx, d)
			if err == nil {
				p.update(func(now *Progress) {
					now.Bytes += d.Size
					if images.IsLayerType(d.MediaType) {
						now.Layers++
					}
				})
			}
			return children, err
		})
	}
	return remotes.PushContent(ctx, pusher, desc, l.content, semaphore.NewWeighted(maxUploads), platforms.All, counted)
}

// pushError says in words for a person why a push failed and what to do.
func (l *Local) pushError(ctx context.Context, named reference.Named, withAuth bool, err error) error {
	doing, registry := "push "+named.String(), reference.Domain(named)
	var status remoteerrors.ErrUnexpectedStatus
	errors.As(err, &status)
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
	case denied(err) && status.StatusCode == http.StatusForbidden && l.builtinFor(named) != nil:
		return failed(nil, err, "%s: you may not push there: %s", doing, said(status))
	case denied(err) && withAuth:
		return failed(nil, err, "%s: %s refuses access; check the name, the user and the password", doing, registry)
	case denied(err):
		return failed(nil, err, "%s: %s refuses access without a password; give one with --username and --password-stdin, or log in with docker", doing, registry)
	case errdefs.IsNotFound(err) && status.StatusCode == 0:
		return failed(ErrBroken, err, "%s: the image is not whole on this machine; pull or load it again", doing)
	}
	return reachError(doing, registry, "", err)
}

// said is the registry's own explanation.
func said(status remoteerrors.ErrUnexpectedStatus) string {
	var body struct{ Errors []struct{ Message string } }
	if json.Unmarshal(status.Body, &body) == nil && len(body.Errors) > 0 {
		return body.Errors[0].Message
	}
	return status.Status
}
