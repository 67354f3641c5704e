package importer

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"

	"tutti.dev/tutti/internal/api/hostprocess"
)

// Labels of what is imported, by Kubernetes' own names for them.
const (
	LabelName     = "app.kubernetes.io/name"
	LabelInstance = "app.kubernetes.io/instance"
)

// Pod is a pod of the class process in the making. Its first container is the
// program.
type Pod struct {
	Name        string            // of every object
	Labels      map[string]string // LabelInstance is its own
	Annotations map[string]string // of the pod
	Spec        corev1.PodSpec
	Ports       []Port
	// About says of the whole what it is, "" nothing.
	About string

	secret map[string]string
}

// Port is one that the program listens on.
type Port struct {
	Number   int32
	Protocol corev1.Protocol
}

func (p Port) String() string {
	return fmt.Sprintf("%s-%d", strings.ToLower(string(p.Protocol)), p.Number)
}

// ParsePort reads "80" or "53/udp".
func ParsePort(s string) (Port, error) {
	number, protocol, _ := strings.Cut(s, "/")
	n, err := strconv.ParseUint(number, 10, 16)
	proto := corev1.Protocol(strings.ToUpper(protocol))
	if protocol == "" {
		proto = corev1.ProtocolTCP
	}
	if err != nil || n == 0 || !slices.Contains([]corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP}, proto) {
		return Port{}, fmt.Errorf("%q is no port; write 80, or 53/udp", s)
	}
	return Port{int32(n), proto}, nil
}

// NewPod is a pod of this name with one container that is called the same.
func NewPod(name string) *Pod {
	class := hostprocess.Handler
	return &Pod{
		Name:        name,
		Labels:      map[string]string{LabelName: name, LabelInstance: name},
		Annotations: map[string]string{},
		Spec: corev1.PodSpec{
			RuntimeClassName: &class,
			Containers:       []corev1.Container{{Name: name, Image: hostprocess.Image}},
		},
	}
}

// Main is the program's container.
func (p *Pod) Main() *corev1.Container { return &p.Spec.Containers[0] }

var foreign = regexp.MustCompile(`[^a-z0-9]+`)

// longest leaves room in the 63 characters of a label for what controllers
// add to a name.
const longest = 52

// Name makes a name of an object of any text, "" of one without a letter or
// digit.
func Name(text string) string {
	name := strings.Trim(foreign.ReplaceAllString(strings.ToLower(text), "-"), "-")
	return strings.Trim(name[:min(len(name), longest)], "-")
}

// HostPath mounts a file or directory of the machine where it is.
func (p *Pod) HostPath(source, target string, kind corev1.HostPathType, readOnly bool) {
	p.mount(target, readOnly, corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: source, Type: &kind}})
}

// EmptyDir mounts a directory that begins empty and goes with the pod.
func (p *Pod) EmptyDir(target string, medium corev1.StorageMedium) {
	p.mount(target, false, corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: medium}})
}

// mount gives every container the volume. The first one at a place stays.
func (p *Pod) mount(target string, readOnly bool, source corev1.VolumeSource) {
	if p.Mounted(target) {
		return
	}
	base := "root"
	if target != "/" {
		base = Name(strings.ReplaceAll(target, "/", "-"))
	}
	name := base
	for i := 2; slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool { return v.Name == name }); i++ {
		name = fmt.Sprintf("%s-%d", base, i)
	}
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: name, VolumeSource: source})
	p.Main().VolumeMounts = append(p.Main().VolumeMounts, corev1.VolumeMount{Name: name, MountPath: target, ReadOnly: readOnly})
}

// Mounted says whether a volume is mounted at this very place.
func (p *Pod) Mounted(target string) bool {
	return slices.ContainsFunc(p.Main().VolumeMounts, func(m corev1.VolumeMount) bool { return m.MountPath == path.Clean(target) })
}

// Env adds a variable to the program's environment. value is Kubernetes'
// form, with references. One that looks like a secret goes into a Secret;
// plain is then what it holds, and the answer is yes.
func (p *Pod) Env(name, value, plain string) (secret bool) {
	v := corev1.EnvVar{Name: name, Value: value}
	if secret = Secret(name, plain); secret {
		if p.secret == nil {
			p.secret = map[string]string{}
		}
		p.secret[name] = plain
		v = corev1.EnvVar{Name: name, ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{
			LocalObjectReference: corev1.LocalObjectReference{Name: p.Name}, Key: name}}}
	}
	p.Main().Env = append(p.Main().Env, v)
	return secret
}

