package registry_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// attach pushes a manifest that belongs to another, as those who sign do: by
// its digest, without a tag.
func (s served) attach(t *testing.T, repository string, subject digest.Digest, artifact string) digest.Digest {
	t.Helper()
	config := []byte("{}")
	c := s.blob(t, "ed", repository, config)
	if artifact != "" {
		artifact = fmt.Sprintf(`"artifactType":%q,`, artifact)
	}
	text := fmt.Appendf(nil, `{"schemaVersion":2,"mediaType":%q,%s"config":{"mediaType":"test/config","digest":%q,"size":2},"layers":[],`+
		`"subject":{"mediaType":%[1]q,"digest":%[4]q,"size":1},"annotations":{"by":"test"}}`, ociManifest, artifact, c, subject)
	d := digest.FromBytes(text)
	header, _ := s.want(t, 201, "ed", http.MethodPut, "/v2/"+repository+"/manifests/"+d.String(), ociManifest, text)
	if got := header.Get("OCI-Subject"); got != subject.String() {
		t.Errorf("OCI-Subject: %q", got)
	}
	return d
}

func TestReferrers(t *testing.T) {
	quiet := 50 * time.Millisecond
	s := serve(t, can("ed get a", "ed update a", "ed delete a", "vi get a"), quiet)
	path := func(d digest.Digest) string { return "/v2/a/web/referrers/" + d.String() }
	// types are the artifacts that refer to a manifest.
	types := func(path string) map[digest.Digest]string {
		t.Helper()
		header, text := s.want(t, 200, "vi", http.MethodGet, path, "", nil)
		var index ocispec.Index
		if err := json.Unmarshal([]byte(text), &index); err != nil || index.MediaType != ocispec.MediaTypeImageIndex || header.Get("Content-Type") != index.MediaType {
			t.Fatalf("%v %s: %v", header, text, err)
		}
		found := map[digest.Digest]string{}
		for _, d := range index.Manifests {
			if d.MediaType != ociManifest || d.Size == 0 || d.Annotations["by"] != "test" {
				t.Errorf("%+v", d)
			}
			found[d.Digest] = d.ArtifactType
		}
		return found
	}
	if got := types(path(digest.FromString("nobody has pushed"))); len(got) != 0 {
		t.Errorf("of an empty repository: %v", got)
	}
	header, _ := s.want(t, 200, "vi", http.MethodGet, path(digest.FromString("x"))+"?artifactType=test/sbom", "", nil)
	if header.Get("OCI-Filters-Applied") != "artifactType" {
		t.Errorf("%v", header)
	}
	old, _ := s.push(t, "ed", "a/web", "1", "old")
	image, _ := s.push(t, "ed", "a/web", "1", "new")
	signature, sbom := s.attach(t, "a/web", image, ""), s.attach(t, "a/web", image, "test/sbom")
	countersigned := s.attach(t, "a/web", signature, "test/counter")
	lost := s.attach(t, "a/web", old, "test/lost")
	for what, want := range map[string]map[digest.Digest]string{
		path(image):                             {signature: "test/config", sbom: "test/sbom"},
		path(image) + "?artifactType=test/sbom": {sbom: "test/sbom"},
		path(signature):                         {countersigned: "test/counter"},
		path(old):                               {lost: "test/lost"},
		path(sbom):                              {},
	} {
		if got := types(what); !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", what, got, want)
		}
	}
	for _, c := range []struct {
		user, method, path string
		status             int
	}{
		{"", "GET", path(image), 401},
		{"x", "GET", path(image), 403},
		{"vi", "DELETE", path(image), 405},
		{"vi", "GET", "/v2/a/web/referrers/sha256:word", 400},
		{"vi", "GET", "/v2/web/referrers/" + image.String(), 400},
		{"vi", "GET", "/v2/a/../b/web/referrers/" + image.String(), 400},
		{"vi", "GET", "/v2/up.test/web/referrers/" + image.String(), 404},
	} {
		if status, _, text := s.ask(t, c.user, c.method, c.path, "", nil); status != c.status {
			t.Errorf("%s %s as %q: %d %s, want %d", c.method, c.path, c.user, status, text, c.status)
		}
	}

	// Who removes what has no tag keeps what belongs to what has one.
	if _, err := s.Collect(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	for what, want := range map[string][]digest.Digest{"stays": {image, signature, sbom, countersigned}, "goes": {old, lost}} {
		for _, d := range want {
			status, _, _ := s.ask(t, "vi", http.MethodGet, "/v2/a/web/manifests/"+d.String(), "", nil)
			if stays := status == 200; stays != (what == "stays") {
				t.Errorf("%s %s: %d", d, what, status)
			}
		}
	}
	if got := slices.Sorted(maps.Values(types(path(image)))); !slices.Equal(got, []string{"test/config", "test/sbom"}) {
		t.Errorf("after a collection: %v", got)
	}
}
