package app

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	sigsyaml "sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/api"
)

// releaseDefinition is the kind Release, which the first deployment to a
// cluster brings along.
//
//go:embed release.yaml
var releaseDefinition []byte

var releaseGVK = schema.GroupVersionKind{Group: api.Group, Version: api.ReleaseVersion, Kind: api.ReleaseKind}

// keptReleases is how many releases of an application are kept.
const keptReleases = 10

// secretType is of a Secret that holds what is secret in a release.
const secretType = "tutti.dev/release"

func (c *Cluster) releases(namespace string) dynamic.ResourceInterface {
	return c.dynamic.Resource(releaseGVK.GroupVersion().WithResource(api.ReleaseResource)).Namespace(namespace)
}

// errNoReleases is of a cluster on which nobody may define a kind but others.
var errNoReleases = errors.New("this cluster does not know releases, and you may not teach it; have its administrator deploy something first")

func otherDeploys(name string) error {
	return fmt.Errorf("somebody else deploys %s now; wait, and see `tutti history %s`", name, name)
}

// defineReleases makes sure that the cluster knows the kind.
func (c *Cluster) defineReleases(ctx context.Context) error {
	var u unstructured.Unstructured
	if err := sigsyaml.Unmarshal(releaseDefinition, &u.Object); err != nil {
		return err
	}
	o := Object{Unstructured: &u, File: "tutti"}
	if _, err := c.resource(releaseGVK); err == nil {
		return nil
	}
	_, err := c.apply(ctx, &plan{cluster: c}, o)
	if err != nil && strings.Contains(err.Error(), "forbidden") {
		return errNoReleases
	}
	if err != nil {
		return err
	}
	c.mapper.Reset()
	return nil
}

// Releases are those of an application that are kept, oldest first.
func (c *Cluster) Releases(ctx context.Context, namespace, name string) ([]api.Release, error) {
	list, err := c.releases(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.Set{api.LabelApp: name}.String()})
	if notFound(err) { // the kind is not known: nothing was deployed yet
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the releases of %s: %w", name, err)
	}
	releases := make([]api.Release, 0, len(list.Items))
	for i := range list.Items {
		r, err := decodeRelease(&list.Items[i])
		if err != nil {
			return nil, err
		}
		releases = append(releases, r)
	}
	slices.SortFunc(releases, func(a, b api.Release) int { return a.Number - b.Number })
	return releases, nil
}

func decodeRelease(u *unstructured.Unstructured) (api.Release, error) {
	text := func(fields ...string) string {
		s, _, _ := unstructured.NestedString(u.Object, fields...)
		return s
	}
	number, _, _ := unstructured.NestedInt64(u.Object, "spec", "number")
	images, _, _ := unstructured.NestedStringMap(u.Object, "status", "images")
	objects, err := base64.StdEncoding.DecodeString(text("spec", "objects"))
	if err != nil {
		return api.Release{}, fmt.Errorf("read release %s: %w", u.GetName(), err)
	}
	return api.Release{
		App: text("spec", "app"), Number: int(number), Created: u.GetCreationTimestamp().UTC(),
		Author: text("spec", "author"), Source: text("spec", "source"), Digest: text("spec", "digest"), Objects: objects,
		State: api.ReleaseState(text("status", "state")), Message: text("status", "message"), Images: images,
	}, nil
}

func releaseName(app string, number int) string { return fmt.Sprintf("%s-%d", app, number) }

// newRelease is what an application is now, as the next release of it. What is
// secret is apart.
func newRelease(a Application, number int, author string) (r api.Release, secrets map[string][]byte, err error) {
	all := make([]map[string]any, len(a.Objects))
	public := make([]map[string]any, len(a.Objects))
	secrets = map[string][]byte{}
	for i, o := range a.Objects {
		all[i], public[i] = o.Object, o.Object
		if o.groupKind() != (schema.GroupKind{Kind: "Secret"}) {
			continue
		}
		content := map[string]any{}
		stripped := o.DeepCopy().Object
		for _, field := range []string{"data", "stringData"} {
			if v, ok := stripped[field]; ok {
				content[field] = v
				delete(stripped, field)
			}
		}
		public[i] = stripped
		if secrets[secretKey(o.GetNamespace(), o.GetName())], err = json.Marshal(content); err != nil {
			return r, nil, err
		}
	}
	whole, err := json.Marshal(all)
	if err != nil {
		return r, nil, err
	}
	sum := sha256.Sum256(whole)
	text, err := json.Marshal(public)
	if err != nil {
		return r, nil, err
	}
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	if _, err := z.Write(text); err != nil {
		return r, nil, err
	}
	if err := z.Close(); err != nil {
		return r, nil, err
	}
	return api.Release{
		App: a.Name, Number: number, Author: author, Source: a.Source,
		Digest: "sha256:" + hex.EncodeToString(sum[:]), Objects: packed.Bytes(), State: api.ReleaseDeploying,
	}, secrets, nil
}

