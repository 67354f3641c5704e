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
	// turn is held by who asks, also while pods are stopped for a critical one:
	// the next is asked about when it is clear what is left.
	turn  sync.Mutex
	rules []lifecycle.PodAdmitHandler
	// critical makes room for critical pods; nil makes none.
	critical lifecycle.AdmissionFailureHandler

	mu    sync.Mutex
	taken map[string]*v1.Pod // by UID, as their resources count
}

func newGate(ctx context.Context, node func() *v1.Node, unsafeSysctls []string) (*gate, error) {
	sysctls, err := sysctl.NewAllowlist(append(sysctl.SafeSysctlAllowlist(ctx), unsafeSysctls...))
	if err != nil {
		return nil, err
	}
	g := &gate{taken: map[string]*v1.Pod{}}
	fits := lifecycle.NewPredicateAdmitHandler(
		func(context.Context, bool) (*v1.Node, error) { return node(), nil }, g,
		func(*schedulerframework.NodeInfo, *lifecycle.PodAdmitAttributes) error { return nil },
	)
	g.rules = []lifecycle.PodAdmitHandler{sysctls, lifecycle.NewAppArmorAdmitHandler(apparmor.NewValidator()), fits}
	return g, nil
}

// HandleAdmissionFailure implements lifecycle.AdmissionFailureHandler: a pod
// for which there is not enough here has others stopped if it is critical.
func (g *gate) HandleAdmissionFailure(ctx context.Context, p *v1.Pod, reasons []lifecycle.PredicateFailureReason) ([]lifecycle.PredicateFailureReason, error) {
	if g.critical == nil {
		return reasons, nil
	}
	return g.critical.HandleAdmissionFailure(ctx, p, reasons)
}

// holds says whether a pod was taken and its place not yet given back.
func (g *gate) holds(uid string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.taken[uid] != nil
}

// take admits a pod or says why not. One that runs already is admitted.
func (g *gate) take(p *v1.Pod, runs bool) *pod.Refusal {
	if podutil.IsPodTerminal(p) {
		return nil
	}
	if runs || p.DeletionTimestamp != nil {
		g.keep(p)
		return nil
	}
	g.turn.Lock()
	defer g.turn.Unlock()
	if r := g.ask(p, lifecycle.AddOperation); r != nil {
		return r
	}
	g.keep(p)
	return nil
}

func (g *gate) keep(p *v1.Pod) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.taken[string(p.UID)] = p
}

// ask goes through the rules. g.turn is held.
func (g *gate) ask(p *v1.Pod, op lifecycle.Operation) *pod.Refusal {
	at := &lifecycle.PodAdmitAttributes{Pod: p, Operation: op}
	g.mu.Lock()
	for uid, other := range g.taken {
		if uid != string(p.UID) {
			at.OtherPods = append(at.OtherPods, other)
		}
	}
	g.mu.Unlock()
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
	g.turn.Lock()
	defer g.turn.Unlock()
	if !g.holds(string(p.UID)) {
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
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.taken[string(p.UID)] != nil { // it may have ended meanwhile
		// What it had until now, its status says a while longer; others need
		// not wait for that.
		now := *p
		now.Status = v1.PodStatus{Phase: p.Status.Phase}
		g.taken[string(p.UID)] = &now
	}
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
