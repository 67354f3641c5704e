package pki

import (
	"fmt"
	"os"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
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
	const name = "tutti"
	b, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{name: {Server: server, CertificateAuthorityData: ca}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{name: {ClientCertificateData: cert, ClientKeyData: key}},
		Contexts:       map[string]*clientcmdapi.Context{name: {Cluster: name, AuthInfo: name}},
		CurrentContext: name,
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return writeFile(file, b, 0o600)
}
