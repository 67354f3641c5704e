package hostprocess

import (
	"errors"
	"iter"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
)

// A Rule is something that a pod can ask for and no process of the host can
// have.
type Rule struct {
	// Asked is where it stands, as docs/process.md has it.
	Asked string
	// Message says why it cannot be had and what to use instead.
	Message string
	asks    func(*v1.Pod) bool
}

// Rules are all that Check knows, in the order in which it looks.
var Rules = []Rule{
	{
		Asked:   "`hostUsers: false`",
		Message: "a process of the host has no users of its own (hostUsers: false); use the RuntimeClass container, or leave hostUsers out and set runAsUser",
		asks:    func(p *v1.Pod) bool { return p.Spec.HostUsers != nil && !*p.Spec.HostUsers },
	},
	{
		Asked:   "`shareProcessNamespace: true`",
		Message: "a process of the host sees every process of the machine, not only its pod's (shareProcessNamespace: true); use the RuntimeClass container, or leave shareProcessNamespace out",
		asks:    func(p *v1.Pod) bool { return p.Spec.ShareProcessNamespace != nil && *p.Spec.ShareProcessNamespace },
	},
	{
		Asked:   "`setHostnameAsFQDN: true`",
		Message: "a process of the host has the machine's host name (setHostnameAsFQDN: true); use the RuntimeClass container, or give the name in an environment variable",
		asks:    func(p *v1.Pod) bool { return p.Spec.SetHostnameAsFQDN != nil && *p.Spec.SetHostnameAsFQDN },
	},
	{
		Asked:   "`hostnameOverride`",
		Message: "a process of the host has the machine's host name (hostnameOverride); use the RuntimeClass container, or give the name in an environment variable",
		asks:    func(p *v1.Pod) bool { return p.Spec.HostnameOverride != nil },
	},
	{
		Asked:   "`securityContext.sysctls` other than `net.…`",
		Message: "a process of the host has no kernel settings of its own but those of its network (securityContext.sysctls); use the RuntimeClass container, or sysctl on the machine",
		asks: func(p *v1.Pod) bool {
			return p.Spec.SecurityContext != nil && slices.ContainsFunc(p.Spec.SecurityContext.Sysctls, func(s v1.Sysctl) bool {
				return !strings.HasPrefix(strings.ReplaceAll(s.Name, "/", "."), "net.")
			})
		},
	},
	{
		Asked:   "`mountPropagation: Bidirectional`, with `image: host`",
		Message: "the machine does not see what a process of the host mounts (mountPropagation: Bidirectional); mount it on the machine, or use the RuntimeClass container",
		asks: inAny(func(p *v1.Pod, c *v1.Container) bool {
			return c.Image == Image && slices.ContainsFunc(c.VolumeMounts, func(m v1.VolumeMount) bool {
				return m.MountPropagation != nil && *m.MountPropagation == v1.MountPropagationBidirectional
			})
		}),
	},
	{
		Asked:   "`readOnlyRootFilesystem: true`, with `image: host` and `" + AnnotationRoot + "` other than `readonly`",
		Message: "readOnlyRootFilesystem: true contradicts the annotation " + AnnotationRoot + "; leave one of them out",
		asks: inAny(func(p *v1.Pod, c *v1.Container) bool {
			root, says := p.Annotations[AnnotationRoot]
			return says && root != RootReadOnly && c.Image == Image && c.SecurityContext != nil &&
				c.SecurityContext.ReadOnlyRootFilesystem != nil && *c.SecurityContext.ReadOnlyRootFilesystem
		}),
	},
}

// Check says what a pod asks for that a process of the host cannot have, or how
// its annotations are wrong, the first thing of several, nil if there is
// nothing.
func Check(p *v1.Pod) error {
	for _, r := range Rules {
		if r.asks(p) {
			return errors.New(r.Message)
		}
	}
	_, err := ParseSettings(p.Annotations)
	return err
}

// inAny is a question that any container may answer with yes.
func inAny(asks func(*v1.Pod, *v1.Container) bool) func(*v1.Pod) bool {
	return func(p *v1.Pod) bool {
		for c := range containers(p) {
			if asks(p, c) {
				return true
			}
		}
		return false
	}
}

// containers are a pod's of all kinds.
func containers(p *v1.Pod) iter.Seq[*v1.Container] {
	return func(yield func(*v1.Container) bool) {
		for _, list := range [][]v1.Container{p.Spec.InitContainers, p.Spec.Containers} {
			for i := range list {
				if !yield(&list[i]) {
					return
				}
			}
		}
		for i := range p.Spec.EphemeralContainers {
			if !yield((*v1.Container)(&p.Spec.EphemeralContainers[i].EphemeralContainerCommon)) {
				return
			}
		}
	}
}
