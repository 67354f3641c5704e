// Package serve is what a node answers on its kubelet port: logs, exec,
// attach, port-forward, the list of pods and what they use. Routes, status
// codes and messages are those of a kubelet, since the API server and clients
// rely on them.
package serve

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-base/metrics"
	kubeletconfig "k8s.io/kubelet/config/v1beta1"
	"k8s.io/kubernetes/pkg/kubelet/metrics/collectors"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/host/hangup"
	"tutti.dev/tutti/internal/runtime"
)

// Pods is what the endpoints ask the agent. All methods are safe for
// concurrent use.
type Pods interface {
	// Pods returns the pods of this node, each with its status as the agent
	// sees it now. The caller does not change them.
	Pods() []*v1.Pod
	// Find returns the newest run of a container of a pod, with the pod's
	// UID, or runtime.ErrNotFound.
	Find(pod types.UID, container string) (runtime.Status, error)
	// NetNS is the path of the pod's network namespace, "" for the machine's.
	// It is an error while a pod that has one of its own is not attached.
	NetNS(pod types.UID) (string, error)
}

// Workloads is what the endpoints do with a pod's containers, as
// runtime.Runtime has it, whichever of the node's runtimes they are of.
type Workloads interface {
	Exec(ctx context.Context, id runtime.ID, e runtime.Exec) (code int, err error)
	Attach(ctx context.Context, id runtime.ID, s runtime.Streams) error
	Stats(ctx context.Context, id runtime.ID) (runtime.Stats, error)
}

// Config is what a Server works with.
type Config struct {
	NodeName string
	Pods     Pods
	Runtime  Workloads
	// Flows are who talks to whom on this node, read anew at each call.
	Flows func() ([]api.Flow, error)
	Dir   string // data directory; logs are below Dir/logs
	// Certificate returns the node's serving certificate as it is now.
	Certificate func() (*tls.Certificate, error)
	// ClientCA signs the certificates of clients, PEM.
	ClientCA []byte
	// Client asks who a token belongs to and what its owner may do, with the
	// node's identity.
	Client kubernetes.Interface
	// Configuration is what the node tells of itself in a kubelet's words.
	Configuration kubeletconfig.KubeletConfiguration
	Log           *slog.Logger // may be nil
}

// nodeLogs is what /logs/ shows of the machine, as a kubelet does.
const nodeLogs = "/var/log"

// Server answers on the kubelet port.
type Server struct {
	Usage
	cfg     Config
	handler http.Handler
}

// New returns a Server that does not listen yet.
func New(cfg Config) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	a, err := newAuth(cfg)
	if err != nil {
		return nil, err
	}
	s := &Server{Usage: Usage{NodeName: cfg.NodeName, Pods: cfg.Pods, Runtime: cfg.Runtime, Dir: cfg.Dir}, cfg: cfg}
	s.handler = a.wrap(s.routes())
	return s, nil
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	healthy := func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "ok") }
	mux.HandleFunc("GET /healthz", healthy)
	mux.HandleFunc("GET /healthz/{check}", healthy)
	mux.HandleFunc("GET /pods", s.pods)
	mux.HandleFunc("GET /pods/", s.pods)
	mux.HandleFunc("GET /runningpods/", s.runningPods)
	mux.HandleFunc("GET /containerLogs/{namespace}/{pod}/{container}", s.logs)
	attach, portForward := hangup.Handler(http.HandlerFunc(s.attach)), hangup.Handler(http.HandlerFunc(s.portForward))
	for _, method := range []string{"GET", "POST"} {
		mux.HandleFunc(method+" /exec/{namespace}/{pod}/{container}", s.exec)
		mux.HandleFunc(method+" /exec/{namespace}/{pod}/{uid}/{container}", s.exec)
		// These end with their client. A program of exec goes on without, as
		// under a kubelet, until it ends or finds that nobody listens.
		mux.Handle(method+" /attach/{namespace}/{pod}/{container}", attach)
		mux.Handle(method+" /attach/{namespace}/{pod}/{uid}/{container}", attach)
		mux.Handle(method+" /portForward/{namespace}/{pod}", portForward)
		mux.Handle(method+" /portForward/{namespace}/{pod}/{uid}", portForward)
	}
	mux.HandleFunc("GET /stats/summary", s.summary)
	for path, collector := range map[string]metrics.StableCollector{
		"/metrics":          &kubelet{server: s},
		"/metrics/resource": collectors.NewResourceMetricsCollector(s),
		"/metrics/cadvisor": &containers{server: s},
	} {
		registry := metrics.NewKubeRegistry()
		registry.CustomMustRegister(collector)
		if path == "/metrics" {
			registry.RawMustRegister(process()...)
		}
		mux.Handle("GET "+path, metrics.HandlerFor(registry, metrics.HandlerOpts{ErrorHandling: metrics.ContinueOnError}))
	}
	mux.HandleFunc("GET /configz", s.configz)
	mux.Handle("GET /logs/", http.StripPrefix("/logs/", http.FileServer(http.Dir(nodeLogs))))
	mux.HandleFunc("GET "+api.PathFlows, s.flows)
	return mux
}

