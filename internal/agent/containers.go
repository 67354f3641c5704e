package agent

import (
	"context"
	"iter"
	"os"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/cri-client/pkg/logs"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/runtime"
)

type containerKind int

const (
	regularContainer containerKind = iota
	initContainer
	sidecarContainer
	ephemeralContainer
)

// containersOf goes through all containers of a pod.
func containersOf(p *v1.Pod) iter.Seq2[*v1.Container, containerKind] {
	return func(yield func(*v1.Container, containerKind) bool) {
		for i := range p.Spec.InitContainers {
			c, kind := &p.Spec.InitContainers[i], initContainer
			if podutil.IsRestartableInitContainer(c) {
				kind = sidecarContainer
			}
			if !yield(c, kind) {
				return
			}
		}
		for i := range p.Spec.Containers {
			if !yield(&p.Spec.Containers[i], regularContainer) {
				return
			}
		}
		for i := range p.Spec.EphemeralContainers {
			if !yield((*v1.Container)(&p.Spec.EphemeralContainers[i].EphemeralContainerCommon), ephemeralContainer) {
				return
			}
		}
	}
}

func containerOf(p *v1.Pod, name string) (*v1.Container, containerKind) {
	for c, kind := range containersOf(p) {
		if c.Name == name {
			return c, kind
		}
	}
	return nil, regularContainer
}

func graceOf(p *v1.Pod) time.Duration {
	if s := p.Spec.TerminationGracePeriodSeconds; s != nil {
		return time.Duration(*s) * time.Second
	}
	return v1.DefaultTerminationGracePeriodSeconds * time.Second
}

const (
	// labelTerminationLog is where, on this machine, a workload may leave a
	// word about its end.
	labelTerminationLog = "tutti.dev/termination-log"

	// What an end may tell, as in a kubelet.
	messageBytes    = 4096
	messageLogBytes = 2048
	messageLogLines = 80
)

func terminationLog(c *v1.Container, mounts []runtime.Mount) string {
	for _, m := range mounts {
		if m.Target == c.TerminationMessagePath {
			return m.Source
		}
	}
	return ""
}

// readMessage adds to an ended run what its container left to say.
func (x *actor) readMessage(r *pod.Run) {
	if r.State != runtime.Exited || r.Message != "" {
		return
	}
	if path := r.Labels[labelTerminationLog]; path != "" {
		r.Message = tail(path, messageBytes)
	}
	c, _ := containerOf(x.pod(), r.Name)
	if r.Message == "" && c != nil && c.TerminationMessagePolicy == v1.TerminationMessageFallbackToLogsOnError && r.ExitCode != 0 && r.Log != "" {
		r.Message = lastLines(r.Log)
	}
}

// tail reads the end of a file; a file that cannot be read says nothing.
func tail(path string, most int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return ""
	} else if st.Size() > most {
		if _, err := f.Seek(-most, 2); err != nil {
			return ""
		}
	}
	b := make([]byte, most)
	n, _ := f.Read(b)
	return string(b[:n])
}

// lastLines reads the end of a container's log.
func lastLines(path string) string {
	lines := int64(messageLogLines)
	var b strings.Builder
	opts := logs.NewLogOptions(&v1.PodLogOptions{TailLines: &lines}, time.Now())
	if err := logs.ReadLogs(context.Background(), path, "", opts, nil, &b, &b); err != nil {
		return ""
	}
	s := b.String()
	return s[max(0, len(s)-messageLogBytes):]
}
