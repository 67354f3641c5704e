package controlplane

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	schedulingv1 "k8s.io/kubernetes/pkg/apis/scheduling/v1"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// writers is how many objects are written at once; each waits for the disk.
const writers = 8

// reconcilePolicy brings Kubernetes' own roles, bindings and priority classes up to date, as the API server's start
// hooks of the same purpose do, but at once and side by side. Rights that somebody added are kept.
func reconcilePolicy(ctx context.Context, client kubernetes.Interface) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(writers)
	reconcile := func(what string, run func() error) {
		g.Go(func() error {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if err := retry.OnError(retry.DefaultBackoff, transient, run); err != nil {
				return fmt.Errorf("reconcile %s: %w", what, err)
			}
			return nil
		})
	}
	role := func(what string, owner reconciliation.RuleOwner, modifier reconciliation.RuleOwnerModifier) {
		reconcile(what, func() error {
			_, err := (&reconciliation.ReconcileRoleOptions{Role: owner, Client: modifier, Confirm: true}).Run()
			return err
		})
	}
	binding := func(what string, b reconciliation.RoleBinding, modifier reconciliation.RoleBindingModifier) {
		reconcile(what, func() error {
			_, err := (&reconciliation.ReconcileRoleBindingOptions{RoleBinding: b, Client: modifier, Confirm: true}).Run()
			return err
		})
	}
	rbac, namespaces := client.RbacV1(), client.CoreV1().Namespaces()
	for _, r := range clusterRoles() {
		role("cluster role "+r.Name, reconciliation.ClusterRoleRuleOwner{ClusterRole: &r}, reconciliation.ClusterRoleModifier{Client: rbac.ClusterRoles()})
	}
	for _, b := range clusterRoleBindings() {
		binding("cluster role binding "+b.Name, reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &b},
			reconciliation.ClusterRoleBindingClientAdapter{Client: rbac.ClusterRoleBindings()})
	}
	for _, roles := range bootstrappolicy.NamespaceRoles() {
		for _, r := range roles {
			role("role "+r.Namespace+"/"+r.Name, reconciliation.RoleRuleOwner{Role: &r}, reconciliation.RoleModifier{Client: rbac, NamespaceClient: namespaces})
		}
	}
	for _, bindings := range bootstrappolicy.NamespaceRoleBindings() {
		for _, b := range bindings {
			binding("role binding "+b.Namespace+"/"+b.Name, reconciliation.RoleBindingAdapter{RoleBinding: &b},
				reconciliation.RoleBindingClientAdapter{Client: rbac, NamespaceClient: namespaces})
		}
	}
	for _, class := range schedulingv1.SystemPriorityClasses() {
		reconcile("priority class "+class.Name, func() error {
			_, err := client.SchedulingV1().PriorityClasses().Create(ctx, class, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				return nil
			}
			return err
		})
	}
	return g.Wait()
}

func clusterRoles() []rbacv1.ClusterRole {
	return append(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles()...)
}

func clusterRoleBindings() []rbacv1.ClusterRoleBinding {
	return append(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings()...)
}

// transient reports whether an error of the API server goes away by itself while it starts, or was a race.
func transient(err error) bool {
	return apierrors.IsConflict(err) || apierrors.IsServiceUnavailable(err) || apierrors.IsTooManyRequests(err) ||
		apierrors.IsServerTimeout(err) || apierrors.IsInternalError(err) || apierrors.IsAlreadyExists(err)
}

// policyInForce waits until the authorizer, which reads roles from informers, has seen every role and binding. Before
// that, controllers would be refused and back off.
func policyInForce(ctx context.Context, shared informers.SharedInformerFactory) error {
	roles, bindings := shared.Rbac().V1().ClusterRoles().Lister(), shared.Rbac().V1().ClusterRoleBindings().Lister()
	return until(ctx, "roles to come into force", func() (bool, error) {
		haveRoles, err := roles.List(labels.Everything())
		if err != nil {
			return false, err
		}
		haveBindings, err := bindings.List(labels.Everything())
		if err != nil {
			return false, err
		}
		known := make(map[string]bool, len(haveRoles)+len(haveBindings))
		for _, r := range haveRoles {
			known["role "+r.Name] = true
		}
		for _, b := range haveBindings {
			known["binding "+b.Name] = true
		}
		for _, r := range clusterRoles() {
			if !known["role "+r.Name] {
				return false, nil
			}
		}
		for _, b := range clusterRoleBindings() {
			if !known["binding "+b.Name] {
				return false, nil
			}
		}
		return true, nil
	})
}

// step is the time between two looks at a fact that cannot be waited for.
const step = 5 * time.Millisecond

// until waits for a fact. It ends early when ctx ends or when looking fails.
func until(ctx context.Context, what string, is func() (bool, error)) error {
	t := time.NewTicker(step)
	defer t.Stop()
	for {
		ok, err := is()
		if err != nil {
			return fmt.Errorf("wait for %s: %w", what, err)
		}
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w", what, context.Cause(ctx))
		case <-t.C:
		}
	}
}
