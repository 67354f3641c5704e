package app

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/pmezard/go-difflib/difflib"
	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	sigsyaml "sigs.k8s.io/yaml"

	"tutti.dev/tutti/internal/api"
)

// Diff is how release m differs from release n, as a unified diff of their
// objects, empty when it does not. m 0 is what is deployed now; n 0 the release
// before m. What is secret is told by its digest.
func (c *Cluster) Diff(ctx context.Context, namespace, name string, n, m int) (string, error) {
	kept, err := c.Releases(ctx, namespace, name)
	if err != nil {
		return "", err
	}
	if m == 0 {
		now := current(kept)
		if now == nil {
			return "", noneDeployed(name)
		}
		m = now.Number
	}
	if n == 0 {
		for _, r := range kept {
			if r.Number < m && r.State != api.ReleaseFailed {
				n = r.Number
			}
		}
		if n == 0 {
			return "", fmt.Errorf("%s has no earlier release; `tutti history %s` lists those it has", name, name)
		}
	}
	var sides [2]map[Ref]string
	for i, number := range []int{n, m} {
		r, err := target(kept, name, number)
		if err != nil {
			return "", err
		}
		a, err := c.Application(ctx, namespace, r)
		if err != nil {
			return "", err
		}
		if sides[i], err = texts(a.Objects); err != nil {
			return "", err
		}
	}
	return compare(sides[0], sides[1], n, m)
}

func noneDeployed(name string) error {
	return fmt.Errorf("no release of %s is deployed; `tutti history %s` lists those it has", name, name)
}

// compare goes through the objects of two releases.
func compare(before, after map[Ref]string, n, m int) (string, error) {
	all := maps.Clone(before)
	maps.Copy(all, after)
	refs := slices.SortedFunc(maps.Keys(all), func(a, b Ref) int {
		return strings.Compare(fmt.Sprint(rank(a.Kind)+100, a.Kind, a.Namespace, a.Name), fmt.Sprint(rank(b.Kind)+100, b.Kind, b.Namespace, b.Name))
	})
	var b strings.Builder
	for _, r := range refs {
		text, err := difflib.GetUnifiedDiffString(difflib.UnifiedDiff{
			A: difflib.SplitLines(before[r]), B: difflib.SplitLines(after[r]), Context: 3,
			FromFile: fmt.Sprintf("%s (release %d)", r, n), ToFile: fmt.Sprintf("%s (release %d)", r, m),
		})
		if err != nil {
			return "", err
		}
		b.WriteString(text)
	}
	return b.String(), nil
}

// texts are objects as YAML, secrets by their digests.
func texts(objects []Object) (map[Ref]string, error) {
	out := map[Ref]string{}
	for _, o := range objects {
		u := o.DeepCopy()
		if o.GetKind() == "Secret" {
			for _, field := range []string{"data", "stringData"} {
				content, _, _ := unstructured.NestedMap(u.Object, field)
				for k, v := range content {
					sum := sha256.Sum256([]byte(fmt.Sprint(v)))
					content[k] = "sha256:" + hex.EncodeToString(sum[:5])
				}
				if len(content) > 0 {
					u.Object[field] = content
				}
			}
		}
		text, err := sigsyaml.Marshal(u.Object)
		if err != nil {
			return nil, err
		}
		out[refOf(o)] = string(text)
	}
	return out, nil
}

// Export is an application as it was released, as YAML that any cluster runs;
// number 0 is what is deployed now.
func (c *Cluster) Export(ctx context.Context, namespace, name string, number int) (string, error) {
	kept, err := c.Releases(ctx, namespace, name)
	if err != nil {
		return "", err
	}
	if now := current(kept); number == 0 && now != nil {
		number = now.Number
	}
	r, err := target(kept, name, number)
	if err != nil {
		return "", err
	}
	a, err := c.Application(ctx, namespace, r)
	if err != nil {
		return "", err
	}
	p, err := c.plan(ctx, a, namespace) // in order, each with its namespace
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, o := range p.objects {
		text, err := sigsyaml.Marshal(o.Object)
		if err != nil {
			return "", err
		}
		b.WriteString("---\n")
		b.Write(text)
	}
	return b.String(), nil
}

// Whoami is who the cluster takes this client for.
func (c *Cluster) Whoami(ctx context.Context) (string, error) {
	r, err := c.clients.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return "", fmt.Errorf("ask the cluster who deploys: %w", err)
	}
	return r.Status.UserInfo.Username, nil
}
