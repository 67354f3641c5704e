package compose

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/compose-spec/compose-go/v2/types"

	"tutti.dev/tutti/internal/api"
)

// LabelName is the recommended label for what part of an application it is:
// here a service.
const LabelName = "app.kubernetes.io/name"

// Objects are what the project means on a cluster, without a namespace, in no
// order that matters: who waits for whom is said by api.AnnotationAfter. The
// error names the line of what cannot be.
func (p *Project) Objects() ([]*unstructured.Unstructured, error) {
	t := &translation{Project: p, files: map[string]string{}, users: map[string][]string{}}
	for _, part := range []func() error{t.configs, t.claims, t.services, t.aliases} {
		if err := part(); err != nil {
			return nil, err
		}
	}
	return t.objects, nil
}

// translation collects objects.
type translation struct {
	*Project
	objects []*unstructured.Unstructured
	// files has the object that holds a configuration ("configs.NAME") or
	// secret ("secrets.NAME").
	files map[string]string
	// users has the services that go by an alias.
	users map[string][]string
}

// add keeps an object of a kind that client-go knows.
func (t *translation) add(o metav1.Object) error {
	object := o.(runtime.Object)
	kinds, _, err := scheme.Scheme.ObjectKinds(object)
	if err != nil {
		return err
	}
	object.GetObjectKind().SetGroupVersionKind(kinds[0])
	labels := o.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	labels[api.LabelPartOf] = t.Name()
	o.SetLabels(labels)
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		return err
	}
	u := &unstructured.Unstructured{Object: content}
	// What the server fills in is not for us to say.
	delete(u.Object, "status")
	for _, metadata := range [][]string{{"metadata"}, {"spec", "template", "metadata"}} {
		unstructured.RemoveNestedField(u.Object, append(slices.Clip(metadata), "creationTimestamp")...)
	}
	t.objects = append(t.objects, u)
	return nil
}

// labels of what belongs to a service; they also select its pods.
func (t *translation) labels(service string) map[string]string {
	return map[string]string{LabelName: service, api.LabelPartOf: t.Name()}
}

// objectName makes the name of an object of a name that people gave to
// something that no program sees.
func objectName(s string) string {
	clean := strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z', r >= '0' && r <= '9', r == '-':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		}
		return '-'
	}, s)
	return strings.Trim(clean, "-")
}

// hostName checks a name that programs look up.
func (t *translation) hostName(name string, path ...string) error {
	if problems := validation.IsDNS1035Label(name); len(problems) > 0 {
		cure := objectName(name)
		return t.refuse(fmt.Sprintf("%q cannot be looked up in DNS; call it %q", name, cure), path...)
	}
	return nil
}

// claims makes the named volumes.
func (t *translation) claims() error {
	for _, name := range slices.Sorted(maps.Keys(t.project.Volumes)) {
		v := t.project.Volumes[name]
		switch v.Driver {
		case "", "local":
		default:
			return t.refuse("only local volumes are made; name a PersistentVolumeClaim by external", "volumes", name, "driver")
		}
		if v.External {
			continue
		}
		if err := t.add(claim(t.claimName(name), v.Labels, sizeOf(v.Extensions))); err != nil {
			return err
		}
	}
	return nil
}

// claimName is the claim of a volume. The library calls it PROJECT_NAME unless
// the file names it otherwise; a claim has the namespace for that.
func (t *translation) claimName(volume string) string {
	v := t.project.Volumes[volume]
	if v.External || v.Name != t.Name()+"_"+volume && v.Name != "" {
		return objectName(v.Name)
	}
	return objectName(volume)
}

// defaultSize is what a claim asks for whose volume says nothing. Local volumes
// take what is there; elsewhere it is a disk of that size.
const defaultSize = "8Gi"

// sizeOf is the size of a volume: x-size, which is not of the specification.
func sizeOf(x types.Extensions) string {
	if size, ok := x["x-size"].(string); ok {
		return size
	}
	return defaultSize
}

func annotationsOf(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	return maps.Clone(labels)
}

// services makes each service.
func (t *translation) services() error {
	for _, name := range slices.Sorted(maps.Keys(t.project.Services)) {
		if err := t.service(t.project.Services[name]); err != nil {
			return err
		}
	}
	return nil
}

// aliases makes the names that services have beside their own. Several may
// share one: their pods carry a label for it.
func (t *translation) aliases() error {
	for _, alias := range slices.Sorted(maps.Keys(t.users)) {
		if _, taken := t.project.Services[alias]; taken {
			if !slices.Contains(t.users[alias], alias) {
				return t.refuse(fmt.Sprintf("%q is a service's name and %s's alias; take another alias", alias, t.users[alias][0]), "services", alias)
			}
			continue
		}
		s := &corev1.Service{
			ObjectMeta: metav1.ObjectMeta{Name: alias, Labels: map[string]string{}},
			Spec:       corev1.ServiceSpec{Selector: map[string]string{aliasLabel(alias): "true", api.LabelPartOf: t.Name()}},
		}
		for _, user := range t.users[alias] {
			ports, err := t.innerPorts(t.project.Services[user])
			if err != nil {
				return err
			}
			for _, port := range ports {
				if !slices.ContainsFunc(s.Spec.Ports, func(p corev1.ServicePort) bool { return p.Name == port.Name }) {
					s.Spec.Ports = append(s.Spec.Ports, port)
				}
			}
		}
		if len(s.Spec.Ports) == 0 {
			headless(&s.Spec)
		}
		if err := t.add(s); err != nil {
			return err
		}
	}
	return nil
}

func aliasLabel(alias string) string { return "alias.compose.tutti.dev/" + alias }
