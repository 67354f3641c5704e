package compose

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// dockerGrace is how long Docker waits after the stop signal.
const dockerGrace = 10 * time.Second

// pod is what a service's pods are; what a pod has no field for is annotated.
func (t *translation) pod(s types.ServiceConfig, annotations map[string]string) (corev1.PodSpec, error) {
	c, err := t.container(s)
	if err != nil {
		return corev1.PodSpec{}, err
	}
	grace := dockerGrace
	if s.StopGracePeriod != nil {
		grace = time.Duration(*s.StopGracePeriod)
	}
	pod := corev1.PodSpec{
		Hostname:                      s.Hostname,
		TerminationGracePeriodSeconds: ptr.To(int64(seconds(grace))),
		EnableServiceLinks:            ptr.To(false),
		AutomountServiceAccountToken:  ptr.To(false),
		SecurityContext:               &corev1.PodSecurityContext{},
	}
	if l := c.Lifecycle; l != nil && l.PreStop != nil && l.PreStop.Sleep != nil {
		*pod.TerminationGracePeriodSeconds += l.PreStop.Sleep.Seconds // the program has the whole of its own
	}
	if s.Runtime != "" {
		pod.RuntimeClassName = &s.Runtime
	}
	if s.HealthCheck != nil && !s.HealthCheck.Disable && s.HealthCheck.Interval != nil {
		if interval := time.Duration(*s.HealthCheck.Interval); interval%time.Second != 0 {
			annotations[api.AnnotationProbePeriod] = interval.String()
		}
	}
	for _, step := range []func(types.ServiceConfig, *corev1.PodSpec) error{t.sharing, t.resolver, t.groups, t.placement} {
		if err := step(s, &pod); err != nil {
			return pod, err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(s.Sysctls)) {
		pod.SecurityContext.Sysctls = append(pod.SecurityContext.Sysctls, corev1.Sysctl{Name: name, Value: s.Sysctls[name]})
	}
	if err := t.mounts(s, &pod, &c); err != nil {
		return pod, err
	}
	pod.Containers = []corev1.Container{c}
	return pod, nil
}

// sharing says which namespaces a pod has in common with the machine.
func (t *translation) sharing(s types.ServiceConfig, pod *corev1.PodSpec) error {
	switch s.NetworkMode {
	case "", "bridge":
	case "host":
		pod.HostNetwork, pod.DNSPolicy = true, corev1.DNSClusterFirstWithHostNet
	default:
		return t.refuse(fmt.Sprintf("a pod has its own network; use host, or reach the other by its name instead of %q", s.NetworkMode), "services", s.Name, "network_mode")
	}
	switch s.Pid {
	case "":
		pod.ShareProcessNamespace = s.Init
	case "host":
		pod.HostPID = true
	default:
		return t.refuse("processes are seen within a pod only; use host, or leave it out", "services", s.Name, "pid")
	}
	switch s.Ipc {
	case "", "private", "shareable":
	case "host":
		pod.HostIPC = true
	default:
		return t.refuse("memory is shared within a pod only; use host, or leave it out", "services", s.Name, "ipc")
	}
	if s.UserNSMode != "" && s.UserNSMode != "host" {
		return t.refuse("use host, or leave it out", "services", s.Name, "userns_mode")
	}
	return nil
}

// resolver says how names are found.
func (t *translation) resolver(s types.ServiceConfig, pod *corev1.PodSpec) error {
	for _, host := range slices.Sorted(maps.Keys(s.ExtraHosts)) {
		for _, address := range s.ExtraHosts[host] {
			if address == "host-gateway" {
				address = api.MachineIP
			}
			pod.HostAliases = append(pod.HostAliases, corev1.HostAlias{IP: strings.Trim(address, "[]"), Hostnames: []string{host}})
		}
	}
	if len(s.DNSSearch)+len(s.DNSOpts) == 0 {
		return nil
	}
	pod.DNSConfig = &corev1.PodDNSConfig{Searches: s.DNSSearch}
	for _, option := range s.DNSOpts {
		name, value, has := strings.Cut(option, ":")
		o := corev1.PodDNSConfigOption{Name: name}
		if has {
			o.Value = &value
		}
		pod.DNSConfig.Options = append(pod.DNSConfig.Options, o)
	}
	return nil
}

func (t *translation) groups(s types.ServiceConfig, pod *corev1.PodSpec) error {
	for i, group := range s.GroupAdd {
		gid, err := strconv.ParseInt(group, 10, 64)
		if err != nil {
			return t.refuse(fmt.Sprintf("the group %q is known to the image only; write its number", group), "services", s.Name, "group_add", strconv.Itoa(i))
		}
		pod.SecurityContext.SupplementalGroups = append(pod.SecurityContext.SupplementalGroups, gid)
	}
	return nil
}

// fields are Swarm's names of what a node has.
var fields = map[string]string{
	"node.hostname": corev1.LabelHostname, "node.id": corev1.LabelHostname,
	"node.platform.os": corev1.LabelOSStable, "node.platform.arch": corev1.LabelArchStable,
}

func nodeLabel(field string) (string, bool) {
	if label, ok := strings.CutPrefix(field, "node.labels."); ok {
		return label, true
	}
	label, ok := fields[field]
	return label, ok
}

// placement says on which nodes pods may be.
func (t *translation) placement(s types.ServiceConfig, pod *corev1.PodSpec) error {
	var terms []corev1.NodeSelectorRequirement
	if s.Platform != "" {
		parts := strings.Split(s.Platform, "/")
		if len(parts) < 2 || parts[0] != "linux" {
			return t.refuse("only linux/ARCHITECTURE can be run; use linux/amd64 or the like", "services", s.Name, "platform")
		}
		terms = append(terms, corev1.NodeSelectorRequirement{Key: corev1.LabelArchStable, Operator: corev1.NodeSelectorOpIn, Values: parts[1:2]})
	}
	if s.Deploy != nil {
		for i, text := range s.Deploy.Placement.Constraints {
			operator := corev1.NodeSelectorOpIn
			field, value, ok := strings.Cut(text, "==")
			if !ok {
				operator = corev1.NodeSelectorOpNotIn
				field, value, ok = strings.Cut(text, "!=")
			}
			label, known := nodeLabel(strings.TrimSpace(field))
			if !ok || !known {
				return t.refuse(fmt.Sprintf("%q cannot be asked of a node; use node.hostname or node.labels.NAME with == or !=", text), "services", s.Name, "deploy", "placement", "constraints", strconv.Itoa(i))
			}
			terms = append(terms, corev1.NodeSelectorRequirement{Key: label, Operator: operator, Values: []string{strings.TrimSpace(value)}})
		}
		mine := &metav1.LabelSelector{MatchLabels: t.labels(s.Name)}
		for i, preference := range s.Deploy.Placement.Preferences {
			label, known := nodeLabel(preference.Spread)
			if !known {
				return t.refuse(fmt.Sprintf("nodes cannot be told apart by %q; use node.labels.NAME", preference.Spread), "services", s.Name, "deploy", "placement", "preferences", strconv.Itoa(i))
			}
			pod.TopologySpreadConstraints = append(pod.TopologySpreadConstraints, corev1.TopologySpreadConstraint{
				MaxSkew: 1, TopologyKey: label, WhenUnsatisfiable: corev1.ScheduleAnyway, LabelSelector: mine,
			})
		}
		switch s.Deploy.Placement.MaxReplicas {
		case 0:
		case 1:
			pod.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
				RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{TopologyKey: corev1.LabelHostname, LabelSelector: mine}},
			}}
		default:
			return t.refuse("1 can be said, or nothing; use placement.preferences to spread", "services", s.Name, "deploy", "placement", "max_replicas_per_node")
		}
	}
	if len(terms) > 0 {
		if pod.Affinity == nil {
			pod.Affinity = &corev1.Affinity{}
		}
		pod.Affinity.NodeAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{
			NodeSelectorTerms: []corev1.NodeSelectorTerm{{MatchExpressions: terms}},
		}}
	}
	return nil
}

