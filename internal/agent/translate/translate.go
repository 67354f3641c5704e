// Package translate says in the runtime's and the network's words what a
// Kubernetes pod asks for. It is pure: the same pod gives the same words.
package translate

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/signal"
	v1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/node/util/sysctl"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/qos"
	"k8s.io/kubernetes/pkg/kubelet/util/format"
	"k8s.io/kubernetes/pkg/security/apparmor"
	"k8s.io/kubernetes/pkg/securitycontext"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/image"
	"tutti.dev/tutti/internal/network"
	"tutti.dev/tutti/internal/runtime"
)

// defaultCapabilities are those that container engines give to a program
// that asks for nothing.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD",
	"CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// Machine is what translation needs to know of this machine.
type Machine struct {
	MemoryBytes int64
	// DataDir holds logs/ and, in seccomp/, the profiles that pods may name.
	DataDir string
}

// Pod translates what the workloads of a pod share. netns is the path of its
// pinned network namespace, "" for the machine's.
func Pod(p *v1.Pod, hostname, netns string) runtime.Pod {
	return runtime.Pod{
		ID:       string(p.UID),
		Hostname: hostname,
		NetNS:    netns,
		HostIPC:  p.Spec.HostIPC,
		HostPID:  p.Spec.HostPID,
		SharePID: p.Spec.ShareProcessNamespace != nil && *p.Spec.ShareProcessNamespace,
		Cgroup:   Cgroup(p), Resources: PodResources(p),
		Sysctls: sysctls(p),
	}
}

