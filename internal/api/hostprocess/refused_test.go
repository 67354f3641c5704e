package hostprocess

import (
	"os"
	"regexp"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
)

// Each rule, by what breaks it; docs/process.md has the same messages.
func TestRules(t *testing.T) {
	sysctl := func(name string) v1.PodSpec {
		return v1.PodSpec{SecurityContext: &v1.PodSecurityContext{Sysctls: []v1.Sysctl{{Name: name, Value: "1"}}}}
	}
	container := func(c v1.Container) v1.PodSpec { return v1.PodSpec{Containers: []v1.Container{{}, c}} }
	mounting := func(image string, p v1.MountPropagationMode) v1.Container {
		return v1.Container{Image: image, VolumeMounts: []v1.VolumeMount{{}, {MountPropagation: &p}}}
	}
	readOnly := v1.Container{Image: Image, SecurityContext: &v1.SecurityContext{ReadOnlyRootFilesystem: ptr.To(true)}}
	root := func(value string) map[string]string { return map[string]string{AnnotationRoot: value} }
	const (
		users    = "a process of the host has no users of its own (hostUsers: false); use the RuntimeClass container, or leave hostUsers out and set runAsUser"
		share    = "a process of the host sees every process of the machine, not only its pod's (shareProcessNamespace: true); use the RuntimeClass container, or leave shareProcessNamespace out"
		fqdn     = "a process of the host has the machine's host name (setHostnameAsFQDN: true); use the RuntimeClass container, or give the name in an environment variable"
		override = "a process of the host has the machine's host name (hostnameOverride); use the RuntimeClass container, or give the name in an environment variable"
		sysctls  = "a process of the host has no kernel settings of its own but those of its network (securityContext.sysctls); use the RuntimeClass container, or sysctl on the machine"
		mounts   = "the machine does not see what a process of the host mounts (mountPropagation: Bidirectional); mount it on the machine, or use the RuntimeClass container"
		roots    = "readOnlyRootFilesystem: true contradicts the annotation process.tutti.dev/root; leave one of them out"
	)
	broken := map[string]bool{}
	for name, tt := range map[string]struct {
		annotations map[string]string
		spec        v1.PodSpec
		want        string // a message or, of another's, its beginning
	}{
		"nothing":                          {},
		"host users":                       {spec: v1.PodSpec{HostUsers: ptr.To(true)}},
		"own users":                        {spec: v1.PodSpec{HostUsers: ptr.To(false)}, want: users},
		"processes of its own":             {spec: v1.PodSpec{ShareProcessNamespace: ptr.To(false)}},
		"processes of its pod":             {spec: v1.PodSpec{ShareProcessNamespace: ptr.To(true)}, want: share},
		"processes of the machine":         {spec: v1.PodSpec{HostPID: true, HostIPC: true, HostNetwork: true}},
		"a name in the DNS":                {spec: v1.PodSpec{Hostname: "db-0", Subdomain: "db"}},
		"its full name":                    {spec: v1.PodSpec{SetHostnameAsFQDN: ptr.To(true)}, want: fqdn},
		"another name":                     {spec: v1.PodSpec{HostnameOverride: ptr.To("x")}, want: override},
		"setting of the network":           {spec: sysctl("net.ipv4.ip_unprivileged_port_start")},
		"the same, with slashes":           {spec: sysctl("net/ipv4/ip_unprivileged_port_start")},
		"setting of the machine":           {spec: sysctl("kernel.shm_rmid_forced"), want: sysctls},
		"mounts for the machine":           {spec: container(mounting(Image, v1.MountPropagationBidirectional)), want: mounts},
		"mounts of the machine":            {spec: container(mounting(Image, v1.MountPropagationHostToContainer))},
		"mounts from an image":             {spec: container(mounting("other", v1.MountPropagationBidirectional))},
		"read-only":                        {spec: container(readOnly)},
		"read-only twice":                  {annotations: root(RootReadOnly), spec: container(readOnly)},
		"read-only, and shared":            {annotations: root(RootShared), spec: container(readOnly), want: roots},
		"shared":                           {annotations: root(RootShared), spec: container(v1.Container{Image: Image})},
		"no root":                          {annotations: root("both"), want: `annotation process.tutti.dev/root: "both" is no root; `},
		"in an init container":             {annotations: root(RootOverlay), spec: v1.PodSpec{InitContainers: []v1.Container{readOnly}}, want: roots},
		"in an ephemeral container":        {annotations: root(RootOverlay), spec: v1.PodSpec{EphemeralContainers: []v1.EphemeralContainer{{EphemeralContainerCommon: v1.EphemeralContainerCommon(readOnly)}}}, want: roots},
		"the processes of another of them": {spec: v1.PodSpec{EphemeralContainers: []v1.EphemeralContainer{{TargetContainerName: "main"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := &v1.Pod{Spec: tt.spec}
			p.Annotations = tt.annotations
			err := Check(p)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
			broken[tt.want] = true
		})
	}
	text, err := os.ReadFile("../../../docs/process.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## What is refused\n")
	section, _, _ = strings.Cut(section, "\n## ")
	told := map[string]string{}
	for _, m := range regexp.MustCompile("(?m)^\\| (.+) \\| `(.+)` \\|$").FindAllStringSubmatch(section, -1) {
		told[m[1]] = m[2]
	}
	for _, r := range Rules {
		if !broken[r.Message] {
			t.Errorf("no pod here breaks the rule on %s", r.Asked)
		}
		if told[r.Asked] != r.Message {
			t.Errorf("docs/process.md says of %s %q, the code %q", r.Asked, told[r.Asked], r.Message)
		}
		delete(told, r.Asked)
	}
	if len(told) > 0 {
		t.Errorf("docs/process.md tells of refusals that there are not: %q", told)
	}
}
