package agent

import (
	"context"
	"errors"
	"sync"

	"github.com/opencontainers/selinux/go-selinux"
	v1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/kubelet/lifecycle"
	"k8s.io/kubernetes/pkg/kubelet/sysctl"
	schedulerframework "k8s.io/kubernetes/pkg/scheduler/framework"
	"k8s.io/kubernetes/pkg/security/apparmor"

	"tutti.dev/tutti/internal/agent/pod"
	"tutti.dev/tutti/internal/agent/probe"
)

// gate says which pods this machine takes. The scheduler has decided already;
// this catches what it could not know, and pods that were bound without it.
type gate struct {
	rules []lifecycle.PodAdmitHandler

	mu    sync.Mutex
	taken map[string]*v1.Pod // by UID, as their resources count
}

func newGate(ctx context.Context, node func() *v1.Node, unsafeSysctls []string) (*gate, error) {
	sysctls, err := sysctl.NewAllowlist(append(sysctl.SafeSysctlAllowlist(ctx), unsafeSysctls...))
	if err != nil {
		return nil, err
	}
	fits := lifecycle.NewPredicateAdmitHandler(
		func(context.Context, bool) (*v1.Node, error) { return node(), nil },
		lifecycle.NewAdmissionFailureHandlerStub(),
		func(*schedulerframework.NodeInfo, *lifecycle.PodAdmitAttributes) error { return nil },
	)
	return &gate{rules: []lifecycle.PodAdmitHandler{sysctls, lifecycle.NewAppArmorAdmitHandler(apparmor.NewValidator()), fits}, taken: map[string]*v1.Pod{}}, nil
}

// take admits a pod or says why not. One that runs already is admitted.
func (g *gate) take(p *v1.Pod, runs bool) *pod.Refusal {
	if podutil.IsPodTerminal(p) {
		return nil
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if !runs && p.DeletionTimestamp == nil {
		if r := g.ask(p, lifecycle.AddOperation); r != nil {
			return r
		}
	}
	g.taken[string(p.UID)] = p
	return nil
}

func (g *gate) ask(p *v1.Pod, op lifecycle.Operation) *pod.Refusal {
	at := &lifecycle.PodAdmitAttributes{Pod: p, Operation: op}
	for uid, other := range g.taken {
		if uid != string(p.UID) {
			at.OtherPods = append(at.OtherPods, other)
		}
	}
	if op == lifecycle.AddOperation {
		if err := cannot(p, selinux.GetEnabled()); err != nil {
			return &pod.Refusal{Reason: lifecycle.PodFeatureUnsupported, Message: err.Error()}
		}
	}
	for _, rule := range g.rules {
		if r := rule.Admit(at); !r.Admit {
			return &pod.Refusal{Reason: r.Reason, Message: r.Message}
		}
	}
	return nil
}

// cannot says what of the pod would otherwise be ignored. confined says that
// the kernel enforces SELinux: where it does not, labels mean nothing, as on
// any node.
func cannot(p *v1.Pod, confined bool) error {
	if len(p.Spec.ResourceClaims) > 0 {
		return errors.New("devices of resource claims are not supported by tutti yet; leave resourceClaims out")
	}
	labelled := p.Spec.SecurityContext != nil && p.Spec.SecurityContext.SELinuxOptions != nil
	for c := range podutil.ContainerIter(&p.Spec, podutil.AllContainers) {
		labelled = labelled || c.SecurityContext != nil && c.SecurityContext.SELinuxOptions != nil
	}
	if labelled && confined {
		return errors.New("SELinux labels are not supported by tutti yet; leave seLinuxOptions out")
	}
	return probe.CheckPeriods(p)
}

// resize admits new resources of a pod that was taken, or says why they wait
// (Deferred) or never can be (Infeasible).
func (g *gate) resize(p *v1.Pod, node *v1.Node) *pod.Refusal {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.taken[string(p.UID)] == nil {
		return nil
	}
	requests := resourcehelper.PodRequests(p, resourcehelper.PodResourcesOptions{})
	for _, name := range []v1.ResourceName{v1.ResourceCPU, v1.ResourceMemory} {
		want, has := requests[name], node.Status.Allocatable[name]
		if want.Cmp(has) > 0 {
			return &pod.Refusal{Reason: v1.PodReasonInfeasible, Message: "Node didn't have enough capacity: " + string(name) +
				", requested: " + want.String() + ", capacity: " + has.String()}
		}
	}
	if r := g.ask(p, lifecycle.ResizeOperation); r != nil {
		return &pod.Refusal{Reason: v1.PodReasonDeferred, Message: r.Message}
	}
	// What it had until now, its status says a while longer; others need not
	// wait for that.
	now := *p
	now.Status = v1.PodStatus{Phase: p.Status.Phase}
	g.taken[string(p.UID)] = &now
	return nil
}

// release gives a pod's place back and says whether it had one.
func (g *gate) release(uid string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	_, ok := g.taken[uid]
	delete(g.taken, uid)
	return ok
}
