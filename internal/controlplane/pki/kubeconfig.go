package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"slices"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/client-go/util/keyutil"
)

// WriteAdminKubeconfig writes to file, 0600 and atomically, a kubeconfig that makes its holder a member of
// system:masters at the given server URL. Certificates are embedded: the file can be copied.
func (f *Files) WriteAdminKubeconfig(file, server string) error {
	ca, err := os.ReadFile(f.CA.CertFile)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	cert, err := os.ReadFile(f.Admin.CertFile)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	key, err := os.ReadFile(f.Admin.KeyFile)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	b, err := kubeconfig(server, ca, cert, key)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return writeFile(file, b, 0o600)
}

func kubeconfig(server string, ca, cert, key []byte) ([]byte, error) {
	const name = "tutti"
	return clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{name: {Server: server, CertificateAuthorityData: ca}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{name: {ClientCertificateData: cert, ClientKeyData: key}},
		Contexts:       map[string]*clientcmdapi.Context{name: {Cluster: name, AuthInfo: name}},
		CurrentContext: name,
	})
}

// NodeKubeconfig makes a kubeconfig for the agent of another machine, with a new key. Its certificate is the node's
// both ways: the agent calls the API at server with it, and serves with it at its name and addresses. dir is where
// [Ensure] has made the authority. Each call makes another one; none is remembered.
func NodeKubeconfig(dir, server, node string, addresses []string, now time.Time) ([]byte, error) {
	f := paths(dir)
	cert, err := readCert(f.CA.CertFile, restore)
	if err != nil {
		return nil, err
	}
	signer, err := readKey(f.CA.KeyFile, restore)
	if err != nil {
		return nil, err
	}
	if cert == nil || signer == nil {
		return nil, fmt.Errorf("no authority is in %s; start this machine with `tutti up`", dir)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make the key of node %s: %w", node, err)
	}
	keyPEM, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return nil, fmt.Errorf("make the key of node %s: %w", node, err)
	}
	ca := &authority{cert: cert, key: signer}
	leaf, err := ca.sign(nodeSubject(node, addresses, slices.Concat(calling, serving)), key.Public(), now)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of node %s: %w", node, err)
	}
	return kubeconfig(server, certPEM(cert), certPEM(leaf), keyPEM)
}
