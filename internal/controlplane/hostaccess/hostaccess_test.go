package hostaccess

import (
	"context"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/warning"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/kubernetes/pkg/apis/apps"
	"k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api/hostprocess"
)

var (
	alice  = &user.DefaultInfo{Name: "alice"}
	tenant = &user.DefaultInfo{Name: "tenant", Groups: []string{user.AllAuthenticated}}
	node   = &user.DefaultInfo{Name: "system:node:n1", Groups: []string{user.NodesGroup}}
)

// onlyAlice may allow processes of the host, and only if the question is about
// the cluster's namespaces, not about what is in one.
type onlyAlice struct{}

func (onlyAlice) Authorize(_ context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	if a.GetUser().GetName() == "alice" && a.GetVerb() == "allow-host" && a.GetResource() == "namespaces" && a.GetAPIGroup() == "" && a.GetName() != "" && a.GetNamespace() == "" {
		return authorizer.DecisionAllow, "", nil
	}
	return authorizer.DecisionNoOpinion, "", nil
}

// cluster is what the plugin is given: informers that know of what is cached,
// and an API that has all.
type cluster struct {
	informers informers.SharedInformerFactory
	all       []runtime.Object
}

// Initialize implements [admission.PluginInitializer].
func (c cluster) Initialize(i admission.Interface) {
	p := i.(*plugin)
	p.SetExternalKubeInformerFactory(c.informers)
	p.SetExternalKubeClientSet(fake.NewClientset(c.all...))
	p.SetAuthorizer(onlyAlice{})
}

func newPlugin(t *testing.T, cached, all []runtime.Object) *plugin {
	t.Helper()
	c := cluster{informers.NewSharedInformerFactory(fake.NewClientset(), 0), all}
	for _, o := range cached {
		store := c.informers.Core().V1().Namespaces().Informer().GetStore()
		if _, is := o.(*nodev1.RuntimeClass); is {
			store = c.informers.Node().V1().RuntimeClasses().Informer().GetStore()
		}
		if err := store.Add(o); err != nil {
			t.Fatal(err)
		}
	}
	plugins := admission.NewPlugins()
	Register(plugins)
	p, err := plugins.InitPlugin(PluginName, nil, c)
	if err != nil {
		t.Fatal(err)
	}
	return p.(*plugin)
}

func labelled(value string) *core.Namespace {
	n := &core.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"a": "b"}}}
	if value != "" {
		n.Labels[hostprocess.LabelAllow] = value
	}
	return n
}

func TestNamespaces(t *testing.T) {
	const (
		refused = `user "tenant" may not allow processes of the host by the label tutti.dev/allow-host; have a ClusterRoleBinding give the verb allow-host on namespaces, or ask who has it`
		unknown = `the label tutti.dev/allow-host is "yes", which means nothing; set it to "true", or remove it`
	)
	p := newPlugin(t, nil, nil)
	for name, tt := range map[string]struct {
		who         user.Info
		old, new    *core.Namespace
		subresource string
		want        string // in the message, "" for none
	}{
		"made without":                 {who: tenant, new: labelled("")},
		"made with":                    {who: tenant, new: labelled("true"), want: refused},
		"made with, by who may":        {who: alice, new: labelled("true")},
		"labelled":                     {who: tenant, old: labelled(""), new: labelled("true"), want: refused},
		"labelled by its status":       {who: tenant, old: labelled(""), new: labelled("true"), subresource: "status", want: refused},
		"labelled by its finalization": {who: tenant, old: labelled(""), new: labelled("true"), subresource: "finalize", want: refused},
		"labelled by who may":          {who: alice, old: labelled(""), new: labelled("true")},
		"from false to true":           {who: tenant, old: labelled("false"), new: labelled("true"), want: refused},
		"changed beside it":            {who: tenant, old: labelled("true"), new: func() *core.Namespace { n := labelled("true"); n.Labels["a"] = "c"; return n }()},
		"taken away":                   {who: tenant, old: labelled("true"), new: labelled("")},
		"to false":                     {who: tenant, old: labelled("true"), new: labelled("false")},
		"to nonsense":                  {who: alice, old: labelled("true"), new: labelled("yes"), want: unknown},
	} {
		t.Run(name, func(t *testing.T) {
			op, old := admission.Create, runtime.Object(nil)
			if tt.old != nil {
				op, old = admission.Update, tt.old
			}
			a := admission.NewAttributesRecord(tt.new, old, core.Kind("Namespace").WithVersion("v1"), "shop", "shop",
				core.Resource("namespaces").WithVersion("v1"), tt.subresource, op, nil, false, tt.who)
			check(t, p.Validate(t.Context(), a, nil), tt.want)
		})
	}
}

