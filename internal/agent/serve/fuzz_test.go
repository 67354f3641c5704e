package serve

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	v1 "k8s.io/api/core/v1"
)

// FuzzLogs asks for a log as it may be after a crash, with a query that
// nobody would write. What is answered holds no more than was asked for.
func FuzzLogs(f *testing.F) {
	const line = "2026-01-01T00:00:00.000000001Z stdout F hello\n"
	for _, query := range []string{"", "tailLines=1", "tail=all", "tail=-1", "limitBytes=3", "limitBytes=0", "timestamps=true", "sinceSeconds=1", "sinceTime=2026-01-01T00:00:00Z",
		"stream=Stderr", "tailLines=9223372036854775807", "previous=yes", "sinceSeconds=-1&sinceTime=x", "tailLines=2&timestamps=1&limitBytes=40"} {
		f.Add([]byte(line+line), query)
	}
	for _, log := range []string{"", "\n", line[:20], line[:len(line)-1], "2026-01-01T00:00:00Z stdout", "2026-01-01T00:00:00Z stdout P half\n" + line,
		`{"log":"of docker\n","stream":"stdout","time":"2026-01-01T00:00:00Z"}` + "\n", "2026-01-01T00:00:00Z nowhere F x\n", "\xff\x00\n" + line,
		"2026-01-01T00:00:00Z stderr P:F x\n", "9999999-01-01T00:00:00Z stdout F x\n", strings.Repeat("x", 20<<10)} {
		f.Add([]byte(log), "tailLines=1")
	}
	pod := testPod()
	s := &Server{cfg: Config{Dir: f.TempDir(), Pods: &host{pods: []*v1.Pod{pod}}, Log: slog.New(slog.DiscardHandler)}}
	file := LogFile(s.cfg.Dir, pod, "c", 1)
	must(f, os.MkdirAll(filepath.Dir(file), 0o755))
	f.Fuzz(func(t *testing.T, log []byte, query string) {
		asked, err := url.ParseQuery(query)
		if err != nil || asked.Has("follow") {
			t.Skip("no query, or one without an end")
		}
		must(t, os.WriteFile(file, log, 0o600))
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.URL.RawQuery = asked.Encode()
		for part, value := range map[string]string{"namespace": pod.Namespace, "pod": pod.Name, "container": "c"} {
			r.SetPathValue(part, value)
		}
		w := httptest.NewRecorder()
		s.logs(w, r)
		body := w.Body.Bytes()
		if w.Code != http.StatusOK {
			if len(body) == 0 || !utf8.Valid(body) && utf8.ValidString(query) {
				t.Errorf("%d: %q", w.Code, body)
			}
			return
		}
		// Of a key that is given twice the first counts.
		if most, err := strconv.Atoi(asked.Get("limitBytes")); err == nil && len(body) > most {
			t.Errorf("%d bytes, asked for %d: %q", len(body), most, body)
		}
		if len(body) > 2*len(log)+64 && asked.Get("timestamps") == "" {
			t.Errorf("%d bytes of a log of %d", len(body), len(log))
		}
	})
}