// container is the service's program.
func (t *translation) container(s types.ServiceConfig) (corev1.Container, error) {
	c := corev1.Container{
		Name: s.Name, Image: s.Image, WorkingDir: s.WorkingDir,
		Command: literal(s.Entrypoint), Args: literal(s.Command),
		Stdin: s.StdinOpen, TTY: s.Tty,
	}
	if s.Image == "" {
		return c, t.refuse("no image is named; give it one", "services", s.Name)
	}
	if s.Entrypoint != nil && len(s.Entrypoint) == 0 {
		// The image's entry point is to be left out: Kubernetes knows that
		// only as another.
		if len(s.Command) == 0 {
			return c, t.refuse("without an entrypoint there must be a command; give one", "services", s.Name, "entrypoint")
		}
		c.Command, c.Args = literal(s.Command), nil
	}
	switch s.PullPolicy {
	case "":
	case types.PullPolicyAlways:
		c.ImagePullPolicy = corev1.PullAlways
	case types.PullPolicyMissing, types.PullPolicyIfNotPresent:
		c.ImagePullPolicy = corev1.PullIfNotPresent
	case types.PullPolicyNever:
		c.ImagePullPolicy = corev1.PullNever
	default:
		return c, t.refuse(s.PullPolicy+" is not to be had; use always, missing or never", "services", s.Name, "pull_policy")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Environment)) {
		if value := s.Environment[name]; value != nil {
			c.Env = append(c.Env, corev1.EnvVar{Name: name, Value: escape(*value)})
		}
	}
	if l := s.Logging; l != nil && !slices.Contains([]string{"", "json-file", "local", "journald"}, l.Driver) {
		return c, t.refuse("logs are kept by the machine; have a DaemonSet carry them on, and leave it out", "services", s.Name, "logging", "driver")
	}
	ports, err := t.innerPorts(s)
	if err != nil {
		return c, err
	}
	for _, p := range ports {
		c.Ports = append(c.Ports, corev1.ContainerPort{Name: p.Name, ContainerPort: p.Port, Protocol: p.Protocol})
	}
	for i, p := range s.Ports {
		if p.Mode != "host" || p.Published == "" {
			continue
		}
		port, err := strconv.ParseUint(p.Published, 10, 16)
		if err != nil {
			return c, t.refuse(p.Published+" is no port; write a number", "services", s.Name, "ports", strconv.Itoa(i))
		}
		for j := range c.Ports {
			if c.Ports[j].ContainerPort == int32(p.Target) && c.Ports[j].Protocol == protocolOf(p.Protocol) {
				c.Ports[j].HostPort, c.Ports[j].HostIP = int32(port), p.HostIP
			}
		}
	}
	if c.ReadinessProbe, err = t.probe(s); err != nil {
		return c, err
	}
	if c.Lifecycle, err = t.hooks(s); err != nil {
		return c, err
	}
	if c.SecurityContext, err = t.security(s); err != nil {
		return c, err
	}
	c.Resources, err = t.resources(s)
	return c, err
}

