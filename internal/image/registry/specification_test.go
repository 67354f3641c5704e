package registry_test

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// The cases of the distribution specification on which clients build. The
// specification's own suite, which docs/registry.md tells how to run, has all.
func TestSpecification(t *testing.T) {
	s := serve(t, can("ed get a", "ed update a", "ed delete a"), time.Hour)
	// send is one request with a header of its own.
	send := func(method, path, header, value, body string) *http.Response {
		t.Helper()
		if strings.HasPrefix(path, "/") {
			path = s.URL + path
		}
		req, err := http.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.SetBasicAuth("ed", "ed")
		req.Header.Set("Accept", ociManifest)
		req.Header.Set("Content-Type", "application/octet-stream")
		if header != "" {
			req.Header.Set(header, value)
		}
		resp, err := s.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		return resp
	}
	manifest, layer := s.push(t, "ed", "a/web", "1", "hello, world")
	s.push(t, "ed", "a/web", "2", "hello, world")
	s.push(t, "ed", "a/web", "10", "other")
	manifests, blob := "/v2/a/web/manifests/", "/v2/a/web/blobs/"+layer.String()

	t.Run("pull", func(t *testing.T) {
		for _, path := range []string{manifests + "1", manifests + manifest.String(), blob} {
			want := manifest
			if path == blob {
				want = layer
			}
			if r := send("HEAD", path, "", "", ""); r.StatusCode != 200 || r.Header.Get("Docker-Content-Digest") != want.String() || r.ContentLength <= 0 {
				t.Errorf("HEAD %s: %s %v", path, r.Status, r.Header)
			}
		}
		if r := send("GET", blob, "Range", "bytes=7-", ""); r.StatusCode != 206 || r.ContentLength != int64(len("world")) {
			t.Errorf("a range: %s, %d bytes", r.Status, r.ContentLength)
		}
	})

	t.Run("push in pieces", func(t *testing.T) {
		upload := send("POST", "/v2/a/web/blobs/uploads/", "", "", "").Header.Get("Location")
		first := send("PATCH", upload, "Content-Range", "0-3", "0123")
		if first.StatusCode != 202 || first.Header.Get("Range") != "0-3" {
			t.Errorf("first: %s %v", first.Status, first.Header)
		}
		if r := send("PATCH", first.Header.Get("Location"), "Content-Range", "6-7", "67"); r.StatusCode != 416 {
			t.Errorf("with a gap: %s", r.Status)
		}
		second := send("PATCH", first.Header.Get("Location"), "Content-Range", "4-5", "45")
		whole := digest.FromString("01234567")
		last := second.Header.Get("Location") + "&digest=" + whole.String()
		if r := send("PUT", last, "Content-Range", "6-7", "67"); r.StatusCode != 201 {
			t.Errorf("last: %s", r.Status)
		}
		s.want(t, 200, "ed", "GET", "/v2/a/web/blobs/"+whole.String(), "", nil)
		upload = send("POST", "/v2/a/web/blobs/uploads/", "", "", "").Header.Get("Location")
		if r := send("PUT", upload+"&digest="+whole.String(), "", "", "something else"); r.StatusCode != 400 {
			t.Errorf("not what its digest says: %s", r.Status)
		}
	})

	t.Run("push of what is wrong", func(t *testing.T) {
		_, text := s.want(t, 200, "ed", "GET", manifests+"1", "", nil)
		s.want(t, 400, "ed", "PUT", manifests+digest.FromString("other").String(), ociManifest, []byte(text))
		missing := strings.Replace(text, layer.String(), digest.FromString("not here").String(), 1)
		_, said := s.want(t, 400, "ed", "PUT", manifests+"3", ociManifest, []byte(missing))
		if !strings.Contains(said, "MANIFEST_BLOB_UNKNOWN") {
			t.Errorf("a layer that is not here: %s", said)
		}
	})

	t.Run("tags", func(t *testing.T) {
		header, text := s.want(t, 200, "ed", "GET", "/v2/a/web/tags/list?n=2", "", nil)
		if !strings.Contains(text, `["1","10"]`) || header.Get("Link") != `</v2/a/web/tags/list?last=10&n=2>; rel="next"` {
			t.Errorf("first page: %s %v", text, header)
		}
		if _, text := s.want(t, 200, "ed", "GET", "/v2/a/web/tags/list?last=10&n=2", "", nil); !strings.Contains(text, `["2"]`) {
			t.Errorf("second page: %s", text)
		}
		s.want(t, 404, "ed", "GET", "/v2/a/none/tags/list", "", nil)
	})

	t.Run("delete", func(t *testing.T) {
		s.want(t, 202, "ed", "DELETE", manifests+"1", "", nil)
		s.want(t, 404, "ed", "GET", manifests+"1", "", nil)
		s.want(t, 200, "ed", "GET", manifests+manifest.String(), "", nil) // it has another tag
		s.want(t, 202, "ed", "DELETE", manifests+manifest.String(), "", nil)
		s.want(t, 404, "ed", "GET", manifests+"2", "", nil)
		s.want(t, 202, "ed", "DELETE", blob, "", nil)
		s.want(t, 404, "ed", "GET", blob, "", nil)
		s.want(t, 404, "ed", "DELETE", blob, "", nil)
	})
}
