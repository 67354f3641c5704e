// Package registry serves images to whoever the cluster lets in: the OCI
// distribution specification by the distribution project's handlers, on a
// directory of this machine. Who is who, and who may do what, is for Access
// to say; this package knows repositories only.
//
// A repository is called NAMESPACE/NAME. The first part decides who may use
// it, so there are none without. HOST/NAME is a repository of another
// registry, which is mirrored.
package registry

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/distribution/distribution/v3/configuration"
	"github.com/distribution/distribution/v3/registry/api/errcode"
	v2 "github.com/distribution/distribution/v3/registry/api/v2"
	"github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/distribution/distribution/v3/registry/storage/driver/filesystem"
	"github.com/gorilla/mux"
	"github.com/sirupsen/logrus"
)

// Verb is what somebody wants to do with a repository.
type Verb string

// The verbs are those of the Kubernetes API, so that roles can name them.
const (
	Pull   Verb = "get"    // read content and tags
	Push   Verb = "update" // add content, set tags
	Delete Verb = "delete" // remove content or tags
	List   Verb = "list"   // the catalog of all repositories
)

// User is somebody whom Access knows.
type User interface{ GetName() string }

// Access tells who makes a request and what they may do.
type Access interface {
	// Authenticate returns nil for somebody unknown. An error says why
	// credentials could not be judged; the request is refused.
	Authenticate(r *http.Request) (User, error)
	// Allowed is asked for each repository that a request touches. namespace
	// and name are empty for the catalog. Without a namespace, name is that of
	// a registry which is mirrored.
	Allowed(ctx context.Context, user User, verb Verb, namespace, name string) (bool, error)
}

// Options say what is served to whom.
type Options struct {
	Dir    string // holds everything; made at the first push
	Access Access
	// Mirrors are other registries whose images are fetched when somebody
	// asks for them, and kept for a week: the URL of each by the name that
	// images have for it, such as docker.io. They are asked without
	// credentials.
	Mirrors map[string]string
	// Quiet is how long nobody must have pushed before garbage is collected:
	// what a push has sent is garbage until its last request names it. Zero is
	// a minute.
	Quiet time.Duration
	Log   *slog.Logger // nil discards
}

// Registry is an http.Handler. It takes nearly no memory until the first
// request.
type Registry struct {
	dir    string
	access Access
	quiet  time.Duration
	log    *slog.Logger
	router *mux.Router
	app    func() (http.Handler, error)

	mirrors map[string]*mirror // by host

	ctx        context.Context
	stop       context.CancelFunc
	background sync.WaitGroup

	// gate is held for reading by requests that change something, and for
	// writing by a collection.
	gate sync.RWMutex

	mu         sync.Mutex
	changed    time.Time // when the last such request began or ended, or this one began to serve
	collecting bool      // a collection in the background is due
}

// New returns a registry on o.Dir. Close ends it.
func New(o Options) *Registry {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Quiet == 0 {
		o.Quiet = time.Minute
	}
	r := &Registry{dir: o.Dir, access: o.Access, quiet: o.Quiet, log: o.Log, router: v2.Router(), changed: time.Now()}
	r.ctx, r.stop = context.WithCancel(context.Background())
	takeLog.Do(func() {
		logrus.SetOutput(io.Discard)
		logrus.AddHook(forward{r.log})
	})
	r.app = sync.OnceValues(func() (http.Handler, error) { return newApp(r.ctx, r.dir, configuration.Proxy{}) })
	r.mirrors = map[string]*mirror{}
	for host, url := range o.Mirrors {
		r.mirrors[host] = &mirror{host: host, url: url, dir: filepath.Join(o.Dir, "mirrors", host), log: o.Log}
	}
	return r
}

// Close ends what goes on in the background; no request may be under way.
func (r *Registry) Close() {
	for _, m := range r.mirrors {
		if err := m.close(); err != nil {
			r.log.Warn("a mirror did not close", "mirror", m.host, "err", err)
		}
	}
	r.stop()
	r.background.Wait()
}

// newApp sets up distribution's handlers on a directory, with proxy's URL as
// those of a mirror.
func newApp(ctx context.Context, dir string, proxy configuration.Proxy) (_ *handlers.App, err error) {
	// Signs the state of uploads: one that a restart cuts off begins anew.
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return nil, fmt.Errorf("draw a key: %w", err)
	}
	config := &configuration.Configuration{Proxy: proxy, Storage: configuration.Storage{
		"filesystem": {"rootdirectory": dir},
		"delete":     {"enabled": true},
	}}
	config.Catalog.MaxEntries, config.Tags.MaxTags = 1000, 1000 // in one answer
	config.HTTP.Secret = hex.EncodeToString(secret)
	ctx, cancel := context.WithCancel(ctx)
	defer func() { // NewApp has no other way to say it
		if p := recover(); p != nil {
			cancel()
			err = fmt.Errorf("open the registry in %s: %v", dir, p)
		}
	}()
	return handlers.NewApp(ctx, config), nil
}

