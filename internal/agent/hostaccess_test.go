package agent

import (
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/runtime"
)

// The agent does not take admission's word for it.
func TestMayRun(t *testing.T) {
	process, container := machineRuntime{newMachine()}, machineRuntime{newMachine()}
	namespace := func(name string, labels map[string]string) *v1.Namespace {
		return &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	}
	a := &Agent{
		Config: Config{Runtimes: map[string]runtime.Runtime{"": container, "container": container, hostprocess.Handler: process}},
		client: fake.NewClientset(namespace("closed", nil), namespace("open", map[string]string{hostprocess.LabelAllow: "true"})),
		static: map[types.UID]bool{"static": true},
	}
	const closed = `namespace "closed" may not run processes of the host; label it tutti.dev/allow-host=true, or leave runtimeClassName out`
	says := map[string]string{"kubernetes.io/config.source": "file"}
	for name, tt := range map[string]struct {
		rt   runtime.Runtime
		in   string
		uid  types.UID
		says map[string]string
		spec v1.PodSpec
		want string
	}{
		"container":              {rt: container, in: "closed"},
		"process":                {rt: process, in: "closed", want: closed},
		"process, allowed":       {rt: process, in: "open"},
		"process of nowhere":     {rt: process, in: "nowhere", want: "look up whether the namespace may run processes of the host: "},
		"static":                 {rt: process, in: "closed", uid: "static"},
		"says that it is static": {rt: process, in: "closed", says: says, want: closed},
		"asks for too much":      {rt: process, in: "open", spec: v1.PodSpec{HostUsers: ptr.To(false)}, want: "a process of the host has no users of its own"},
		"static, for too much":   {rt: process, in: "closed", uid: "static", spec: v1.PodSpec{HostUsers: ptr.To(false)}, want: "a process of the host has no users of its own"},
	} {
		t.Run(name, func(t *testing.T) {
			err := a.mayRun(t.Context(), &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: tt.in, UID: tt.uid, Annotations: tt.says}, Spec: tt.spec}, tt.rt)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}
