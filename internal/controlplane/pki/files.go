package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	certutil "k8s.io/client-go/util/cert"
	"k8s.io/client-go/util/keyutil"
)

// readFile returns nil without an error when there is no such file.
func readFile(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read certificate directory: %w", err)
	}
	if b == nil {
		b = []byte{}
	}
	return b, nil
}

// readCert returns nil without an error when there is no such file.
func readCert(file, cure string) (*x509.Certificate, error) {
	b, err := readFile(file)
	if b == nil {
		return nil, err
	}
	certs, err := certutil.ParseCertsPEM(b)
	if err != nil {
		return nil, damaged(file, oneLine(err), cure)
	}
	return certs[0], nil
}

// readKey returns nil without an error when there is no such file.
func readKey(file, cure string) (crypto.Signer, error) {
	b, err := readFile(file)
	if b == nil {
		return nil, err
	}
	key, err := keyutil.ParsePrivateKeyPEM(b)
	if err != nil {
		return nil, damaged(file, oneLine(err), cure)
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, damaged(file, fmt.Errorf("a %T cannot sign", key), cure)
	}
	return signer, nil
}

func newKey(file string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make %s: %w", file, err)
	}
	return key, writeKey(file, key)
}

func writeKey(file string, key crypto.PrivateKey) error {
	b, err := keyutil.MarshalPrivateKeyToPEM(key)
	if err != nil {
		return fmt.Errorf("make %s: %w", file, err)
	}
	return writeFile(file, b, 0o600)
}

func certPEM(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: certutil.CertificateBlockType, Bytes: c.Raw})
}

func matches(c *x509.Certificate, key crypto.Signer) bool {
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && public.Equal(c.PublicKey)
}

// writeFile replaces file by one with the content b, or leaves the old one as it was.
func writeFile(file string, b []byte, mode fs.FileMode) error {
	if err := replace(file, b, mode); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return nil
}

func replace(file string, b []byte, mode fs.FileMode) error {
	t, err := os.CreateTemp(filepath.Dir(file), ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(t.Name()) // fails after the rename, as it should
	defer t.Close()
	if err := t.Chmod(mode); err != nil {
		return err
	}
	if _, err := t.Write(b); err != nil {
		return err
	}
	if err := t.Sync(); err != nil {
		return err
	}
	return os.Rename(t.Name(), file)
}

func oneLine(err error) error { return errors.New(strings.Join(strings.Fields(err.Error()), " ")) }
