package compose

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/compose-spec/compose-go/v2/types"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// service makes the workload of a service and its names.
func (t *translation) service(s types.ServiceConfig) error {
	if err := t.hostName(s.Name, "services", s.Name); err != nil {
		return err
	}
	template, err := t.template(s)
	if err != nil {
		return err
	}
	after, err := t.after(s)
	if err != nil {
		return err
	}
	meta := metav1.ObjectMeta{Name: s.Name, Labels: map[string]string{LabelName: s.Name}, Annotations: map[string]string{}}
	if len(after) > 0 {
		meta.Annotations[api.AnnotationAfter] = strings.Join(after, ",")
	}
	if s.Deploy != nil {
		maps.Copy(meta.Annotations, s.Deploy.Labels)
	}
	workload, err := t.workload(s, meta, template)
	if err != nil {
		return err
	}
	if err := t.add(workload); err != nil {
		return err
	}
	return t.names(s)
}

// kind is what a service becomes.
func (t *translation) kind(s types.ServiceConfig) string {
	mode, policy := "", ""
	if s.Deploy != nil {
		mode = s.Deploy.Mode
		if s.Deploy.RestartPolicy != nil {
			policy = s.Deploy.RestartPolicy.Condition
		}
	}
	server := len(s.Ports)+len(s.Expose) > 0 || s.HealthCheck != nil && !s.HealthCheck.Disable
	failures := policy == "on-failure" || policy == "" && strings.HasPrefix(s.Restart, "on-failure")
	switch {
	case mode == "global":
		return "DaemonSet"
	case mode == "replicated-job",
		policy == "none", policy == "" && s.Restart == "no",
		failures && !server,
		policy == "" && s.Restart == "" && t.awaitsEnd(s.Name):
		return "Job"
	}
	return "Deployment"
}

// awaitsEnd says whether a service waits until this one has ended well.
func (t *translation) awaitsEnd(name string) bool {
	for _, other := range t.project.Services {
		if other.DependsOn[name].Condition == types.ServiceConditionCompletedSuccessfully {
			return true
		}
	}
	return false
}

// after lists what must be how far before this service is started.
func (t *translation) after(s types.ServiceConfig) ([]string, error) {
	var list []string
	for _, name := range slices.Sorted(maps.Keys(s.DependsOn)) {
		other, ok := t.project.Services[name]
		if !ok {
			continue // not required, and its profile is off
		}
		kind := t.kind(other)
		state := api.AfterStarted
		switch s.DependsOn[name].Condition {
		case types.ServiceConditionHealthy:
			if kind == "Job" {
				return nil, t.refuse(name+" runs once and is never healthy; use service_completed_successfully", "services", s.Name, "depends_on", name, "condition")
			}
			state = api.AfterReady
		case types.ServiceConditionCompletedSuccessfully:
			if kind != "Job" {
				return nil, t.refuse(name+` does not end; give it restart: "no"`, "services", s.Name, "depends_on", name, "condition")
			}
			state = api.AfterReady
		}
		list = append(list, kind+"/"+name+"="+state)
	}
	return list, nil
}

// workload wraps the pods of a service.
func (t *translation) workload(s types.ServiceConfig, meta metav1.ObjectMeta, template corev1.PodTemplateSpec) (metav1.Object, error) {
	replicas := int32(s.GetScale())
	selector := &metav1.LabelSelector{MatchLabels: t.labels(s.Name)}
	switch t.kind(s) {
	case "DaemonSet":
		return &appsv1.DaemonSet{ObjectMeta: meta, Spec: appsv1.DaemonSetSpec{Selector: selector, Template: template}}, nil
	case "Job":
		limit, policy := t.attempts(s)
		template.Spec.RestartPolicy = policy
		return &batchv1.Job{ObjectMeta: meta, Spec: batchv1.JobSpec{
			Parallelism: &replicas, Completions: &replicas, BackoffLimit: &limit, Template: template,
		}}, nil
	}
	d := &appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{Replicas: &replicas, Selector: selector, Template: template}}
	err := t.strategy(s, &d.Spec)
	return d, err
}

// attempts is how often a Job is tried.
func (t *translation) attempts(s types.ServiceConfig) (int32, corev1.RestartPolicy) {
	most := func(n int) (int32, corev1.RestartPolicy) {
		if n <= 0 {
			n = math.MaxInt32
		}
		return int32(n), corev1.RestartPolicyOnFailure
	}
	if s.Deploy != nil && s.Deploy.RestartPolicy != nil {
		p := s.Deploy.RestartPolicy
		if p.Condition == "none" {
			return 0, corev1.RestartPolicyNever
		}
		return most(int(ptr.Deref(p.MaxAttempts, 0)))
	}
	if rest, ok := strings.CutPrefix(s.Restart, "on-failure"); ok {
		n, _ := strconv.Atoi(strings.TrimPrefix(rest, ":"))
		return most(n)
	}
	return 0, corev1.RestartPolicyNever
}

