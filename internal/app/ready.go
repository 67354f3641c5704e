package app

import (
	"cmp"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/utils/ptr"
)

// verdict says how far an object is on its way to being of use.
type verdict struct {
	Done bool
	// Failed says that it will not get there without being changed.
	Failed  bool
	Message string
}

func done(format string, args ...any) verdict {
	return verdict{Done: true, Message: fmt.Sprintf(format, args...)}
}

func waiting(format string, args ...any) verdict {
	return verdict{Message: fmt.Sprintf(format, args...)}
}

func failed(format string, args ...any) verdict {
	return verdict{Failed: true, Message: fmt.Sprintf(format, args...)}
}

// readiness has how to judge each kind that takes time to become of use.
// Every other kind is of use as soon as it exists.
var readiness = map[string]func(*unstructured.Unstructured) verdict{
	"Deployment.apps":       judge(deploymentReady),
	"StatefulSet.apps":      judge(statefulSetReady),
	"DaemonSet.apps":        judge(daemonSetReady),
	"ReplicaSet.apps":       judge(replicaSetReady),
	"Job.batch":             judge(jobReady),
	"Pod":                   judge(podReady),
	"PersistentVolumeClaim": judge(claimReady),
	"Service":               judge(serviceReady),
	"CustomResourceDefinition.apiextensions.k8s.io": judge(definitionReady),
}

// takesTime says whether an object of this kind has to be waited for.
func takesTime(r Ref) bool {
	_, ok := readiness[r.gvk().GroupKind().String()]
	return ok
}

// ready judges one object as it is.
func ready(u *unstructured.Unstructured) verdict {
	f, ok := readiness[u.GroupVersionKind().GroupKind().String()]
	switch {
	case u.GetDeletionTimestamp() != nil:
		return waiting("being removed")
	case !ok:
		return done("there")
	}
	return f(u)
}

func judge[T any](f func(*T) verdict) func(*unstructured.Unstructured) verdict {
	return func(u *unstructured.Unstructured) verdict {
		var t T
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(u.Object, &t); err != nil {
			return failed("cannot be read: %v", err)
		}
		return f(&t)
	}
}

func deploymentReady(d *appsv1.Deployment) verdict {
	want, s := ptr.Deref(d.Spec.Replicas, 1), d.Status
	if d.Generation > s.ObservedGeneration {
		return waiting("not seen by its controller yet")
	}
	for _, c := range s.Conditions {
		if c.Type == appsv1.DeploymentProgressing && c.Reason == "ProgressDeadlineExceeded" {
			return failed("%d of %d ready, no progress for too long; `tutti status` says why", s.AvailableReplicas, want)
		}
		if c.Type == appsv1.DeploymentReplicaFailure && c.Status == corev1.ConditionTrue {
			return waiting("%s", c.Message)
		}
	}
	return rolled(want, s.UpdatedReplicas, s.AvailableReplicas, s.Replicas)
}

func statefulSetReady(d *appsv1.StatefulSet) verdict {
	want, s := ptr.Deref(d.Spec.Replicas, 1), d.Status
	if d.Generation > s.ObservedGeneration {
		return waiting("not seen by its controller yet")
	}
	updated := s.UpdatedReplicas
	if s.UpdateRevision == s.CurrentRevision || d.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
		updated = want
	} else if u := d.Spec.UpdateStrategy.RollingUpdate; u != nil {
		updated += min(ptr.Deref(u.Partition, 0), want) // those may stay as they are
	}
	return rolled(want, updated, s.AvailableReplicas, s.Replicas)
}

func daemonSetReady(d *appsv1.DaemonSet) verdict {
	want, s := d.Status.DesiredNumberScheduled, d.Status
	if d.Generation > s.ObservedGeneration {
		return waiting("not seen by its controller yet")
	}
	updated := s.UpdatedNumberScheduled
	if d.Spec.UpdateStrategy.Type == appsv1.OnDeleteDaemonSetStrategyType {
		updated = want
	}
	return rolled(want, updated, s.NumberAvailable, want)
}

func replicaSetReady(d *appsv1.ReplicaSet) verdict {
	want, s := ptr.Deref(d.Spec.Replicas, 1), d.Status
	if d.Generation > s.ObservedGeneration {
		return waiting("not seen by its controller yet")
	}
	return rolled(want, want, s.AvailableReplicas, s.Replicas)
}

// rolled judges a set of pods: all there, all of the new kind, none too many.
func rolled(want, updated, available, all int32) verdict {
	switch {
	case updated < want:
		return waiting("%d of %d updated", updated, want)
	case available < want:
		return waiting("%d of %d ready", available, want)
	case all > want:
		return waiting("%d old to be stopped", all-want)
	}
	return done("%d of %d ready", available, want)
}

func jobReady(j *batchv1.Job) verdict {
	want := ptr.Deref(j.Spec.Completions, 1)
	for _, c := range j.Status.Conditions {
		if c.Status != corev1.ConditionTrue {
			continue
		}
		switch c.Type {
		case batchv1.JobComplete:
			return done("complete")
		case batchv1.JobFailed:
			return failed("%s: %s", c.Reason, c.Message)
		case batchv1.JobSuspended:
			return done("suspended")
		}
	}
	return waiting("%d of %d complete", j.Status.Succeeded, want)
}

func podReady(p *corev1.Pod) verdict {
	switch p.Status.Phase {
	case corev1.PodSucceeded:
		return done("complete")
	case corev1.PodFailed:
		return failed("%s", cmp.Or(podProblem(p), "failed"))
	}
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return done("ready")
		}
	}
	return waiting("%s", cmp.Or(podProblem(p), "starting"))
}

func claimReady(c *corev1.PersistentVolumeClaim) verdict {
	switch c.Status.Phase {
	case corev1.ClaimBound:
		return done("bound")
	case corev1.ClaimLost:
		return failed("has lost its volume; restore that, or delete the claim")
	}
	return waiting("waits for a volume")
}

// serviceReady waits for the address of a load balancer; every other Service
// is of use at once.
func serviceReady(s *corev1.Service) verdict {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer || len(s.Status.LoadBalancer.Ingress) > 0 {
		return done("there")
	}
	for _, c := range s.Status.Conditions {
		if c.Type == corev1.LoadBalancerPortsError && c.Status == metav1.ConditionTrue {
			return failed("%s", c.Message)
		}
	}
	return waiting("waits for an address")
}

func definitionReady(d *apiextensionsv1.CustomResourceDefinition) verdict {
	for _, c := range d.Status.Conditions {
		if c.Type == apiextensionsv1.NamesAccepted && c.Status == apiextensionsv1.ConditionFalse {
			return failed("%s", c.Message)
		}
		if c.Type == apiextensionsv1.Established && c.Status == apiextensionsv1.ConditionTrue {
			return done("established")
		}
	}
	return waiting("not established yet")
}
