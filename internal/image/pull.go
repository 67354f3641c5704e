package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// stallTimeout is how long a registry may send nothing before a pull ends.
const stallTimeout = 2 * time.Minute

// pull is one download that callers share.
type pull struct {
	done     chan struct{} // closed when img and err are set
	img      Image
	err      error
	waiting  int
	cancel   context.CancelCauseFunc
	progress *progress
}

// Pull implements Store. The registry is asked each time: a tag may have
// moved; what is here already is not fetched again. When the connection fails
// midway, what has arrived is kept for the next attempt, until the next
// collection. Callers share a download only if they bring the same auths.
func (l *Local) Pull(ctx context.Context, name string, auths []Auth) (Image, error) {
	named, err := parseName(name)
	if err != nil {
		return Image{}, fmt.Errorf("pull image: %w", err)
	}
	secret, err := json.Marshal(auths)
	if err != nil {
		return Image{}, err
	}
	key := named.String() + " " + string(secret)

	l.mu.Lock()
	p := l.pulls[key]
	if p == nil {
		p = &pull{done: make(chan struct{}), progress: &progress{download: true}}
		var shared context.Context
		shared, p.cancel = context.WithCancelCause(context.WithoutCancel(ctx))
		l.pulls[key] = p
		l.background.Go(func() {
			p.img, p.err = l.pull(shared, named, slices.Clone(auths), p)
			l.mu.Lock()
			if l.pulls[key] == p {
				delete(l.pulls, key)
			}
			l.mu.Unlock()
			close(p.done)
			p.cancel(nil)
		})
	}
	p.waiting++
	p.progress.watch(ctx)
	l.mu.Unlock()

	select {
	case <-p.done:
		return p.img, p.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	if p.waiting--; p.waiting == 0 {
		p.cancel(context.Cause(ctx))
		if l.pulls[key] == p {
			delete(l.pulls, key) // nobody joins a download that is ending
		}
	}
	l.mu.Unlock()
	return Image{}, fmt.Errorf("pull %s: %w", named, context.Cause(ctx))
}

// useless tells of a failure after which what was fetched is of no use.
func useless(err error) bool { return diskFull(err) || errors.Is(err, ErrBroken) }

func (l *Local) pull(ctx context.Context, named reference.Named, auths []Auth, p *pull) (img Image, err error) {
	ctx, end, err := l.lease(ctx, "pull "+named.String())
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", named, err)
	}
	defer func() {
		end(err == nil || useless(err))
		if useless(err) {
			l.collectLater()
		}
	}()
	stalled := time.AfterFunc(stallTimeout, func() { p.cancel(errStalled) })
	defer stalled.Stop()
	p.progress.active = func() { stalled.Reset(stallTimeout) }

	if len(auths) == 0 {
		auths = []Auth{{}}
	}
	ways, err := l.ways(named, auths)
	if err != nil {
		return Image{}, fmt.Errorf("pull %s: %w", named, err)
	}
	for _, w := range ways {
		img, err = l.pullBy(ctx, named, w, p.progress)
		if err == nil {
			return img, nil
		}
		if !w.next(err) || ctx.Err() != nil {
			break
		}
	}
	return Image{}, l.pullError(ctx, named, auths[0] != Auth{}, err)
}

// way is one to get an image: what it is called there, who knows it, and
// after which failures another way may do better.
type way struct {
	name     string
	resolver remotes.Resolver
	next     func(error) bool
}

// ways are how an image is to be had. What a cluster keeps copies of comes
// from there, or else, so that the registry itself says why not, from where
// the copies would. Who has credentials brings them to the registry itself:
// copies are there for everybody.
func (l *Local) ways(named reference.Named, auths []Auth) (all []way, err error) {
	if slices.Equal(auths, []Auth{{}}) {
		if all, err = l.mirrored(named); err != nil || len(all) > 0 {
			return all, err
		}
	}
	for _, auth := range auths {
		all = append(all, way{named.String(), l.resolver(named, auth), denied})
	}
	return all, nil
}

func (l *Local) pullBy(ctx context.Context, named reference.Named, w way, p *progress) (Image, error) {
	_, target, err := w.resolver.Resolve(ctx, w.name)
	if err != nil {
		return Image{}, err
	}
	if !images.IsIndexType(target.MediaType) && !images.IsManifestType(target.MediaType) {
		return Image{}, failed(ErrBroken, nil, "it is not a container image but %q", target.MediaType)
	}
	from, err := w.resolver.Fetcher(ctx, w.name)
	if err != nil {
		return Image{}, err
	}
	p.expect(target)
	fetch := remotes.FetchHandler(l.content, remotes.FetcherFunc(func(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
		body, err := from.Fetch(ctx, desc)
		if err != nil {
			return nil, err
		}
		counted := struct {
			*countingReader
			io.Closer
		}{p.reader(body), body}
		if seeker, ok := body.(io.Seeker); ok { // a download can go on where it ended
			return struct {
				io.ReadCloser
				io.Seeker
			}{counted, seeker}, nil
		}
		return counted, nil
	}))
	return l.admit(ctx, named, target, true, p, func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if _, err := l.content.Info(ctx, desc.Digest); err == nil {
			p.update(func(now *Progress) { now.Bytes += desc.Size })
		}
		return fetch(ctx, desc)
	})
}

// resolver speaks to the registry of one image as one user.
func (l *Local) resolver(named reference.Named, auth Auth) remotes.Resolver {
	client := l.client
	if b := l.builtinFor(named); b != nil {
		client = b.client
		if auth.Machine && b.machine != nil {
			client = b.machine
		}
	}
	opts := []docker.RegistryOpt{docker.WithClient(client), docker.WithPlainHTTP(l.plain)}
	header := userAgent()
	if auth.RegistryToken != "" {
		header.Set("Authorization", "Bearer "+auth.RegistryToken)
	} else {
		registry, _ := docker.DefaultHost(reference.Domain(named))
		opts = append(opts, docker.WithAuthorizer(docker.NewDockerAuthorizer(
			docker.WithAuthClient(client),
			docker.WithAuthCreds(func(host string) (string, string, error) {
				switch {
				case host != registry: // where a redirect led to
					return "", "", nil
				case auth.IdentityToken != "":
					return "", auth.IdentityToken, nil
				}
				return auth.Username, auth.Password, nil
			}))))
	}
	return docker.NewResolver(docker.ResolverOptions{Hosts: docker.ConfigureDefaultRegistries(opts...), Headers: header})
}

func userAgent() http.Header { return http.Header{"User-Agent": {"tutti"}} }

// plain tells which registries are spoken to without TLS.
func (l *Local) plain(host string) (bool, error) {
	if slices.Contains(l.plainHTTP, host) {
		return true, nil
	}
	if b := l.builtin.Load(); b != nil && slices.Contains(b.Hosts, host) {
		return false, nil
	}
	return docker.MatchLocalhost(host)
}
