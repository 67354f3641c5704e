// Package hostaccess keeps pods from being processes of the host where nobody
// with the right to say so has allowed it. It is an admission plugin, so it is
// there from the first request and no object of the API turns it off.
//
// Two things are admitted here. A namespace gets the label that allows
// processes of the host only from who holds the verb allow-host on it. A pod
// whose RuntimeClass has the handler process gets in only where its namespace
// has the label, whoever creates it, and if it asks for nothing that such a
// pod cannot have.
package hostaccess

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/warning"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	nodelisters "k8s.io/client-go/listers/node/v1"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/batch"
	"k8s.io/kubernetes/pkg/apis/core"
	corev1conversion "k8s.io/kubernetes/pkg/apis/core/v1"

	"tutti.dev/tutti/internal/api/hostprocess"
)

// PluginName is the plugin's in the API server's list.
const PluginName = "HostAccess"

// Register adds the plugin to those that there are.
func Register(plugins *admission.Plugins) {
	plugins.Register(PluginName, func(io.Reader) (admission.Interface, error) {
		return &plugin{Handler: admission.NewHandler(admission.Create, admission.Update)}, nil
	})
}

type plugin struct {
	*admission.Handler
	client     kubernetes.Interface
	namespaces corelisters.NamespaceLister
	classes    nodelisters.RuntimeClassLister
	authorizer authorizer.Authorizer
}

var (
	_ admission.ValidationInterface                = &plugin{}
	_ admission.InitializationValidator            = &plugin{}
	_ initializer.WantsAuthorizer                  = &plugin{}
	_ initializer.WantsExternalKubeClientSet       = &plugin{}
	_ initializer.WantsExternalKubeInformerFactory = &plugin{}
)

// SetAuthorizer implements [initializer.WantsAuthorizer].
func (p *plugin) SetAuthorizer(a authorizer.Authorizer) { p.authorizer = a }

// SetExternalKubeClientSet implements [initializer.WantsExternalKubeClientSet].
func (p *plugin) SetExternalKubeClientSet(c kubernetes.Interface) { p.client = c }

// SetExternalKubeInformerFactory implements [initializer.WantsExternalKubeInformerFactory].
func (p *plugin) SetExternalKubeInformerFactory(f informers.SharedInformerFactory) {
	p.namespaces, p.classes = f.Core().V1().Namespaces().Lister(), f.Node().V1().RuntimeClasses().Lister()
}

// ValidateInitialization implements [admission.InitializationValidator].
func (p *plugin) ValidateInitialization() error {
	if p.authorizer == nil || p.client == nil || p.namespaces == nil || p.classes == nil {
		return errors.New(PluginName + " lacks an authorizer, a client or informers")
	}
	return nil
}

// Validate implements [admission.ValidationInterface]: it sees the object as it
// is after everything that changes objects.
func (p *plugin) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	var err error
	switch object := a.GetObject().(type) {
	case *core.Namespace:
		// The subresources status and finalize carry labels too.
		err = p.namespace(ctx, a, object)
	case *core.Pod:
		err = p.pod(ctx, a, object)
	default:
		p.warn(ctx, a)
	}
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// namespace says why the label of a namespace may not become what it is to be.
func (p *plugin) namespace(ctx context.Context, a admission.Attributes, n *core.Namespace) error {
	before := ""
	if old, ok := a.GetOldObject().(*core.Namespace); ok {
		before = old.Labels[hostprocess.LabelAllow]
	}
	value, labelled := n.Labels[hostprocess.LabelAllow]
	if !labelled || value == before {
		return nil // who may change a namespace may take it away
	}
	if value != "true" && value != "false" {
		return fmt.Errorf(`the label %s is %q, which means nothing; set it to "true", or remove it`, hostprocess.LabelAllow, value)
	}
	if value == "false" {
		return nil
	}
	// For the whole cluster: a RoleBinding in the namespace, be it to
	// cluster-admin, is no say over the machines.
	decision, reason, err := p.authorizer.Authorize(ctx, authorizer.AttributesRecord{
		User: a.GetUserInfo(), Verb: hostprocess.VerbAllow, APIVersion: "*", Resource: "namespaces", Name: n.Name, ResourceRequest: true,
	})
	if decision == authorizer.DecisionAllow {
		return nil
	}
	if err != nil {
		reason = err.Error()
	}
	if reason != "" {
		reason = " (" + reason + ")"
	}
	return fmt.Errorf("user %q may not allow processes of the host by the label %s%s; have a ClusterRoleBinding give the verb %s on namespaces, or ask who has it",
		a.GetUserInfo().GetName(), hostprocess.LabelAllow, reason, hostprocess.VerbAllow)
}

