package registry

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"

	"github.com/distribution/distribution/v3"
	"github.com/distribution/distribution/v3/registry/api/errcode"
	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/distribution/distribution/v3/registry/storage"
	"github.com/distribution/distribution/v3/registry/storage/driver"
	"github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// distribution v3.1 stores manifests with a subject but does not answer who
// refers to a manifest (OCI distribution specification 1.1, end-12). They are
// looked through each time: repositories are small, and nothing can be out of
// step.

var referrersPath = regexp.MustCompile(`^/v2/(.+)/referrers/([^/]+)$`)

// maxManifest is the size of the largest manifest that distribution takes.
const maxManifest = 4 << 20

// refers is what of a manifest of any kind says to what it belongs.
type refers struct {
	ArtifactType string              `json:"artifactType"`
	Config       *ocispec.Descriptor `json:"config"` // an index has none
	Subject      *ocispec.Descriptor `json:"subject"`
	Annotations  map[string]string   `json:"annotations"`
}

// serveReferrers lists the manifests of a repository whose subject is the one
// with the digest.
func (r *Registry) serveReferrers(w http.ResponseWriter, req *http.Request, user User, repository, of string) {
	namespace, name, ok := strings.Cut(repository, "/")
	named, err := reference.WithName(repository)
	_, _, mirror := mirrored(req, repository)
	switch subject := digest.Digest(of); {
	case req.Method != http.MethodGet && req.Method != http.MethodHead:
		refuse(w, errcode.ErrorCodeUnsupported)
	case mirror: // clients then look for a list under a tag, which it may have
		http.NotFound(w, req)
	case err != nil || !ok:
		refuse(w, v2.ErrorCodeNameInvalid)
	case subject.Validate() != nil:
		refuse(w, v2.ErrorCodeDigestInvalid)
	case r.allowed(w, req, user, Pull, namespace, name):
		list, err := r.referrers(req.Context(), named, subject)
		if err != nil {
			r.log.Error("cannot list referrers", "repository", repository, "err", err)
			refuse(w, errcode.ErrorCodeUnavailable)
			return
		}
		if want := req.URL.Query().Get("artifactType"); want != "" {
			all := list
			list = list[:0]
			for _, d := range all {
				if d.ArtifactType == want {
					list = append(list, d)
				}
			}
			w.Header().Set("OCI-Filters-Applied", "artifactType")
		}
		w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
		_ = json.NewEncoder(w).Encode(ocispec.Index{ // the client is gone
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: list,
		})
	}
}

func (r *Registry) referrers(ctx context.Context, repository reference.Named, subject digest.Digest) ([]ocispec.Descriptor, error) {
	_, all, err := r.storage(ctx)
	if err != nil {
		return nil, err
	}
	list := []ocispec.Descriptor{}
	err = eachManifest(ctx, all, repository, func(desc ocispec.Descriptor, m refers, _ distribution.Manifest) {
		if m.Subject != nil && m.Subject.Digest == subject {
			list = append(list, desc)
		}
	})
	return list, err
}

// storage opens what is stored, for what the handlers do not do.
func (r *Registry) storage(ctx context.Context) (driver.StorageDriver, distribution.Namespace, error) {
	files, err := filesystem.FromParameters(map[string]any{"rootdirectory": r.dir})
	if err != nil {
		return nil, nil, err
	}
	all, err := storage.NewRegistry(ctx, files, storage.EnableDelete)
	return files, all, err
}

// eachManifest visits the manifests of a repository, if there is one.
func eachManifest(ctx context.Context, all distribution.Namespace, named reference.Named, visit func(ocispec.Descriptor, refers, distribution.Manifest)) error {
	repository, err := all.Repository(ctx, named)
	if err != nil {
		return err
	}
	manifests, err := repository.Manifests(ctx)
	if err != nil {
		return err
	}
	each, ok := manifests.(distribution.ManifestEnumerator)
	if !ok {
		return fmt.Errorf("%T cannot be enumerated", manifests)
	}
	err = each.Enumerate(ctx, func(d digest.Digest) error {
		m, err := manifests.Get(ctx, d)
		if errors.As(err, new(distribution.ErrManifestUnknownRevision)) {
			return nil // somebody removes it
		} else if err != nil {
			return fmt.Errorf("read manifest %s: %w", d, err)
		}
		mediaType, payload, err := m.Payload()
		if err != nil {
			return fmt.Errorf("read manifest %s: %w", d, err)
		}
		var says refers
		if err := json.Unmarshal(payload, &says); err != nil {
			return fmt.Errorf("read manifest %s: %w", d, err)
		}
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(payload)), ArtifactType: says.ArtifactType, Annotations: says.Annotations}
		if desc.ArtifactType == "" && says.Config != nil {
			desc.ArtifactType = says.Config.MediaType
		}
		visit(desc, says, m)
		return nil
	})
	if errors.As(err, new(driver.PathNotFoundError)) {
		return nil // nobody has pushed there
	}
	return err
}

// tellSubject says in the answer to a push that its subject is known to be
// one, so that clients need not keep lists of referrers themselves.
func tellSubject(w http.ResponseWriter, req *http.Request) {
	text, err := io.ReadAll(io.LimitReader(req.Body, maxManifest))
	req.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(text), req.Body), req.Body}
	var m refers
	if err == nil && json.Unmarshal(text, &m) == nil && m.Subject != nil {
		w.Header().Set("OCI-Subject", m.Subject.Digest.String())
	}
}
