package controlplane

import (
	"context"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/authentication/user"

	"tutti.dev/tutti/internal/api/hostprocess"
)

// hostAccess lets somebody who may do everything in a namespace, and change any namespace, look for a way to run a
// process of the host; then the right to allow it is given.
func (p *probe) hostAccess(t *testing.T, ctx context.Context) {
	const ns = "tenants"
	p.namespace(t, ctx, p.admin, ns)
	tess := p.as(User("tess", user.AllAuthenticated))
	create := metav1.CreateOptions{}
	to := []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacGroup, Name: "tess"}}
	role := func(kind, name string) rbacv1.RoleRef {
		return rbacv1.RoleRef{APIGroup: rbacGroup, Kind: kind, Name: name}
	}
	clusterRole := func(name string, rules ...rbacv1.PolicyRule) {
		t.Helper()
		if _, err := p.admin.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}, create); err != nil {
			t.Fatal(err)
		}
		if _, err := p.admin.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: name}, RoleRef: role("ClusterRole", name), Subjects: to}, create); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := p.admin.RbacV1().RoleBindings(ns).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "all"}, RoleRef: role("ClusterRole", "cluster-admin"), Subjects: to}, create); err != nil {
		t.Fatal(err)
	}
	namespaces := []string{"namespaces", "namespaces/status", "namespaces/finalize"}
	clusterRole("namespaces", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: namespaces, Verbs: []string{"get", "create", "update", "patch"}})
	eventually(t, ctx, "the right to change namespaces", func() (bool, error) {
		_, err := tess.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		if apierrors.IsForbidden(err) {
			return false, nil
		}
		return err == nil, err
	})
	// In the namespace she may give herself any right, this one too.
	own := &rbacv1.Role{ObjectMeta: metav1.ObjectMeta{Name: "own"}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: namespaces[:1], Verbs: []string{hostprocess.VerbAllow}}}}
	if _, err := tess.RbacV1().Roles(ns).Create(ctx, own, create); err != nil {
		t.Fatal(err)
	}
	if _, err := tess.RbacV1().RoleBindings(ns).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "own"}, RoleRef: role("Role", "own"), Subjects: to}, create); err != nil {
		t.Fatal(err)
	}
	if _, err := p.admin.NodeV1().RuntimeClasses().Create(ctx, &nodev1.RuntimeClass{ObjectMeta: metav1.ObjectMeta{Name: "innocent"}, Handler: hostprocess.Handler}, create); err != nil {
		t.Fatal(err)
	}

	all := tess.CoreV1().Namespaces()
	with := func(labels map[string]string) *corev1.Namespace {
		n, err := all.Get(ctx, ns, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		maps.Copy(n.Labels, labels)
		return n
	}
	allow := map[string]string{hostprocess.LabelAllow: "true"}
	patch := []byte(`{"metadata": {"labels": {"` + hostprocess.LabelAllow + `": "true"}}}`)
	apply := []byte(`{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "tenants", "labels": {"` + hostprocess.LabelAllow + `": "true"}}}`)
	process := func(name, class string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}}, Spec: corev1.PodSpec{
			RuntimeClassName: &class, Containers: []corev1.Container{{Name: "c", Image: hostprocess.Image}}}}
	}
	pods := tess.CoreV1().Pods(ns)
	static := process("static", "process")
	static.Annotations = map[string]string{corev1.MirrorPodAnnotationKey: "x"}
	static.Spec.NodeName = "n1"
	label, pod := "may not allow processes of the host by the label", `namespace "tenants" may not run processes of the host`
	for what, tt := range map[string]struct {
		err  error
		want string
	}{
		"another namespace":    {errOf(all.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "another", Labels: allow}}, create)), label},
		"one without a name":   {errOf(all.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "another-", Labels: allow}}, create)), label},
		"update":               {errOf(all.Update(ctx, with(allow), metav1.UpdateOptions{})), label},
		"status":               {errOf(all.UpdateStatus(ctx, with(allow), metav1.UpdateOptions{})), label},
		"finalize":             {errOf(all.Finalize(ctx, with(allow), metav1.UpdateOptions{})), label},
		"merge patch":          {errOf(all.Patch(ctx, ns, types.MergePatchType, patch, metav1.PatchOptions{})), label},
		"patch of status":      {errOf(all.Patch(ctx, ns, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")), label},
		"apply":                {errOf(all.Patch(ctx, ns, types.ApplyPatchType, apply, metav1.PatchOptions{FieldManager: "tess"})), label},
		"apply to a new one":   {errOf(all.Patch(ctx, "new", types.ApplyPatchType, []byte(strings.Replace(string(apply), ns, "new", 1)), metav1.PatchOptions{FieldManager: "tess"})), label},
		"pod":                  {errOf(pods.Create(ctx, process("pod", "process"), create)), pod},
		"pod of another class": {errOf(pods.Create(ctx, process("other", "innocent"), create)), pod},
		"mirror pod":           {errOf(pods.Create(ctx, static, create)), pod},
	} {
		if !apierrors.IsForbidden(tt.err) || !strings.Contains(tt.err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %s", what, tt.err, tt.want)
		}
	}
	for _, role := range []string{"admin", "edit", "view"} {
		r, err := p.admin.RbacV1().ClusterRoles().Get(ctx, role, metav1.GetOptions{})
		if err != nil || slices.ContainsFunc(r.Rules, func(r rbacv1.PolicyRule) bool {
			return slices.Contains(r.Resources, "namespaces") && (slices.Contains(r.Verbs, hostprocess.VerbAllow) || slices.Contains(r.Verbs, "*"))
		}) {
			t.Errorf("role %s may allow processes of the host, %v", role, err)
		}
	}

	d := deployment(ns, "legacy", "")
	d.Spec.Template.Spec.RuntimeClassName = process("", "process").Spec.RuntimeClassName
	if _, err := tess.AppsV1().Deployments(ns).Create(ctx, d, create); err != nil {
		t.Fatal(err)
	}
	eventually(t, ctx, "the replica set's complaint", func() (bool, error) {
		events, err := p.admin.CoreV1().Events(ns).List(ctx, metav1.ListOptions{FieldSelector: "reason=FailedCreate"})
		return err == nil && slices.ContainsFunc(events.Items, func(e corev1.Event) bool { return strings.Contains(e.Message, pod) }), err
	})
	if list, err := pods.List(ctx, metav1.ListOptions{}); err != nil || len(list.Items) > 0 {
		t.Errorf("pods %v, %v", list.Items, err)
	}

	clusterRole("allow-host", rbacv1.PolicyRule{APIGroups: []string{""}, Resources: namespaces[:1], ResourceNames: []string{ns}, Verbs: []string{hostprocess.VerbAllow}})
	eventually(t, ctx, "the right to allow processes of the host", func() (bool, error) {
		_, err := all.Patch(ctx, ns, types.MergePatchType, patch, metav1.PatchOptions{})
		if apierrors.IsForbidden(err) {
			return false, nil
		}
		return err == nil, err
	})
	if _, err := all.Patch(ctx, "shop", types.MergePatchType, patch, metav1.PatchOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the right for one namespace is good for another: %v", err)
	}
	p.bound(t, ctx, tess, ns, "legacy")
	if _, err := pods.Create(ctx, process("pod", "innocent"), create); err != nil {
		t.Error(err)
	}
}
