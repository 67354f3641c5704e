package app

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// reachTimeout is how long a cluster may take to say who it is.
const reachTimeout = 10 * time.Second

// Reach asks the cluster for its version and says in a person's words why it
// does not answer.
func (c *Cluster) Reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	_, err := c.clients.CoreV1().RESTClient().Get().AbsPath("/version").DoRaw(ctx)
	return unreachable(c.host, err)
}

func unreachable(host string, err error) error {
	var (
		invalid x509.CertificateInvalidError
		unknown x509.UnknownAuthorityError
		name    x509.HostnameError
		dns     *net.DNSError
		network net.Error
	)
	switch {
	case err == nil, apierrors.IsForbidden(err): // it has answered
		return nil
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("the cluster at %s does not accept the credentials of this kubeconfig; get a new one", host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("the certificate of the cluster at %s is not valid at this time (%w); check the clock of this machine", host, invalid)
	case errors.As(err, &unknown), errors.As(err, &name), errors.As(err, &invalid):
		return fmt.Errorf("the cluster at %s is not the one that this kubeconfig trusts; get a new one, or check its server", host)
	case errors.As(err, &dns):
		return fmt.Errorf("no address for %s; check the server of this kubeconfig, and this machine's DNS", host)
	case errors.As(err, &network), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("the cluster at %s cannot be reached (%w); check that it runs, and the server of this kubeconfig", host, rootCause(err))
	}
	return fmt.Errorf("ask the cluster at %s: %w", host, err)
}

// rootCause is the part of a network error that says something.
func rootCause(err error) error {
	var op *net.OpError
	if errors.As(err, &op) {
		return op
	}
	return err
}