// strategy is how an update goes. By default the new pod is ready before an old
// one goes; but two pods must not write to one volume.
func (t *translation) strategy(s types.ServiceConfig, d *appsv1.DeploymentSpec) error {
	surge, unavailable := intstr.FromInt32(1), intstr.FromInt32(0)
	shares := slices.ContainsFunc(s.Volumes, func(v types.ServiceVolumeConfig) bool { return v.Type == types.VolumeTypeVolume && !v.ReadOnly })
	var u types.UpdateConfig
	if s.Deploy != nil && s.Deploy.UpdateConfig != nil {
		u = *s.Deploy.UpdateConfig
	}
	parallel := intstr.FromInt32(1)
	if u.Parallelism != nil {
		parallel = intstr.FromInt32(int32(*u.Parallelism))
		if *u.Parallelism == 0 {
			parallel = intstr.FromString("100%")
		}
	}
	switch {
	case u.Order == "stop-first" && s.GetScale() > 1:
		surge, unavailable = intstr.FromInt32(0), parallel
	case u.Order == "stop-first", u.Order == "" && shares:
		d.Strategy.Type = appsv1.RecreateDeploymentStrategyType
		return nil
	default:
		surge = parallel
	}
	switch u.FailureAction {
	case "", "pause":
	default:
		return t.refuse("an update that fails stops; use pause", "services", s.Name, "deploy", "update_config", "failure_action")
	}
	d.MinReadySeconds = seconds(time.Duration(u.Delay))
	d.Strategy = appsv1.DeploymentStrategy{
		Type:          appsv1.RollingUpdateDeploymentStrategyType,
		RollingUpdate: &appsv1.RollingUpdateDeployment{MaxSurge: &surge, MaxUnavailable: &unavailable},
	}
	return nil
}

// seconds rounds upwards.
func seconds(d time.Duration) int32 { return int32((d + time.Second - 1) / time.Second) }

// template is a service's pod.
func (t *translation) template(s types.ServiceConfig) (corev1.PodTemplateSpec, error) {
	labels, annotations := t.labels(s.Name), map[string]string{}
	maps.Copy(annotations, s.Labels)
	maps.Copy(annotations, s.Annotations)
	if err := t.alias(s, labels); err != nil {
		return corev1.PodTemplateSpec{}, err
	}
	spec, err := t.pod(s, annotations)
	if err != nil {
		return corev1.PodTemplateSpec{}, err
	}
	for _, name := range slices.Sorted(maps.Keys(s.DependsOn)) {
		// Started again with what it depends on: another template.
		if other, ok := t.project.Services[name]; ok && s.DependsOn[name].Restart {
			template, err := t.template(other)
			if err != nil {
				return corev1.PodTemplateSpec{}, err
			}
			text, err := json.Marshal(template)
			if err != nil {
				return corev1.PodTemplateSpec{}, err
			}
			sum := sha256.Sum256(text)
			annotations["compose.tutti.dev/restarts-with-"+name] = hex.EncodeToString(sum[:5])
		}
	}
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: annotations}, Spec: spec}, nil
}