func secretKey(namespace, name string) string { return strings.TrimPrefix(namespace+".", ".") + name }

// objectsOf unpacks the objects of a release, with what is secret if it is given.
func objectsOf(r api.Release, secrets map[string][]byte) ([]Object, error) {
	z, err := gzip.NewReader(bytes.NewReader(r.Objects))
	if err != nil {
		return nil, fmt.Errorf("read release %d of %s: %w", r.Number, r.App, err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return nil, fmt.Errorf("read release %d of %s: %w", r.Number, r.App, err)
	}
	var list unstructured.UnstructuredList
	if err := list.UnmarshalJSON(slices.Concat([]byte(`{"apiVersion":"v1","kind":"List","items":`), text, []byte("}"))); err != nil {
		return nil, fmt.Errorf("read release %d of %s: %w", r.Number, r.App, err)
	}
	objects := make([]Object, len(list.Items))
	for i := range list.Items {
		u := &list.Items[i]
		if content, ok := secrets[secretKey(u.GetNamespace(), u.GetName())]; ok && u.GetKind() == "Secret" {
			if err := json.Unmarshal(content, &u.Object); err != nil {
				return nil, fmt.Errorf("read the secrets of release %d of %s: %w", r.Number, r.App, err)
			}
		}
		objects[i] = Object{Unstructured: u, File: fmt.Sprintf("release %d", r.Number)}
	}
	return objects, nil
}

// Application is what a release deployed.
func (c *Cluster) Application(ctx context.Context, namespace string, r api.Release) (Application, error) {
	s, err := c.clients.CoreV1().Secrets(namespace).Get(ctx, releaseName(r.App, r.Number), metav1.GetOptions{})
	if err != nil && !notFound(err) {
		return Application{}, fmt.Errorf("read the secrets of release %d of %s: %w", r.Number, r.App, err)
	}
	var secrets map[string][]byte
	if err == nil {
		secrets = s.Data
	}
	objects, err := objectsOf(r, secrets)
	return Application{Name: r.App, Namespace: namespace, Objects: objects, Source: r.Source}, err
}

// writeRelease makes the record of a release, before anything is done for it.
func (c *Cluster) writeRelease(ctx context.Context, namespace string, r api.Release, secrets map[string][]byte) error {
	u := &unstructured.Unstructured{Object: map[string]any{
		"spec": map[string]any{
			"app": r.App, "number": int64(r.Number), "author": r.Author, "source": r.Source, "digest": r.Digest,
			"objects": base64.StdEncoding.EncodeToString(r.Objects),
		},
	}}
	u.SetGroupVersionKind(releaseGVK)
	u.SetName(releaseName(r.App, r.Number))
	u.SetLabels(map[string]string{api.LabelApp: r.App})
	made, err := c.releases(namespace).Create(ctx, u, metav1.CreateOptions{FieldManager: api.FieldManager})
	if apierrors.IsAlreadyExists(err) {
		return otherDeploys(r.App)
	}
	if err != nil {
		return fmt.Errorf("record release %d of %s: %w", r.Number, r.App, err)
	}
	if len(secrets) > 0 {
		s := &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{
				Name: u.GetName(), Labels: map[string]string{api.LabelApp: r.App},
				OwnerReferences: []metav1.OwnerReference{{APIVersion: releaseGVK.GroupVersion().String(), Kind: releaseGVK.Kind, Name: made.GetName(), UID: made.GetUID()}},
			},
			Type: secretType, Data: secrets,
		}
		if _, err := c.clients.CoreV1().Secrets(namespace).Create(ctx, s, metav1.CreateOptions{FieldManager: api.FieldManager}); err != nil {
			return fmt.Errorf("record the secrets of release %d of %s: %w", r.Number, r.App, err)
		}
	}
	return c.setState(ctx, namespace, r)
}

// setState writes what changes about a release.
func (c *Cluster) setState(ctx context.Context, namespace string, r api.Release) error {
	images := map[string]any{}
	for k, v := range r.Images {
		images[k] = v
	}
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"state": r.State, "message": r.Message, "images": images}})
	if err != nil {
		return err
	}
	_, err = c.releases(namespace).Patch(ctx, releaseName(r.App, r.Number), "application/merge-patch+json", patch, metav1.PatchOptions{FieldManager: api.FieldManager}, "status")
	if err != nil {
		return fmt.Errorf("record release %d of %s as %s: %w", r.Number, r.App, r.State, err)
	}
	return nil
}