// pod says why a pod may not become what it is to be.
func (p *plugin) pod(ctx context.Context, a admission.Attributes, pod *core.Pod) error {
	if old, ok := a.GetOldObject().(*core.Pod); ok && sameProcess(old, pod) {
		return nil // its status, its finalizers: whatever its namespace has become
	}
	// The mirror of a static pod runs nothing; the pod itself is root's, by a
	// file on the machine.
	if _, mirror := pod.Annotations[core.MirrorPodAnnotationKey]; mirror && slices.Contains(a.GetUserInfo().GetGroups(), user.NodesGroup) {
		return nil
	}
	return p.judge(ctx, a.GetNamespace(), pod)
}

// judge says why a namespace may not have a pod, if it is a process of the host.
func (p *plugin) judge(ctx context.Context, namespace string, inner *core.Pod) error {
	handler := ""
	if name := inner.Spec.RuntimeClassName; name != nil && *name != "" {
		class, err := p.class(ctx, *name)
		if err != nil {
			return err
		}
		handler = class.Handler
	}
	if handler != hostprocess.Handler {
		for _, name := range settings(inner) {
			warning.AddWarning(ctx, "", fmt.Sprintf("annotation %s means nothing to a container; set runtimeClassName: %s, or leave it out", name, hostprocess.Handler))
		}
		return nil
	}
	if err := p.allowed(ctx, namespace); err != nil {
		return err
	}
	var pod corev1.Pod
	if err := corev1conversion.Convert_core_Pod_To_v1_Pod(inner, &pod, nil); err != nil {
		return fmt.Errorf("read the pod: %w", err)
	}
	return hostprocess.Check(&pod)
}

// warn tells who makes a controller of pods what the pods will be told: they
// come later, when nobody listens.
func (p *plugin) warn(ctx context.Context, a admission.Attributes) {
	template := templateOf(a.GetObject())
	if template == nil || a.GetSubresource() != "" {
		return
	}
	if err := p.judge(ctx, a.GetNamespace(), &core.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}); err != nil {
		warning.AddWarning(ctx, "", "its pods will be refused: "+err.Error())
	}
}

// templateOf is the template of a controller's pods, nil for anything else.
func templateOf(o runtime.Object) *core.PodTemplateSpec {
	switch o := o.(type) {
	case *apps.Deployment:
		return &o.Spec.Template
	case *apps.ReplicaSet:
		return &o.Spec.Template
	case *apps.StatefulSet:
		return &o.Spec.Template
	case *apps.DaemonSet:
		return &o.Spec.Template
	case *batch.Job:
		return &o.Spec.Template
	case *batch.CronJob:
		return &o.Spec.JobTemplate.Spec.Template
	case *core.ReplicationController:
		return o.Spec.Template
	}
	return nil
}

// sameProcess tells whether an update leaves alone what a pod runs.
func sameProcess(old, pod *core.Pod) bool {
	is, was := settings(pod), settings(old)
	return equality.Semantic.DeepEqual(old.Spec, pod.Spec) && slices.Equal(is, was) &&
		!slices.ContainsFunc(is, func(name string) bool { return pod.Annotations[name] != old.Annotations[name] })
}

// settings are the names of a pod's annotations for processes of the host.
func settings(pod *core.Pod) (names []string) {
	for name := range pod.Annotations {
		if strings.HasPrefix(name, hostprocess.AnnotationPrefix) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// class is the class of a name, asked for when it is not known yet.
func (p *plugin) class(ctx context.Context, name string) (*nodev1.RuntimeClass, error) {
	class, err := p.classes.Get(name)
	if apierrors.IsNotFound(err) {
		class, err = p.client.NodeV1().RuntimeClasses().Get(ctx, name, metav1.GetOptions{})
	}
	if err != nil {
		return nil, fmt.Errorf("look up the pod's class: %w", err)
	}
	return class, nil
}

// allowed says why a namespace may not have processes of the host. It was
// perhaps labelled a moment ago, so a no is asked for again.
func (p *plugin) allowed(ctx context.Context, name string) error {
	if n, err := p.namespaces.Get(name); err == nil && hostprocess.Allowed(name, n.Labels) == nil {
		return nil
	}
	n, err := p.client.CoreV1().Namespaces().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look up whether the namespace may run processes of the host: %w", err)
	}
	return hostprocess.Allowed(name, n.Labels)
}
