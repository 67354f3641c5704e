package app

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/rest"

	"tutti.dev/tutti/internal/api"
)

func TestUnreachable(t *testing.T) {
	const host = "https://c:6443"
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, "<nil>"},
		{apierrors.NewForbidden(corev1.Resource("x"), "", nil), "<nil>"},
		{apierrors.NewUnauthorized("no"), "the cluster at https://c:6443 does not accept the credentials of this kubeconfig; get a new one"},
		{x509.CertificateInvalidError{Reason: x509.Expired, Detail: "it is 2020"},
			"the certificate of the cluster at https://c:6443 is not valid at this time (x509: certificate has expired or is not yet valid: it is 2020); check the clock of this machine"},
		{x509.UnknownAuthorityError{}, "the cluster at https://c:6443 is not the one that this kubeconfig trusts; get a new one, or check its server"},
		{&net.DNSError{Name: "c"}, "no address for https://c:6443; check the server of this kubeconfig, and this machine's DNS"},
		{&net.OpError{Op: "dial", Net: "tcp", Err: errors.New("connection refused")},
			"the cluster at https://c:6443 cannot be reached (dial tcp: connection refused); check that it runs, and the server of this kubeconfig"},
		{errors.New("boom"), "ask the cluster at https://c:6443: get: boom"},
	} {
		if c.err != nil {
			c.err = fmt.Errorf("get: %w", c.err)
		}
		if got := fmt.Sprint(unreachable(host, c.err)); got != c.want {
			t.Errorf("got %s\nwant %s", got, c.want)
		}
	}
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	for file, want := range map[string]string{
		filepath.Join(dir, "none"):  " is no kubeconfig, or an empty one; set KUBECONFIG to another, or unset it for this machine's",
		write("text", "root:x:0\n"): " is no kubeconfig; set KUBECONFIG to another, or unset it for this machine's",
		dir:                         "is a directory",
	} {
		_, _, err := Load(file)
		if err == nil || !strings.HasSuffix(err.Error(), want) || !strings.Contains(err.Error(), file) {
			t.Errorf("%s: error %v", file, err)
		}
	}
}

// A server that takes the connection and says nothing.
func TestSilence(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := Connect(&rest.Config{Host: "http://" + l.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Observe(t.Context(), 50*time.Millisecond)
	if err == nil || err.Error() != "list what runs: no answer within 50ms; check that the cluster runs, and try again" {
		t.Errorf("error %v", err)
	}
}

func TestFind(t *testing.T) {
	inventory := func(namespace string) *corev1.ConfigMap {
		return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: inventoryPrefix + "shop", Labels: map[string]string{api.LabelApp: "shop", api.LabelInventory: "true"}}}
	}
	c := &Cluster{clients: fake.NewClientset(inventory("a"), inventory("b"))}
	for name, want := range map[string]string{
		"shop": "application shop is deployed in several namespaces (a, b); choose one with --namespace",
		"blog": "no application blog is deployed; `tutti status` lists what is",
	} {
		if _, err := c.Find(t.Context(), "", name); err == nil || err.Error() != want {
			t.Errorf("error %v, want %s", err, want)
		}
	}
}

func TestNotReady(t *testing.T) {
	at := func(s int) metav1.Time { return metav1.NewTime(time.Unix(int64(s), 0)) }
	event := func(uid types.UID, s int, message string) corev1.Event {
		return corev1.Event{InvolvedObject: corev1.ObjectReference{UID: uid}, LastTimestamp: at(s), Reason: "Unhealthy", Message: message}
	}
	state := []standing{
		{verdict: done("ready"), ref: Ref{Kind: "Job", Name: "j"}},
		{verdict: waiting("0 of 1 ready"), ref: Ref{Kind: "Deployment", Name: "web"}, warning: newestWarning([]corev1.Event{
			event("pod", 1, "old"), event("other", 3, "not ours"), event("pod", 2, "Readiness probe\nfailed"),
		}, []types.UID{"deployment", "pod"})},
	}
	const want = "not ready in time: Deployment web (0 of 1 ready; Unhealthy: Readiness probe failed); `tutti status` shows how it goes on, --timeout waits longer"
	if err := notReady(state, context.DeadlineExceeded); err.Error() != want {
		t.Errorf("error %v", err)
	}
}
