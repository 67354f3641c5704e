package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	criapi "k8s.io/cri-api/pkg/apis"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-client/pkg/logs"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	_ "k8s.io/kubernetes/pkg/apis/core/install" // knows how to read PodLogOptions from a query
	"k8s.io/kubernetes/pkg/apis/core/v1/validation"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/runtime"
)

// LogFile is where the log of one run of a container of the pod is, below the
// data directory dir.
func LogFile(dir string, pod *v1.Pod, container string, attempt int) string {
	return filepath.Join(dir, "logs", fmt.Sprintf("%s_%s_%s", pod.Namespace, pod.Name, pod.UID), container, fmt.Sprintf("%d.log", attempt))
}

func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	pod := s.pod(w, r)
	if pod == nil {
		return
	}
	container := r.PathValue("container")
	if !hasContainer(pod, container) {
		http.Error(w, fmt.Sprintf("container %q not found in pod %q", container, pod.Name), http.StatusNotFound)
		return
	}
	query := r.URL.Query()
	if tail := query.Get("tail"); tail == "all" {
		query.Del("tailLines")
	} else if tail != "" {
		query.Set("tailLines", tail)
	}
	options := &v1.PodLogOptions{}
	if err := legacyscheme.ParameterCodec.DecodeParameters(query, v1.SchemeGroupVersion, options); err != nil {
		http.Error(w, fmt.Sprintf("unable to decode the query: %v", err), http.StatusBadRequest)
		return
	}
	if options.Stream == nil {
		options.Stream = ptr.To(v1.LogStreamAll)
	}
	if errs := validation.ValidatePodLogOptions(options); len(errs) > 0 {
		http.Error(w, errs.ToAggregate().Error(), http.StatusUnprocessableEntity)
		return
	}
	attempt, err := attemptOfLog(pod, container, options.Previous)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	file := LogFile(s.cfg.Dir, pod, container, attempt)
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		http.Error(w, fmt.Sprintf("the log of container %q in pod %q is no longer on the node", container, pod.Name), http.StatusBadRequest)
		return
	}

	flush, ok := w.(http.Flusher)
	if !ok {
		http.Error(w, "cannot stream on this connection", http.StatusInternalServerError)
		return
	}
	// A follower wants to know at once that it is connected.
	w.Header().Set("Content-Type", "text/plain")
	w.WriteHeader(http.StatusOK)
	flush.Flush()
	var stdout, stderr io.Writer
	out := flushWriter{w, flush}
	if *options.Stream != v1.LogStreamStderr {
		stdout = out
	}
	if *options.Stream != v1.LogStreamStdout {
		stderr = out
	}
	read := &logs.LogOptions{
		TailLines: options.TailLines, LimitBytes: options.LimitBytes,
		Follow: options.Follow, Timestamp: options.Timestamps,
	}
	if options.SinceSeconds != nil {
		read.Since = time.Now().Add(-time.Duration(*options.SinceSeconds) * time.Second)
	} else if options.SinceTime != nil {
		read.Since = options.SinceTime.Time
	}
	id := runtime.ID{Pod: string(pod.UID), Name: container, Attempt: attempt}
	err = logs.ReadLogs(r.Context(), file, id.String(), read, running{pods: s.cfg.Pods, id: id}, stdout, stderr)
	if err != nil && r.Context().Err() == nil {
		s.cfg.Log.Info("reading a log ended early", "namespace", pod.Namespace, "pod", pod.Name, "container", container, "error", err)
	}
}

func hasContainer(pod *v1.Pod, name string) bool {
	found := false
	podutil.VisitContainers(&pod.Spec, podutil.AllContainers, func(c *v1.Container, _ podutil.ContainerType) bool {
		found = found || c.Name == name
		return !found
	})
	return found
}

// attemptOfLog tells which run is meant: the newest that has run, or the one
// before. The text of an error is meant for the user.
func attemptOfLog(pod *v1.Pod, container string, previous bool) (int, error) {
	var status v1.ContainerStatus
	found := false
	for _, list := range [][]v1.ContainerStatus{pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses} {
		if status, found = podutil.GetContainerStatus(list, container); found {
			break
		}
	}
	if !found {
		return 0, fmt.Errorf("container %q in pod %q is not available", container, pod.Name)
	}
	last := ""
	if status.LastTerminationState.Terminated != nil {
		last = status.LastTerminationState.Terminated.ContainerID
	}
	id := ""
	switch state := status.State; {
	case previous:
		if id = last; id == "" {
			return 0, fmt.Errorf("previous terminated container %q in pod %q not found", container, pod.Name)
		}
	case state.Running != nil:
		id = status.ContainerID
	case state.Terminated != nil:
		if id = state.Terminated.ContainerID; id == "" {
			id = last
		}
		if id == "" {
			return 0, fmt.Errorf("container %q in pod %q is terminated", container, pod.Name)
		}
	case last != "":
		id = last
	case state.Waiting != nil:
		reason := state.Waiting.Reason
		switch reason {
		case "ErrImagePull":
			reason = "image can't be pulled"
		case "ImagePullBackOff":
			reason = "trying and failing to pull image"
		}
		return 0, fmt.Errorf("container %q in pod %q is waiting to start: %v", container, pod.Name, reason)
	default:
		return 0, fmt.Errorf("container %q in pod %q is waiting to start - no logs yet", container, pod.Name)
	}
	attempt, err := strconv.Atoi(id[strings.LastIndex(id, "_")+1:])
	if err != nil {
		return 0, fmt.Errorf("container %q in pod %q has the unknown ID %q", container, pod.Name, id)
	}
	return attempt, nil
}

// running is all of a CRI runtime that the reader of logs asks: whether the
// writer still runs.
type running struct {
	criapi.RuntimeService
	pods Pods
	id   runtime.ID
}

func (r running) ContainerStatus(context.Context, string, bool) (*cri.ContainerStatusResponse, error) {
	state := cri.ContainerState_CONTAINER_EXITED
	status, err := r.pods.Find(types.UID(r.id.Pod), r.id.Name)
	if err == nil && status.ID == r.id && status.State == runtime.Running {
		state = cri.ContainerState_CONTAINER_RUNNING
	}
	return &cri.ContainerStatusResponse{Status: &cri.ContainerStatus{State: state}}, nil
}

// flushWriter sends each line when it comes.
type flushWriter struct {
	io.Writer
	flusher http.Flusher
}

func (w flushWriter) Write(p []byte) (int, error) {
	n, err := w.Writer.Write(p)
	w.flusher.Flush()
	return n, err
}