// literal keeps Kubernetes from taking $(NAME) in a word for a variable, which
// it is to a shell.
func literal(words []string) []string {
	out := slices.Clone(words)
	for i := range out {
		out[i] = escape(out[i])
	}
	return out
}

func escape(s string) string { return strings.ReplaceAll(s, "$(", "$$(") }

// Docker's own figures of a check.
const (
	dockerInterval = 30 * time.Second
	dockerTimeout  = 30 * time.Second
	dockerRetries  = 3
)

// drainSeconds is how long a server goes on after it was taken from its
// Service: a change is everywhere within a second.
const drainSeconds = 1

// probe is the health check: who fails it gets no requests. Docker does not
// start such a container again, and neither do we.
func (t *translation) probe(s types.ServiceConfig) (*corev1.Probe, error) {
	h := s.HealthCheck
	if h == nil || h.Disable || len(h.Test) == 0 || h.Test[0] == "NONE" {
		return nil, nil
	}
	command := h.Test[1:]
	switch {
	case h.Test[0] == "CMD" && len(command) > 0:
	case h.Test[0] == "CMD-SHELL" && len(command) == 1:
		command = []string{"/bin/sh", "-c", command[0]}
	default:
		return nil, t.refuse(`a check begins with CMD, CMD-SHELL or NONE; write ["CMD", "program", "argument"]`, "services", s.Name, "healthcheck", "test")
	}
	duration := func(d *types.Duration, or time.Duration) time.Duration {
		if d == nil || *d == 0 {
			return or
		}
		return time.Duration(*d)
	}
	retries := ptr.Deref(h.Retries, dockerRetries)
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: literal(command)}},
		PeriodSeconds:    seconds(duration(h.Interval, dockerInterval)),
		TimeoutSeconds:   seconds(duration(h.Timeout, dockerTimeout)),
		FailureThreshold: int32(max(retries, 1)),
	}, nil
}

