package image

import (
	"fmt"
	"strings"

	"github.com/distribution/reference"
)

// parseName completes a name the way docker does: registry docker.io, path
// library/, tag latest. A name with tag and digest keeps the digest only: it
// alone decides.
func parseName(name string) (reference.Named, error) {
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, failed(ErrName, err, "%q is not an image name: %v", name, err)
	}
	return named, nil
}

// find resolves what a person or a pod may call an image: its name, its
// repository and digest, or at least four digits of its ID or digest.
func find(images map[string]*entry, name string) (*entry, error) {
	named, err := parseName(name)
	if err == nil {
		if e := images[named.String()]; e != nil {
			return e, nil
		}
		if d, ok := named.(reference.Digested); ok {
			want := d.Digest().String()
			for _, e := range images {
				if e.repository == named.Name() && (e.Digest == want || e.manifest == want) {
					return e, nil
				}
			}
			return nil, notFound(name)
		}
	}
	hex := strings.TrimPrefix(name, "sha256:")
	if len(hex) < 4 || strings.Trim(hex, "0123456789abcdef") != "" {
		if err != nil {
			return nil, err
		}
		return nil, notFound(name)
	}
	var found *entry
	for _, e := range images {
		if !strings.HasPrefix(e.ID, "sha256:"+hex) && !strings.HasPrefix(e.Digest, "sha256:"+hex) {
			continue
		}
		if found != nil && found.ID != e.ID {
			return nil, fmt.Errorf("%q begins the ID of several images; give more digits", name)
		}
		if found == nil || e.Name < found.Name {
			found = e
		}
	}
	if found == nil {
		return nil, notFound(name)
	}
	return found, nil
}

func notFound(name string) error {
	return failed(ErrNotFound, nil, "no image %s on this machine", name)
}