// ServeHTTP implements http.Handler.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	w.Header().Set("Docker-Distribution-API-Version", "registry/2.0")
	user, err := r.access.Authenticate(req)
	if err != nil {
		r.log.Debug("credentials are refused", "err", err)
	}
	if err != nil || user == nil {
		w.Header().Set("WWW-Authenticate", `Basic realm="tutti"`)
		refuse(w, errcode.ErrorCodeUnauthorized.WithMessage("log in with any user name and a token of the cluster as password"))
		return
	}
	if m := referrersPath.FindStringSubmatch(req.URL.Path); m != nil {
		r.serveReferrers(w, req, user, m[1], m[2])
		return
	}
	var match mux.RouteMatch
	if !r.router.Match(req, &match) || match.Route == nil {
		http.NotFound(w, req)
		return
	}
	route := match.Route.GetName()
	if host, path, ok := mirrored(req, match.Vars["name"]); ok && route != v2.RouteNameBase {
		r.serveMirror(w, req, user, host, path)
		return
	}
	if !r.authorized(w, req, user, route, match.Vars["name"]) {
		return
	}
	app, err := r.app()
	if err != nil {
		r.log.Error("the registry does not work", "err", err)
		refuse(w, errcode.ErrorCodeUnavailable)
		return
	}
	changes := req.Method != http.MethodGet && req.Method != http.MethodHead
	if changes {
		r.gate.RLock()
		defer r.gate.RUnlock()
	}
	if changes || req.Method == http.MethodHead && route == v2.RouteNameBlob { // "need I send this?"
		r.touch()
		defer r.touch()
	}
	if req.Method == http.MethodPut && route == v2.RouteNameManifest {
		tellSubject(w, req)
	}
	app.ServeHTTP(w, req)
	if req.Method == http.MethodDelete && route != v2.RouteNameBlobUploadChunk {
		r.collectLater()
	}
}

// verbs are what methods mean.
var verbs = map[string]Verb{
	http.MethodGet: Pull, http.MethodHead: Pull,
	http.MethodPost: Push, http.MethodPut: Push, http.MethodPatch: Push,
	http.MethodDelete: Delete,
}

// authorized answers the request itself when it is not allowed.
func (r *Registry) authorized(w http.ResponseWriter, req *http.Request, user User, route, repository string) bool {
	verb, ok := verbs[req.Method]
	if !ok {
		refuse(w, errcode.ErrorCodeUnsupported)
		return false
	}
	var namespace, name string
	switch route {
	case v2.RouteNameBase:
		return true
	case v2.RouteNameCatalog:
		verb = List
	default:
		if namespace, name, ok = strings.Cut(repository, "/"); !ok {
			refuse(w, v2.ErrorCodeNameInvalid.WithMessage(fmt.Sprintf("%q has no namespace: call it NAMESPACE/%s", repository, repository)))
			return false
		}
	}
	if route == v2.RouteNameBlobUploadChunk && (verb == Delete || verb == Pull) {
		verb = Push // to give up one's own upload, or to ask how far it is
	}
	if !r.allowed(w, req, user, verb, namespace, name) {
		return false
	}
	if route == v2.RouteNameBlobUpload {
		return r.mount(w, req, user)
	}
	return true
}

func (r *Registry) allowed(w http.ResponseWriter, req *http.Request, user User, verb Verb, namespace, name string) bool {
	ok, err := r.access.Allowed(req.Context(), user, verb, namespace, name)
	switch {
	case err != nil:
		r.log.Warn("cannot decide on a request", "user", user.GetName(), "verb", verb, "namespace", namespace, "err", err)
		refuse(w, errcode.ErrorCodeUnavailable)
		return false
	case !ok && verb == List:
		refuse(w, errcode.ErrorCodeDenied.WithMessage(fmt.Sprintf("%s may not list all repositories", user.GetName())))
	case !ok && namespace == "":
		refuse(w, errcode.ErrorCodeDenied.WithMessage(fmt.Sprintf("%s may not use the mirror of %s", user.GetName(), name)))
	case !ok:
		refuse(w, errcode.ErrorCodeDenied.WithMessage(fmt.Sprintf("%s may not %s repositories in namespace %s", user.GetName(), verb, namespace)))
	}
	return ok
}

// mount looks whether the caller may read the repository from which a blob is
// to be taken. Who may not has to send it, as if it were not there.
func (r *Registry) mount(w http.ResponseWriter, req *http.Request, user User) bool {
	from := req.FormValue("from") // as the handler reads it
	if from == "" {
		return true
	}
	ok := false
	if namespace, name, cut := strings.Cut(from, "/"); cut {
		var err error
		if ok, err = r.access.Allowed(req.Context(), user, Pull, namespace, name); err != nil {
			refuse(w, errcode.ErrorCodeUnavailable)
			return false
		}
	}
	if !ok {
		query := req.URL.Query()
		query.Del("from")
		query.Del("mount")
		req.URL.RawQuery = query.Encode()
		req.Form.Del("from")
		req.Form.Del("mount")
	}
	return true
}

func refuse(w http.ResponseWriter, err error) {
	_ = errcode.ServeJSON(w, err) // the client is gone
}

func (r *Registry) touch() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.changed = time.Now()
}

// collectLater collects when things are quiet.
func (r *Registry) collectLater() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.collecting || r.ctx.Err() != nil {
		return
	}
	r.collecting = true
	r.background.Go(func() {
		_, err := r.collect(r.ctx, false, func() {
			r.mu.Lock()
			r.collecting = false // what is removed from now on is for the next
			r.mu.Unlock()
		})
		if err != nil && !errors.Is(err, context.Canceled) {
			r.log.Error("garbage stays in the registry", "dir", filepath.Clean(r.dir), "err", err)
		}
	})
}

// takeLog makes distribution, which has one log per process, write to the
// first registry's. What clients do wrong is an error to it.
var takeLog sync.Once

type forward struct{ to *slog.Logger }

func (forward) Levels() []logrus.Level {
	return []logrus.Level{logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel, logrus.WarnLevel}
}

func (f forward) Fire(e *logrus.Entry) error {
	f.to.Debug("distribution", "msg", e.Message, "fields", e.Data)
	return nil
}
