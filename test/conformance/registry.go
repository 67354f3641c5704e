package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"tutti.dev/tutti/test/e2e/machine"
)

// registryName is where the suite looks for images. On a throwaway machine it
// is the world outside.
const registryName = "registry.k8s.io"

// registry serves images to whoever asks, by the OCI distribution
// specification as far as pulling goes.
type registry struct {
	dir       string
	manifests map[string]string // repository:tag → name of the recipe
}

func (r registry) manifest(base string) string { return filepath.Join(r.dir, base+".json") }
func (r registry) blob(d digest.Digest) string { return filepath.Join(r.dir, "blobs", d.Encoded()) }

// add makes an image of a layer; the layer's file becomes the registry's.
func (r registry) add(base string, layer *os.File, c ocispec.ImageConfig) error {
	if _, err := layer.Seek(0, io.SeekStart); err != nil {
		return err
	}
	diff, err := digest.FromReader(layer)
	if err != nil {
		return err
	}
	info, err := layer.Stat()
	if err != nil {
		return err
	}
	if err := os.Rename(layer.Name(), r.blob(diff)); err != nil {
		return err
	}
	c.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	config, err := r.put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, Config: c,
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{diff}},
	})
	if err != nil {
		return err
	}
	manifest, err := r.put(ocispec.MediaTypeImageManifest, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config,
		Layers: []ocispec.Descriptor{{MediaType: ocispec.MediaTypeImageLayer, Digest: diff, Size: info.Size()}},
	})
	if err != nil {
		return err
	}
	data, err := os.ReadFile(r.blob(manifest.Digest))
	if err != nil {
		return err
	}
	return os.WriteFile(r.manifest(base), data, 0o644)
}

func (r registry) put(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return d, os.WriteFile(r.blob(d.Digest), data, 0o644)
}

// copyInto puts an image where agnhost's fake-registry-server looks for it.
func (r registry) copyInto(l *layer, base string) error {
	data, err := os.ReadFile(r.manifest(base))
	if err != nil {
		return err
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return err
	}
	d := digest.FromBytes(data)
	place := func(kind string, d digest.Digest) string {
		return fmt.Sprintf("/var/registry/%s/%s/%s/%s/%s/data", base, kind, d.Algorithm(), d.Encoded()[:2], d.Encoded())
	}
	errs := []error{
		l.text("/var/registry/"+base+"/manifests/testing", d.String()+"\n"),
		l.file(place("manifests", d), r.blob(d), 0o644),
		l.file(place("blobs", m.Config.Digest), r.blob(m.Config.Digest), 0o644),
	}
	for _, b := range m.Layers {
		errs = append(errs, l.file(place("blobs", b.Digest), r.blob(b.Digest), 0o644))
	}
	return errors.Join(errs...)
}

// ServeHTTP answers GET and HEAD of manifests and blobs.
func (r registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	p := strings.TrimPrefix(req.URL.Path, "/v2/")
	name, ref, isManifest := strings.Cut(p, "/manifests/")
	if !isManifest {
		_, ref, _ = strings.Cut(p, "/blobs/")
	}
	d, err := digest.Parse(ref)
	switch base, ok := r.manifests[name+":"+ref]; {
	case p == "":
		return
	case isManifest && ok:
		data, err := os.ReadFile(r.manifest(base))
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		d = digest.FromBytes(data)
	case err != nil:
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Docker-Content-Digest", d.String())
	w.Header().Set("Content-Type", "application/octet-stream")
	if isManifest {
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
	}
	http.ServeFile(w, req, r.blob(d))
}

// open makes the registry known to a machine by its name, as an authority
// that only what starts on that machine afterwards trusts.
func (r registry) open(m *machine.Machine) (shut func(), err error) {
	cert, authority, err := certificate(registryName)
	if err != nil {
		return nil, fmt.Errorf("make a certificate: %w", err)
	}
	dir := filepath.Dir(m.Dir)
	ca, hosts := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "hosts")
	if err := os.WriteFile(ca, authority, 0o644); err != nil {
		return nil, err
	}
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"+machine.OutsideIP+" "+registryName+"\n"), 0o644); err != nil {
		return nil, err
	}
	if res := m.Run(10*time.Second, "mount", "--bind", hosts, "/etc/hosts"); res.Err != nil {
		return nil, errors.New(res.String())
	}
	if err := os.Setenv("SSL_CERT_FILE", ca); err != nil {
		return nil, err
	}
	l, err := m.ListenOutside("tcp", net.JoinHostPort(machine.OutsideIP, "443"))
	if err != nil {
		return nil, err
	}
	server := &http.Server{Handler: r}
	go server.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}}))
	return func() { server.Close() }, nil
}

// certificate is one for a name that vouches for itself, and itself as PEM.
func certificate(name string) (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	var text bytes.Buffer
	err = pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: der})
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, text.Bytes(), err
}