// hooks are what runs beside the program when it starts and before it ends.
func (t *translation) hooks(s types.ServiceConfig) (*corev1.Lifecycle, error) {
	hook := func(list []types.ServiceHook, name string) (*corev1.LifecycleHandler, error) {
		switch len(list) {
		case 0:
			return nil, nil
		case 1:
		default:
			return nil, t.refuse("there can be one hook; let it call the others", "services", s.Name, name)
		}
		command := []string(list[0].Command)
		var env []string
		for _, name := range slices.Sorted(maps.Keys(list[0].Environment)) {
			if value := list[0].Environment[name]; value != nil {
				env = append(env, name+"="+*value)
			}
		}
		if dir := list[0].WorkingDir; dir != "" || len(env) > 0 {
			// env(1) sets what a hook of Kubernetes cannot.
			with := []string{"env"}
			if dir != "" {
				with = append(with, "-C", dir)
			}
			command = slices.Concat(with, env, command)
		}
		return &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: literal(command)}}, nil
	}
	start, err := hook(s.PostStart, "post_start")
	if err != nil {
		return nil, err
	}
	stop, err := hook(s.PreStop, "pre_stop")
	if err != nil {
		return nil, err
	}
	if stop == nil && len(s.Ports)+len(s.Expose) > 0 && t.kind(s) == "Deployment" {
		// New requests must find another pod before this one stops listening.
		stop = &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: drainSeconds}}
	}
	if start == nil && stop == nil {
		return nil, nil
	}
	return &corev1.Lifecycle{PostStart: start, PreStop: stop}, nil
}

// security is whom the program runs as and what it may.
func (t *translation) security(s types.ServiceConfig) (*corev1.SecurityContext, error) {
	sc := &corev1.SecurityContext{}
	if s.Privileged {
		sc.Privileged = ptr.To(true)
	}
	if s.ReadOnly {
		sc.ReadOnlyRootFilesystem = ptr.To(true)
	}
	if s.User != "" {
		user, group, hasGroup := strings.Cut(s.User, ":")
		uid, err := number(user)
		if err == nil {
			sc.RunAsUser = &uid
			if hasGroup {
				var gid int64
				gid, err = number(group)
				sc.RunAsGroup = &gid
			}
		}
		if err != nil {
			return nil, t.refuse(fmt.Sprintf("%q is known to the image only; write its numbers, as 1000:1000", s.User), "services", s.Name, "user")
		}
	}
	if len(s.CapAdd)+len(s.CapDrop) > 0 {
		sc.Capabilities = &corev1.Capabilities{Add: capabilities(s.CapAdd), Drop: capabilities(s.CapDrop)}
	}
	for i, option := range s.SecurityOpt {
		option = strings.Replace(option, "=", ":", 1)
		name, value, _ := strings.Cut(option, ":")
		switch {
		case name == "no-new-privileges" && (value == "" || value == "true"):
			sc.AllowPrivilegeEscalation = ptr.To(false)
		case option == "seccomp:unconfined":
			sc.SeccompProfile = &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeUnconfined}
		case option == "apparmor:unconfined":
			sc.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeUnconfined}
		case name == "apparmor":
			sc.AppArmorProfile = &corev1.AppArmorProfile{Type: corev1.AppArmorProfileTypeLocalhost, LocalhostProfile: &value}
		default:
			return nil, t.refuse(fmt.Sprintf("%q is not to be had; use no-new-privileges, seccomp:unconfined or apparmor:PROFILE", option), "services", s.Name, "security_opt", strconv.Itoa(i))
		}
	}
	if sc.SeccompProfile == nil && !s.Privileged {
		sc.SeccompProfile = &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}
	}
	return sc, nil
}

