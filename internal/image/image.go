// Package image keeps container images on this machine: content, unpacked
// layers, names. It is containerd's content store, metadata database and
// overlay snapshotter, used as a library without the daemon.
//
// # What keeps bytes on disk
//
// An image's name protects its content and its layers. Hold protects the
// layers of an image that runs, whatever becomes of the name; a hold is a
// marker file, so it outlives this process. Everything else is garbage and
// goes at the next collection: after a removal, a failed load, the release of
// the last hold on an image that has no name, or a call to Collect. A load or
// pull in progress is protected by a lease.
package image

import (
	"context"
	"errors"
	"time"
)

var (
	// ErrNotFound says that no image has that name, here or at the registry.
	ErrNotFound = errors.New("image not found")
	// ErrBroken says that the image or archive cannot be used as it is.
	ErrBroken = errors.New("image is broken")
	// ErrName says that a text cannot be the name of an image.
	ErrName = errors.New("not an image name")
	// ErrHeld says that a removal was refused because the image is in use.
	ErrHeld = errors.New("image is in use")
)

// Image is one image of this machine's platform.
type Image struct {
	Name   string // normalised: docker.io/library/busybox:latest
	Digest string // of the manifest or index, sha256:…
	ID     string // digest of the configuration
	Size   int64  // bytes of content
	Time   time.Time
	Config Config
}

// Config is what the image says about running it (OCI image-spec, config).
type Config struct {
	Entrypoint, Cmd, Env []string
	User, WorkingDir     string
	StopSignal           string
	Volumes              []string
	ExposedPorts         []string
	Labels               map[string]string
}

// Auth is a name and password for a registry; the zero value is anonymous.
type Auth struct {
	Username, Password, IdentityToken, RegistryToken string
	// Machine is by the certificate of this machine, Builtin.Certificate: only
	// the cluster's own registry is shown it.
	Machine bool
}

// Store is what the agent needs of this package.
type Store interface {
	// Get returns the image of that name, short or full, tag or digest, or
	// ErrNotFound. It reads memory only: it is on the path from create to Ready.
	Get(ctx context.Context, name string) (Image, error)
	// Pull fetches and unpacks; idempotent; several callers for one name share
	// one download. auths are tried in order.
	Pull(ctx context.Context, name string, auths []Auth) (Image, error)
	// Hold protects the image's layers from removal until Release(holder) and
	// returns the layer directories, lowest first. Idempotent per (holder, image).
	Hold(ctx context.Context, img Image, holder string) (layers []string, err error)
	Release(ctx context.Context, holder string) error
	// Holders are those that hold images, also since before this process.
	Holders() []string
	List(ctx context.Context) ([]Image, error)
	// Reclaim removes images that can be pulled again and that nobody holds,
	// the least recently used first, until enough says so of the bytes of
	// content freed so far, or there are no more.
	Reclaim(ctx context.Context, enough func(freed int64) bool) (freed int64, err error)
}
