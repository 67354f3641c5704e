package image

import (
	"archive/tar"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
)

// failure is an error whose text is meant for a person, in one line, and
// whose kind and cause are meant for errors.Is.
type failure struct {
	text        string
	kind, cause error
}

func failed(kind, cause error, format string, args ...any) error {
	return &failure{fmt.Sprintf(format, args...), kind, cause}
}

func (f *failure) Error() string { return f.text }

func (f *failure) Unwrap() []error {
	var all []error
	for _, err := range []error{f.kind, f.cause} {
		if err != nil {
			all = append(all, err)
		}
	}
	return all
}

// errClosed ends pulls when the store closes.
var errClosed = errors.New("image store closed")

// errStalled ends a pull whose registry has stopped sending.
var errStalled = errors.New("no data for too long")

func diskFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

func (l *Local) diskFullError(doing string, err error) error {
	return failed(nil, err, "%s: no space left in %s; remove unused images or make room", doing, l.dir)
}

// archiveError says why an archive could not be read or unpacked. readErr is
// what reading it from its source gave, if that failed.
func (l *Local) archiveError(ctx context.Context, doing string, readErr, err error) error {
	var f *failure
	switch {
	case diskFull(err):
		return l.diskFullError(doing, err)
	case readErr != nil:
		return fmt.Errorf("%s: read: %w", doing, readErr)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
	case errors.As(err, &f):
		return failed(f.kind, err, "%s: %s", doing, f.text)
	case errors.Is(err, tar.ErrHeader):
		return failed(ErrBroken, err, "%s: the archive is broken, or is no tar archive; make or copy it again", doing)
	case errors.Is(err, io.ErrUnexpectedEOF):
		return failed(ErrBroken, err, "%s: the archive is cut off; make or copy it again", doing)
	}
	return failed(ErrBroken, err, "%s: the archive is broken (%v); make or copy it again", doing, err)
}

// pullError says in words for the pod's owner why a pull failed and what to do.
func (l *Local) pullError(ctx context.Context, named reference.Named, withAuth bool, err error) error {
	doing, registry := "pull "+named.String(), reference.Domain(named)
	var (
		f      *failure
		status remoteerrors.ErrUnexpectedStatus
	)
	errors.As(err, &status)
	switch {
	case diskFull(err):
		return l.diskFullError(doing, err)
	case errors.As(err, &f):
		return failed(f.kind, err, "%s: %s", doing, f.text)
	case errors.Is(context.Cause(ctx), errStalled):
		return failed(nil, errStalled, "%s: %s has sent nothing for %s; try again", doing, registry, stallTimeout)
	case ctx.Err() != nil:
		return fmt.Errorf("%s: %w", doing, context.Cause(ctx))
	case denied(err) && withAuth:
		return failed(nil, err, "%s: %s refuses access; check the name, and the user and password (imagePullSecrets)", doing, registry)
	case denied(err):
		return failed(nil, err, "%s: %s refuses access without a password; check the name, or give credentials (imagePullSecrets)", doing, registry)
	case status.StatusCode == http.StatusTooManyRequests:
		return failed(nil, err, "%s: %s allows no more downloads for now; wait, or give credentials (imagePullSecrets)", doing, registry)
	case status.StatusCode >= 500:
		return failed(nil, err, "%s: %s fails with %q; try again later", doing, registry, status.Status)
	case errdefs.IsNotFound(err):
		if _, ok := named.(reference.Digested); ok {
			return failed(ErrNotFound, err, "%s: %s has no such digest of %s; check the name and the digest", doing, registry, reference.Path(named))
		}
		return failed(ErrNotFound, err, "%s: %s has no %s with tag %s; check the name and the tag, or load the image here (tutti image load)", doing, registry, reference.Path(named), named.(reference.Tagged).Tag())
	case errdefs.IsFailedPrecondition(err), errdefs.IsInvalidArgument(err):
		return failed(ErrBroken, err, "%s: %s sent content that does not match its digest: %v", doing, registry, err)
	}
	return reachError(doing, registry, ", or load the image here (tutti image load)", err)
}

// reachError says why a registry cannot be spoken with; instead is another
// way to what the caller wants.
func reachError(doing, registry, instead string, err error) error {
	var (
		netErr net.Error
		dnsErr *net.DNSError
		caErr  x509.UnknownAuthorityError
		nameEr x509.HostnameError
	)
	switch {
	case strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return failed(nil, err, "%s: %s speaks plain HTTP; allow it as an insecure registry", doing, registry)
	case errors.As(err, &caErr), errors.As(err, &nameEr):
		return failed(nil, err, "%s: the certificate of %s is not trusted; add its authority to this machine's", doing, registry)
	case errors.As(err, &dnsErr):
		return failed(nil, err, "%s: no address for %s; check the name and this machine's DNS%s", doing, registry, instead)
	case errors.As(err, &netErr):
		return failed(nil, err, "%s: %s cannot be reached (%v); check the network%s", doing, registry, rootCause(err), instead)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// denied tells whether a registry refused the caller, so that other
// credentials may help.
func denied(err error) bool {
	var status remoteerrors.ErrUnexpectedStatus
	return errors.Is(err, docker.ErrInvalidAuthorization) ||
		errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden)
}

// rootCause is the part of a network error that says something: "dial tcp
// 127.0.0.1:5000: connect: connection refused".
func rootCause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op
	}
	var netErr net.Error
	if errors.As(err, &netErr) {
		return netErr
	}
	return err
}