// number of a user or group; of names only root's is the same everywhere.
func number(s string) (int64, error) {
	if s == "root" {
		return 0, nil
	}
	return strconv.ParseInt(s, 10, 64)
}

func capabilities(names []string) []corev1.Capability {
	var list []corev1.Capability
	for _, name := range names {
		list = append(list, corev1.Capability(strings.TrimPrefix(strings.ToUpper(name), "CAP_")))
	}
	return list
}

// resources are limits and what is kept free. Docker keeps nothing free unless
// told; Kubernetes would keep the limit, so that nothing is said aloud.
func (t *translation) resources(s types.ServiceConfig) (corev1.ResourceRequirements, error) {
	limits, requests := corev1.ResourceList{}, corev1.ResourceList{}
	cpu := func(n float64) resource.Quantity {
		return *resource.NewMilliQuantity(int64(n*1000+0.5), resource.DecimalSI)
	}
	memory := func(n types.UnitBytes) resource.Quantity {
		return *resource.NewQuantity(int64(n), resource.BinarySI)
	}
	if s.CPUS > 0 {
		limits[corev1.ResourceCPU] = cpu(float64(s.CPUS))
	}
	if s.CPUQuota > 0 {
		period := s.CPUPeriod
		if period == 0 {
			period = 100_000
		}
		limits[corev1.ResourceCPU] = cpu(float64(s.CPUQuota) / float64(period))
	}
	if s.CPUShares > 0 {
		requests[corev1.ResourceCPU] = cpu(float64(s.CPUShares) / 1024)
	}
	if s.MemLimit > 0 {
		limits[corev1.ResourceMemory] = memory(s.MemLimit)
	}
	if s.MemReservation > 0 {
		requests[corev1.ResourceMemory] = memory(s.MemReservation)
	}
	if s.MemSwapLimit != 0 && s.MemSwapLimit != s.MemLimit {
		return corev1.ResourceRequirements{}, t.refuse("pods do not swap; make it mem_limit, or leave it out", "services", s.Name, "memswap_limit")
	}
	if s.Deploy != nil {
		if l := s.Deploy.Resources.Limits; l != nil {
			if l.NanoCPUs > 0 {
				limits[corev1.ResourceCPU] = cpu(float64(l.NanoCPUs))
			}
			if l.MemoryBytes > 0 {
				limits[corev1.ResourceMemory] = memory(l.MemoryBytes)
			}
		}
		if r := s.Deploy.Resources.Reservations; r != nil {
			if r.NanoCPUs > 0 {
				requests[corev1.ResourceCPU] = cpu(float64(r.NanoCPUs))
			}
			if r.MemoryBytes > 0 {
				requests[corev1.ResourceMemory] = memory(r.MemoryBytes)
			}
		}
	}
	for name, limit := range limits {
		request, said := requests[name]
		switch {
		case !said:
			requests[name] = *resource.NewQuantity(0, limit.Format)
		case request.Cmp(limit) > 0:
			return corev1.ResourceRequirements{}, t.refuse(fmt.Sprintf("%s %s is kept free but only %s may be used; make the limit larger", request.String(), name, limit.String()), "services", s.Name)
		}
	}
	r := corev1.ResourceRequirements{}
	if len(limits) > 0 {
		r.Limits = limits
	}
	if len(requests) > 0 {
		r.Requests = requests
	}
	return r, nil
}