// alias gathers the names that a service has beside its own.
func (t *translation) alias(s types.ServiceConfig, labels map[string]string) error {
	add := func(name string, path ...string) error {
		if name == s.Name {
			return nil
		}
		if err := t.hostName(name, path...); err != nil {
			return err
		}
		labels[aliasLabel(name)] = "true"
		if !slices.Contains(t.users[name], s.Name) {
			t.users[name] = append(t.users[name], s.Name)
		}
		return nil
	}
	if s.ContainerName != "" {
		if err := add(s.ContainerName, "services", s.Name, "container_name"); err != nil {
			return err
		}
	}
	for _, network := range slices.Sorted(maps.Keys(s.Networks)) {
		if n := s.Networks[network]; n != nil {
			for _, alias := range n.Aliases {
				if err := add(alias, "services", s.Name, "networks", network, "aliases"); err != nil {
					return err
				}
			}
		}
	}
	for _, other := range slices.Sorted(maps.Keys(t.project.Services)) {
		for _, link := range t.project.Services[other].Links {
			if name, alias, ok := strings.Cut(link, ":"); ok && name == s.Name {
				if err := add(alias, "services", other, "links"); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// names makes what a service is looked up by, and where others outside reach it.
func (t *translation) names(s types.ServiceConfig) error {
	if s.NetworkMode == "none" {
		return nil
	}
	inner, err := t.innerPorts(s)
	if err != nil {
		return err
	}
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: s.Name, Labels: map[string]string{LabelName: s.Name}},
		Spec:       corev1.ServiceSpec{Selector: t.labels(s.Name), Ports: inner},
	}
	if len(inner) == 0 || s.Deploy != nil && s.Deploy.EndpointMode == "dnsrr" {
		headless(&o.Spec)
	}
	if err := t.add(o); err != nil {
		return err
	}
	return t.published(s)
}

// headless lets a name lead to the pods themselves, whatever they listen on, as
// soon as they have started: so it is where no ports are known.
func headless(s *corev1.ServiceSpec) {
	s.ClusterIP, s.PublishNotReadyAddresses = corev1.ClusterIPNone, true
}

// innerPorts are those that other services reach it by.
func (t *translation) innerPorts(s types.ServiceConfig) ([]corev1.ServicePort, error) {
	var ports []corev1.ServicePort
	add := func(port int32, protocol, app string) {
		p := corev1.ServicePort{Name: portName(port, protocol), Port: port, TargetPort: intstr.FromInt32(port), Protocol: protocolOf(protocol)}
		if app != "" {
			p.AppProtocol = &app
		}
		if !slices.ContainsFunc(ports, func(o corev1.ServicePort) bool { return o.Name == p.Name }) {
			ports = append(ports, p)
		}
	}
	for _, p := range s.Ports {
		add(int32(p.Target), p.Protocol, p.AppProtocol)
	}
	for i, e := range s.Expose {
		text, protocol, _ := strings.Cut(e, "/")
		first, last, isRange := strings.Cut(text, "-")
		from, err := strconv.ParseUint(first, 10, 16)
		to := from
		if err == nil && isRange {
			to, err = strconv.ParseUint(last, 10, 16)
		}
		if err != nil || to < from {
			return nil, t.refuse(fmt.Sprintf("%q is no port; write a number", e), "services", s.Name, "expose", strconv.Itoa(i))
		}
		for port := from; port <= to; port++ {
			add(int32(port), protocol, "")
		}
	}
	slices.SortFunc(ports, func(a, b corev1.ServicePort) int { return strings.Compare(a.Name, b.Name) })
	return ports, nil
}

func portName(port int32, protocol string) string {
	return strings.ToLower(string(protocolOf(protocol))) + "-" + strconv.Itoa(int(port))
}

func protocolOf(s string) corev1.Protocol {
	if s == "" {
		return corev1.ProtocolTCP
	}
	return corev1.Protocol(strings.ToUpper(s))
}

// published makes the ports of the machine: one Service of type LoadBalancer
// for each address that they are on. A port of the machine's choice is a
// NodePort.
func (t *translation) published(s types.ServiceConfig) error {
	byAddress := map[string][]corev1.ServicePort{}
	var chosen []corev1.ServicePort
	for i, p := range s.Ports {
		if p.Mode == "host" {
			continue
		}
		port := corev1.ServicePort{TargetPort: intstr.FromInt32(int32(p.Target)), Protocol: protocolOf(p.Protocol)}
		if p.Published == "" || p.Published == "0" {
			port.Port = int32(p.Target)
			port.Name = portName(port.Port, p.Protocol)
			chosen = append(chosen, port)
			continue
		}
		n, err := strconv.ParseUint(p.Published, 10, 16)
		if err != nil {
			return t.refuse(fmt.Sprintf("%s leads to one port; give as many ports on both sides, or one", p.Published), "services", s.Name, "ports", strconv.Itoa(i))
		}
		port.Port = int32(n)
		port.Name = portName(port.Port, p.Protocol)
		address := p.HostIP
		if address == "0.0.0.0" || address == "::" {
			address = ""
		}
		byAddress[address] = append(byAddress[address], port)
	}
	if len(chosen) > 0 {
		if err := t.add(&corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: s.Name + "-node", Labels: map[string]string{LabelName: s.Name}},
			Spec:       corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Selector: t.labels(s.Name), Ports: chosen},
		}); err != nil {
			return err
		}
	}
	for _, address := range slices.Sorted(maps.Keys(byAddress)) {
		o := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: s.Name + "-published", Labels: map[string]string{LabelName: s.Name}},
			Spec: corev1.ServiceSpec{
				Type: corev1.ServiceTypeLoadBalancer, AllocateLoadBalancerNodePorts: ptr.To(false),
				Selector: t.labels(s.Name), Ports: byAddress[address],
			},
		}
		if address != "" {
			o.Name += "-" + strings.Trim(strings.NewReplacer(".", "-", ":", "-").Replace(address), "-")
			o.Annotations = map[string]string{api.AnnotationHostIP: address}
		}
		if err := t.add(o); err != nil {
			return err
		}
	}
	return nil
}