// Annotate sets an annotation of the pod.
func (p *Pod) Annotate(key, value string) { p.Annotations[key] = value }

// Listen says which ports the program listens on.
func (p *Pod) Listen(ports []Port) {
	p.Ports = ports
	for _, port := range ports {
		p.Main().Ports = append(p.Main().Ports, corev1.ContainerPort{Name: port.String(), ContainerPort: port.Number, Protocol: port.Protocol})
	}
}

// Ready has the pod wait until its first port that can be connected to
// answers, and says whether there is one.
func (p *Pod) Ready() bool {
	i := slices.IndexFunc(p.Ports, func(port Port) bool { return port.Protocol == corev1.ProtocolTCP })
	if i < 0 {
		return false
	}
	p.Main().ReadinessProbe = &corev1.Probe{ProbeHandler: corev1.ProbeHandler{
		TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromString(p.Ports[i].String())}}}
	return true
}

func (p *Pod) meta() metav1.ObjectMeta {
	m := metav1.ObjectMeta{Name: p.Name, Labels: p.Labels}
	if p.About != "" {
		m.Annotations = map[string]string{"kubernetes.io/description": p.About}
	}
	return m
}

// Selector finds the pod and no other.
func (p *Pod) Selector() *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{LabelInstance: p.Labels[LabelInstance]}}
}

// Template is the pod as a controller makes it. Every container has the same
// environment and volumes.
func (p *Pod) Template() corev1.PodTemplateSpec {
	spec := *p.Spec.DeepCopy()
	for i := range spec.InitContainers {
		spec.InitContainers[i].Env = p.Main().Env
		spec.InitContainers[i].VolumeMounts = p.Main().VolumeMounts
	}
	return corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: p.Labels, Annotations: p.Annotations}, Spec: spec}
}

// Deployment keeps one such pod running: the next begins when the last has
// ended, as two of them might not bear each other.
func (p *Pod) Deployment() *appsv1.Deployment {
	one := int32(1)
	return &appsv1.Deployment{
		TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "Deployment"}, ObjectMeta: p.meta(),
		Spec: appsv1.DeploymentSpec{Replicas: &one, Selector: p.Selector(), Template: p.Template(),
			Strategy: appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType}},
	}
}

// Beside are the objects that the pod needs: its Secret, if anything in its
// environment looks like one, and a Service for its ports.
func (p *Pod) Beside() []runtime.Object {
	var all []runtime.Object
	meta := metav1.ObjectMeta{Name: p.Name, Labels: p.Labels}
	if len(p.secret) > 0 {
		all = append(all, &corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: meta, StringData: p.secret})
	}
	if len(p.Ports) > 0 {
		s := &corev1.Service{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"}, ObjectMeta: meta,
			Spec: corev1.ServiceSpec{Selector: p.Selector().MatchLabels}}
		for _, port := range p.Ports {
			s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: port.String(), Port: port.Number, Protocol: port.Protocol, TargetPort: intstr.FromString(port.String())})
		}
		all = append(all, s)
	}
	return all
}

var dollars = regexp.MustCompile(`\$\$+|\$\(`)

// Literal writes a text where Kubernetes would expand references in it: of
// dollars that stand before a parenthesis, or side by side, each needs two.
func Literal(text string) string {
	return dollars.ReplaceAllStringFunc(text, func(s string) string {
		return strings.ReplaceAll(s, "$", "$$")
	})
}

var (
	secretNames  = regexp.MustCompile(`(?i)(passw|passphrase|(^|_)(pass|pwd)($|_)|secret|token|credential|api_?key|access_?key|private_?key|(^|_)auth($|_))`)
	secretValues = regexp.MustCompile(`-----BEGIN [A-Z ]*PRIVATE KEY|://[^/\s:@]*:[^/\s@]+@|\beyJ[\w-]{8,}\.[\w-]+\.|\b(AKIA|ASIA)[A-Z0-9]{16}\b|\bgh[pousr]_\w{30,}`)
)

// Secret says whether a variable looks as if nobody else should read it: by
// its name, or by its value. A path that a name like PASSWORD_FILE gives is
// no secret.
func Secret(name, value string) bool {
	if value == "" {
		return false
	}
	return secretNames.MatchString(name) && !strings.HasPrefix(value, "/") || secretValues.MatchString(value)
}