// sysctls are the pod's own, over those that let any user bind low ports and
// ping, as container engines do: the pod's network is its own.
func sysctls(p *v1.Pod) map[string]string {
	s := map[string]string{}
	if !p.Spec.HostNetwork {
		s["net.ipv4.ip_unprivileged_port_start"] = "0"
		s["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	if sc := p.Spec.SecurityContext; sc != nil {
		for _, c := range sc.Sysctls {
			s[sysctl.NormalizeName(c.Name)] = c.Value
		}
	}
	return s
}

// Network translates the pod's network and host ports.
func Network(p *v1.Pod) (network.Pod, error) {
	n := network.Pod{ID: string(p.UID)}
	for c := range podutil.ContainerIter(&p.Spec, podutil.InitContainers|podutil.Containers) {
		for _, port := range c.Ports {
			if port.HostPort == 0 {
				continue
			}
			h := network.HostPort{HostPort: uint16(port.HostPort), PodPort: uint16(port.ContainerPort), Protocol: strings.ToLower(string(port.Protocol))}
			if h.Protocol == "" {
				h.Protocol = "tcp"
			}
			if port.HostIP != "" {
				ip, err := netip.ParseAddr(port.HostIP)
				if err != nil {
					return n, fmt.Errorf("host port %d of container %s: %w", port.HostPort, c.Name, err)
				}
				if !ip.IsUnspecified() {
					h.HostIP = ip
				}
			}
			n.Ports = append(n.Ports, h)
		}
	}
	return n, nil
}

// Input is what a workload is made of besides the pod's specification.
type Input struct {
	Pod       *v1.Pod
	Container *v1.Container
	Attempt   int
	Round     int // how often all containers of the pod were restarted
	Image     image.Image
	ImageID   string // repository@digest
	Ground    string // what the runtime calls the pod's
	Layers    []string
	Args, Env []string
	Mounts    []runtime.Mount
	Devices   []runtime.Device
	// JoinPID is the run whose processes an ephemeral container asks to see.
	JoinPID *runtime.ID
	// Process says that it is to be a process of the machine, OnMachine that
	// it has the machine's file system too.
	Process, OnMachine bool
}

// Workload translates one run of a container. The text of an error is meant
// for the pod's owner (reason CreateContainerConfigError).
func Workload(in Input, m Machine) (runtime.Workload, error) {
	p, c := in.Pod, in.Container
	sc := securitycontext.DetermineEffectiveSecurityContext(p, c)
	user, err := userOf(p, c, sc, in.Image.Config.User)
	if err != nil {
		return runtime.Workload{}, err
	}
	stop, err := StopSignal(c, in.Image.Config)
	if err != nil {
		return runtime.Workload{}, err
	}
	seccomp, err := seccompOf(p, c, m)
	if err != nil {
		return runtime.Workload{}, err
	}
	dir := c.WorkingDir
	if dir == "" {
		dir = in.Image.Config.WorkingDir
	}
	oom := qos.GetContainerOOMScoreAdjust(p, c, m.MemoryBytes)
	w := runtime.Workload{
		ID:              runtime.ID{Pod: string(p.UID), Name: c.Name, Attempt: in.Attempt},
		Layers:          in.Layers,
		ReadOnlyRoot:    isTrue(sc.ReadOnlyRootFilesystem),
		Args:            in.Args,
		Env:             in.Env,
		Dir:             dir,
		User:            user,
		Groups:          groups(p),
		OnlyGroups:      onlyGroups(p),
		RequireNonRoot:  isTrue(sc.RunAsNonRoot),
		Privileged:      isTrue(sc.Privileged),
		Capabilities:    capabilities(sc.Capabilities),
		NoNewPrivileges: securitycontext.AddNoNewPrivileges(sc),
		Seccomp:         seccomp,
		AppArmor:        appArmor(p, c),
		Unmasked:        sc.ProcMount != nil && *sc.ProcMount == v1.UnmaskedProcMount,
		Mounts:          in.Mounts,
		Devices:         in.Devices,
		Resources:       ContainerResources(p, c),
		OOMScoreAdj:     &oom,
		JoinPID:         in.JoinPID,
		Log:             Log(m.DataDir, p.Namespace, p.Name, string(p.UID), c.Name, in.Attempt),
		TTY:             c.TTY,
		Stdin:           c.Stdin,
		StdinOnce:       c.StdinOnce,
		StopSignal:      stop,
		Labels:          Labels(p, c, in.ImageID, in.Ground, in.Round),
	}
	if w.Privileged {
		w.Seccomp = "" // as every container engine has it
	}
	if in.Process {
		return process(w, in)
	}
	return w, nil
}

// Labels are kept with a workload and tell what was asked for at its start.
func Labels(p *v1.Pod, c *v1.Container, imageID, ground string, round int) map[string]string {
	l := map[string]string{
		pod.LabelNamespace: p.Namespace,
		pod.LabelPod:       p.Name,
		pod.LabelImage:     c.Image,
		pod.LabelImageID:   imageID,
		pod.LabelResources: pod.ResourceKey(p, c),
	}
	if ground != "" {
		l[pod.LabelGround] = ground
	}
	if round > 0 {
		l[pod.LabelRound] = strconv.Itoa(round)
	}
	return l
}

// LogDir is where the logs of a pod are.
func LogDir(dataDir, namespace, name, uid string) string {
	return filepath.Join(dataDir, "logs", namespace+"_"+name+"_"+uid)
}

// Log is the log file of one run.
func Log(dataDir, namespace, name, uid, container string, attempt int) string {
	return filepath.Join(LogDir(dataDir, namespace, name, uid), container, strconv.Itoa(attempt)+".log")
}

func isTrue(b *bool) bool { return b != nil && *b }

// userOf says whom to run as and refuses root where the pod does.
func userOf(p *v1.Pod, c *v1.Container, sc *v1.SecurityContext, imageUser string) (string, error) {
	user := imageUser
	if sc.RunAsUser != nil {
		user = strconv.FormatInt(*sc.RunAsUser, 10)
	}
	name, _, _ := strings.Cut(user, ":")
	if isTrue(sc.RunAsNonRoot) {
		uid, err := strconv.ParseInt(name, 10, 64)
		switch {
		case sc.RunAsUser != nil && *sc.RunAsUser == 0:
			return "", fmt.Errorf("container's runAsUser breaks non-root policy (pod: %q, container: %s)", format.Pod(p), c.Name)
		case name == "" || err == nil && uid == 0:
			return "", fmt.Errorf("container has runAsNonRoot and image will run as root (pod: %q, container: %s)", format.Pod(p), c.Name)
		case err != nil:
			return "", fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root (pod: %q, container: %s)", name, format.Pod(p), c.Name)
		}
	}
	if sc.RunAsGroup != nil {
		if name == "" {
			name = "0"
		}
		user = name + ":" + strconv.FormatInt(*sc.RunAsGroup, 10)
	}
	return user, nil
}

func groups(p *v1.Pod) []int64 {
	sc := p.Spec.SecurityContext
	if sc == nil {
		return nil
	}
	g := slices.Clone(sc.SupplementalGroups)
	if sc.FSGroup != nil && !slices.Contains(g, *sc.FSGroup) {
		g = append(g, *sc.FSGroup)
	}
	return g
}

// onlyGroups says whether the image has no say in the groups (KEP-3619).
func onlyGroups(p *v1.Pod) bool {
	sc := p.Spec.SecurityContext
	return sc != nil && sc.SupplementalGroupsPolicy != nil && *sc.SupplementalGroupsPolicy == v1.SupplementalGroupsPolicyStrict
}

// capabilities applies what is added and dropped to the default set. ALL is
// every one that the kernel knows; adding wins over dropping ALL, dropping
// wins over adding ALL.
func capabilities(c *v1.Capabilities) []string {
	if c == nil {
		return slices.Clone(defaultCapabilities)
	}
	all := func(list []v1.Capability) bool { return slices.ContainsFunc(list, isAll) }
	set := map[string]bool{}
	switch {
	case all(c.Add):
		for _, k := range capability.ListKnown() {
			set["CAP_"+strings.ToUpper(k.String())] = true
		}
	case !all(c.Drop):
		for _, k := range defaultCapabilities {
			set[k] = true
		}
	}
	if !all(c.Add) {
		for _, k := range c.Add {
			set[capabilityName(k)] = true
		}
	}
	if !all(c.Drop) {
		for _, k := range c.Drop {
			delete(set, capabilityName(k))
		}
	}
	list := make([]string, 0, len(set))
	for k := range set {
		list = append(list, k)
	}
	slices.Sort(list)
	return list
}

func isAll(c v1.Capability) bool { return strings.EqualFold(string(c), "ALL") }

func capabilityName(c v1.Capability) string {
	return "CAP_" + strings.TrimPrefix(strings.ToUpper(string(c)), "CAP_")
}

// seccompOf is the profile of a container: the runtime's default unless the
// pod asks otherwise.
func seccompOf(p *v1.Pod, c *v1.Container, m Machine) (string, error) {
	var s *v1.SeccompProfile
	if p.Spec.SecurityContext != nil {
		s = p.Spec.SecurityContext.SeccompProfile
	}
	if c.SecurityContext != nil && c.SecurityContext.SeccompProfile != nil {
		s = c.SecurityContext.SeccompProfile
	}
	switch {
	case s == nil || s.Type == v1.SeccompProfileTypeRuntimeDefault:
		return "default", nil
	case s.Type == v1.SeccompProfileTypeUnconfined:
		return "", nil
	case s.Type == v1.SeccompProfileTypeLocalhost && s.LocalhostProfile != nil && filepath.IsLocal(*s.LocalhostProfile):
		return filepath.Join(m.DataDir, "seccomp", *s.LocalhostProfile), nil
	}
	return "", fmt.Errorf("seccomp profile of type %s cannot be used", s.Type)
}

// appArmor is the profile of a container in the runtime's words. Admission has
// seen to it that one that is asked for can be had.
func appArmor(p *v1.Pod, c *v1.Container) string {
	switch profile := apparmor.GetProfile(p, c); {
	case profile == nil:
		return ""
	case profile.Type == v1.AppArmorProfileTypeLocalhost && profile.LocalhostProfile != nil:
		return *profile.LocalhostProfile
	case profile.Type == v1.AppArmorProfileTypeUnconfined:
		return "unconfined"
	}
	return "default"
}

// StopSignal is what asks a container to end: the pod's wish, the image's, or
// SIGTERM.
func StopSignal(c *v1.Container, img image.Config) (syscall.Signal, error) {
	name := img.StopSignal
	if c.Lifecycle != nil && c.Lifecycle.StopSignal != nil {
		name = string(*c.Lifecycle.StopSignal)
	}
	if name == "" {
		return syscall.SIGTERM, nil
	}
	s, err := signal.ParseSignal(name)
	if err != nil {
		return 0, fmt.Errorf("stop signal of container %s: %w", c.Name, err)
	}
	return s, nil
}