// Serve answers on l until ctx ends, then ends every session, closes l and
// returns nil.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	server := &http.Server{
		Handler: s.handler,
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return s.cfg.Certificate() },
			// Verified by the authenticator: a token will do as well.
			ClientAuth: tls.RequestClientCert,
			// Sessions are upgraded connections, which HTTP/2 has not.
			NextProtos: []string{"http/1.1"},
		},
		ReadHeaderTimeout: 30 * time.Second,
		IdleTimeout:       90 * time.Second,
		MaxHeaderBytes:    1 << 20,
		ErrorLog:          slog.NewLogLogger(s.cfg.Log.Handler(), slog.LevelDebug),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	err := server.ServeTLS(l, "", "")
	if errors.Is(err, http.ErrServerClosed) && ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("serve the kubelet endpoints on %s: %w", l.Addr(), err)
}

// pod finds the pod that a request is about and answers if there is none.
func (s *Server) pod(w http.ResponseWriter, r *http.Request) *v1.Pod {
	namespace, name, uid := r.PathValue("namespace"), r.PathValue("pod"), types.UID(r.PathValue("uid"))
	for _, p := range s.cfg.Pods.Pods() {
		if p.Namespace == namespace && p.Name == name && (uid == "" || p.UID == uid) {
			return p
		}
	}
	http.Error(w, fmt.Sprintf("pod %q does not exist", name), http.StatusNotFound)
	return nil
}

// container finds the run that a request is about and answers if there is
// none.
func (s *Server) container(w http.ResponseWriter, r *http.Request) (runtime.ID, bool) {
	pod := s.pod(w, r)
	if pod == nil {
		return runtime.ID{}, false
	}
	status, err := s.cfg.Pods.Find(pod.UID, r.PathValue("container"))
	switch {
	case errors.Is(err, runtime.ErrNotFound):
		http.Error(w, fmt.Sprintf("container not found (%q)", r.PathValue("container")), http.StatusNotFound)
		return runtime.ID{}, false
	case err != nil:
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return runtime.ID{}, false
	case status.State != runtime.Running:
		http.Error(w, fmt.Sprintf("container %q is not running", r.PathValue("container")), http.StatusBadRequest)
		return runtime.ID{}, false
	}
	return status.ID, true
}

func (s *Server) pods(w http.ResponseWriter, _ *http.Request) {
	s.writePods(w, func(*v1.Pod) bool { return true })
}

func (s *Server) runningPods(w http.ResponseWriter, _ *http.Request) {
	s.writePods(w, func(p *v1.Pod) bool { return p.Status.Phase == v1.PodRunning })
}

func (s *Server) writePods(w http.ResponseWriter, which func(*v1.Pod) bool) {
	list := v1.PodList{TypeMeta: metav1.TypeMeta{Kind: "PodList", APIVersion: "v1"}}
	for _, p := range s.cfg.Pods.Pods() {
		if which(p) {
			list.Items = append(list.Items, *p)
		}
	}
	s.writeJSON(w, list)
}

// configz answers with the configuration under the name that a kubelet gives
// it.
func (s *Server) configz(w http.ResponseWriter, _ *http.Request) {
	set, err := k8sruntime.DefaultUnstructuredConverter.ToUnstructured(&s.cfg.Configuration)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	// Durations that are not set would be written as if they were.
	maps.DeleteFunc(set, func(_ string, v any) bool { return v == "0s" })
	s.writeJSON(w, map[string]any{"kubeletconfig": set})
}

// flows answers with who talks to whom: what a kubelet has not.
func (s *Server) flows(w http.ResponseWriter, _ *http.Request) {
	all, err := s.cfg.Flows()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	s.writeJSON(w, all)
}

func (s *Server) writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.cfg.Log.Debug("cannot write an answer", "error", err)
	}
}