func check(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil {
		t.Errorf("refused: %v", err)
	}
	if want != "" && (err == nil || !strings.Contains(err.Error(), "forbidden: "+want)) {
		t.Errorf("got %v, want %s", err, want)
	}
}

func namespace(name string, labels ...string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		n.Labels[k] = v
	}
	return n
}

func class(name, handler string) *nodev1.RuntimeClass {
	return &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Handler: handler}
}

// of is a pod of a class.
func of(class string, change ...func(*core.Pod)) *core.Pod {
	p := &core.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: core.PodSpec{
		SecurityContext: &core.PodSecurityContext{}, Containers: []core.Container{{Name: "c", Image: "host"}},
	}}
	if class != "" {
		p.Spec.RuntimeClassName = &class
	}
	for _, c := range change {
		c(p)
	}
	return p
}

func TestPods(t *testing.T) {
	const (
		closed   = `namespace "closed" may not run processes of the host; label it tutti.dev/allow-host=true, or leave runtimeClassName out`
		baseline = `namespace "baseline" enforces the Pod Security level baseline, and no process of the host meets it; label it pod-security.kubernetes.io/enforce=privileged, or leave runtimeClassName out`
		users    = "a process of the host has no users of its own (hostUsers: false)"
	)
	allow := hostprocess.LabelAllow + "=true"
	cached := []runtime.Object{
		class("process", "process"), class("innocent", "process"), class("container", "container"),
		namespace("closed"), namespace("shut", hostprocess.LabelAllow+"=false"), namespace("open", allow), namespace("late"),
		namespace("baseline", allow, "pod-security.kubernetes.io/enforce=baseline"), namespace("loose", allow, "pod-security.kubernetes.io/enforce=privileged"),
	}
	// What the informers do not know yet.
	all := []runtime.Object{class("new", "process"), namespace("late", allow), namespace("closed"), namespace("shut", hostprocess.LabelAllow+"=false"),
		namespace("baseline", allow, "pod-security.kubernetes.io/enforce=baseline")}
	p := newPlugin(t, cached, all)

	mirror := func(p *core.Pod) { p.Annotations = map[string]string{core.MirrorPodAnnotationKey: "x"} }
	debugged := func(p *core.Pod) {
		p.Spec.EphemeralContainers = []core.EphemeralContainer{{EphemeralContainerCommon: core.EphemeralContainerCommon{Name: "d", Image: "host"}}}
	}
	for name, tt := range map[string]struct {
		who         user.Info
		in          string
		old, new    *core.Pod
		subresource string
		want        string
	}{
		"container":                        {who: tenant, in: "closed", new: of("container")},
		"no class":                         {who: tenant, in: "closed", new: of("")},
		"process":                          {who: tenant, in: "closed", new: of("process"), want: closed},
		"the administrator's, too":         {who: alice, in: "closed", new: of("process"), want: closed},
		"another class with the handler":   {who: tenant, in: "closed", new: of("innocent"), want: closed},
		"a class of a moment ago":          {who: tenant, in: "closed", new: of("new"), want: closed},
		"no such class":                    {who: tenant, in: "open", new: of("missing"), want: `look up the pod's class: runtimeclasses.node.k8s.io "missing" not found`},
		"labelled false":                   {who: tenant, in: "shut", new: of("process"), want: `namespace "shut" may not`},
		"no such namespace":                {who: tenant, in: "nowhere", new: of("process"), want: "look up whether the namespace may run processes of the host"},
		"allowed":                          {who: tenant, in: "open", new: of("process")},
		"allowed a moment ago":             {who: tenant, in: "late", new: of("process")},
		"allowed, but baseline":            {who: tenant, in: "baseline", new: of("process"), want: baseline},
		"allowed and privileged":           {who: tenant, in: "loose", new: of("process")},
		"asks for what there is not":       {who: tenant, in: "open", new: of("process", func(p *core.Pod) { p.Spec.SecurityContext.HostUsers = ptr.To(false) }), want: users},
		"a container may ask":              {who: tenant, in: "open", new: of("container", func(p *core.Pod) { p.Spec.SecurityContext.HostUsers = ptr.To(false) })},
		"a node's mirror":                  {who: node, in: "closed", new: of("process", mirror)},
		"another's mirror":                 {who: tenant, in: "closed", new: of("process", mirror), want: closed},
		"a node's pod":                     {who: node, in: "closed", new: of("process"), want: closed},
		"status":                           {who: node, in: "closed", old: of("process"), new: of("process", func(p *core.Pod) { p.Status.Phase = core.PodRunning }), subresource: "status"},
		"metadata":                         {who: tenant, in: "closed", old: of("process"), new: of("process", func(p *core.Pod) { p.Labels = map[string]string{"a": "b"} })},
		"another image":                    {who: tenant, in: "closed", old: of("process"), new: of("process", func(p *core.Pod) { p.Spec.Containers[0].Image = "other" }), want: closed},
		"another annotation":               {who: tenant, in: "closed", old: of("process"), new: of("process", func(p *core.Pod) { p.Annotations = map[string]string{"process.tutti.dev/root": "shared"} }), want: closed},
		"an ephemeral container":           {who: tenant, in: "closed", old: of("process"), new: of("process", debugged), subresource: "ephemeralcontainers", want: closed},
		"an ephemeral container, allowed":  {who: tenant, in: "open", old: of("process"), new: of("process", debugged), subresource: "ephemeralcontainers"},
		"an ephemeral one of a container":  {who: tenant, in: "closed", old: of("container"), new: of("container", debugged), subresource: "ephemeralcontainers"},
		"an ephemeral one of a lost class": {who: tenant, in: "open", old: of("missing"), new: of("missing", debugged), subresource: "ephemeralcontainers", want: "look up the pod's class"},
	} {
		t.Run(name, func(t *testing.T) {
			op, old := admission.Create, runtime.Object(nil)
			if tt.old != nil {
				op, old = admission.Update, tt.old
			}
			a := admission.NewAttributesRecord(tt.new, old, core.Kind("Pod").WithVersion("v1"), tt.in, "p",
				core.Resource("pods").WithVersion("v1"), tt.subresource, op, nil, false, tt.who)
			check(t, p.Validate(t.Context(), a, nil), tt.want)
		})
	}

	t.Run("warnings", func(t *testing.T) {
		const meaningless = "annotation process.tutti.dev/root means nothing to a container; set runtimeClassName: process, or leave it out"
		annotated := map[string]string{"process.tutti.dev/root": "shared", "other": "x"}
		for _, tt := range []struct{ in, class, want string }{
			{"open", "process", ""},
			{"closed", "process", "its pods will be refused: " + closed},
			{"closed", "container", meaningless},
			{"closed", "", meaningless},
		} {
			var told recorder
			pod := of(tt.class)
			pod.Annotations = annotated
			d := &apps.Deployment{Spec: apps.DeploymentSpec{Template: core.PodTemplateSpec{ObjectMeta: pod.ObjectMeta, Spec: pod.Spec}}}
			a := admission.NewAttributesRecord(d, nil, apps.Kind("Deployment").WithVersion("v1"), tt.in, "d",
				schema.GroupVersionResource{Group: "apps", Version: "v1", Resource: "deployments"}, "", admission.Create, nil, false, tenant)
			if err := p.Validate(warning.WithWarningRecorder(t.Context(), &told), a, nil); err != nil {
				t.Error(err)
			}
			if got := strings.Join(told, "\n"); got != tt.want {
				t.Errorf("%s in %s: told %q, want %q", tt.class, tt.in, got, tt.want)
			}
		}
	})
}

type recorder []string

func (r *recorder) AddWarning(_, text string) { *r = append(*r, text) }
