package main

import (
	"context"
	"fmt"
	"os"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"
	apps "k8s.io/client-go/applyconfigurations/apps/v1"
	core "k8s.io/client-go/applyconfigurations/core/v1"
	owner "k8s.io/client-go/applyconfigurations/meta/v1"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/events"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	"sigs.k8s.io/controller-runtime/pkg/healthz"
	"sigs.k8s.io/controller-runtime/pkg/log/zap"
	metrics "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

const (
	finalizer  = group + "/farewell"
	fieldOwner = client.FieldOwner("websites")
)

// manage runs the operator: the leader reconciles, every instance serves the webhooks.
func manage(ctx context.Context) error {
	ctrl.SetLogger(zap.New(zap.UseDevMode(true)))
	config, err := ctrl.GetConfig()
	if err != nil {
		return err
	}
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return err
	}
	register(scheme)
	// Short, so that a test sees leadership move.
	lease, renew, retry := 3*time.Second, 2*time.Second, 300*time.Millisecond
	mgr, err := ctrl.NewManager(config, ctrl.Options{
		Scheme:                 scheme,
		LeaderElection:         true,
		LeaderElectionID:       "websites." + group,
		LeaseDuration:          &lease,
		RenewDeadline:          &renew,
		RetryPeriod:            &retry,
		Metrics:                metrics.Options{BindAddress: ":8080"},
		HealthProbeBindAddress: ":8081",
		WebhookServer:          webhook.NewServer(webhook.Options{Port: 9443, CertDir: "/certs"}),
	})
	if err != nil {
		return err
	}
	hooks := &webhooks{mgr.GetAPIReader()}
	if err := ctrl.NewWebhookManagedBy(mgr, &Website{}).WithDefaulter(hooks).WithValidator(hooks).Complete(); err != nil {
		return err
	}
	r := &reconciler{mgr.GetClient(), mgr.GetEventRecorder("websites")}
	if err := ctrl.NewControllerManagedBy(mgr).For(&Website{}).Owns(&corev1.ConfigMap{}).Owns(&appsv1.Deployment{}).Complete(r); err != nil {
		return err
	}
	if err := mgr.AddReadyzCheck("webhooks", mgr.GetWebhookServer().StartedChecker()); err != nil {
		return err
	}
	if err := mgr.AddHealthzCheck("ping", healthz.Ping); err != nil {
		return err
	}
	return mgr.Start(ctx)
}

type reconciler struct {
	client.Client
	events events.EventRecorder
}

// Reconcile makes a page's ConfigMap and Deployment what its spec says, and its status what they are.
func (r *reconciler) Reconcile(ctx context.Context, req ctrl.Request) (ctrl.Result, error) {
	var w Website
	if err := r.Get(ctx, req.NamespacedName, &w); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if !w.DeletionTimestamp.IsZero() {
		return ctrl.Result{}, r.farewell(ctx, &w)
	}
	if controllerutil.AddFinalizer(&w, finalizer) {
		return ctrl.Result{}, r.Update(ctx, &w)
	}
	if err := r.Apply(ctx, page(&w), fieldOwner, client.ForceOwnership); err != nil {
		return ctrl.Result{}, fmt.Errorf("apply the page: %w", err)
	}
	if err := r.Apply(ctx, servers(&w), fieldOwner, client.ForceOwnership); err != nil {
		return ctrl.Result{}, fmt.Errorf("apply the servers: %w", err)
	}
	return ctrl.Result{}, r.report(ctx, &w)
}

// farewell leaves a ConfigMap behind and lets the object go.
func (r *reconciler) farewell(ctx context.Context, w *Website) error {
	if !controllerutil.ContainsFinalizer(w, finalizer) {
		return nil
	}
	last := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: w.Namespace, Name: "farewell-" + w.Name},
		Data:       map[string]string{"greeting": w.Spec.Greeting},
	}
	if err := r.Create(ctx, last); err != nil && !apierrors.IsAlreadyExists(err) {
		return err
	}
	controllerutil.RemoveFinalizer(w, finalizer)
	return client.IgnoreNotFound(r.Update(ctx, w))
}

// report writes the status if it changed.
func (r *reconciler) report(ctx context.Context, w *Website) error {
	var d appsv1.Deployment
	if err := r.Get(ctx, client.ObjectKeyFromObject(w), &d); err != nil {
		return client.IgnoreNotFound(err) // its event comes when the cache has it
	}
	before := w.Status.copied()
	w.Status.Replicas, w.Status.ReadyReplicas = d.Status.Replicas, d.Status.ReadyReplicas
	w.Status.Selector = labels.FormatLabels(selector(w))
	ready := metav1.Condition{Type: "Ready", Status: metav1.ConditionFalse, Reason: "Starting", ObservedGeneration: w.Generation}
	if d.Status.ObservedGeneration == d.Generation && d.Status.ReadyReplicas == *w.Spec.Replicas && d.Status.UpdatedReplicas == *w.Spec.Replicas {
		ready.Status, ready.Reason = metav1.ConditionTrue, "Published"
	}
	meta.SetStatusCondition(&w.Status.Conditions, ready)
	if equality.Semantic.DeepEqual(before, w.Status) {
		return nil
	}
	published := ready.Status == metav1.ConditionTrue && !meta.IsStatusConditionTrue(before.Conditions, ready.Type)
	if err := r.Status().Update(ctx, w); err != nil {
		return err
	}
	if published {
		r.events.Eventf(w, &d, corev1.EventTypeNormal, "Published", "Publish", "%d pods serve the page", d.Status.ReadyReplicas)
	}
	return nil
}

func selector(w *Website) map[string]string { return map[string]string{"website": w.Name} }

func owned(w *Website) *owner.OwnerReferenceApplyConfiguration {
	return owner.OwnerReference().WithAPIVersion(group + "/v1").WithKind("Website").WithName(w.Name).WithUID(w.UID).
		WithController(true).WithBlockOwnerDeletion(true)
}

func page(w *Website) *core.ConfigMapApplyConfiguration {
	return core.ConfigMap(w.Name, w.Namespace).WithOwnerReferences(owned(w)).
		WithData(map[string]string{"index.html": w.Spec.Title + ": " + w.Spec.Greeting})
}

func servers(w *Website) *apps.DeploymentApplyConfiguration {
	return apps.Deployment(w.Name, w.Namespace).WithOwnerReferences(owned(w)).WithSpec(apps.DeploymentSpec().
		WithReplicas(*w.Spec.Replicas).
		WithSelector(owner.LabelSelector().WithMatchLabels(selector(w))).
		WithTemplate(core.PodTemplateSpec().WithLabels(selector(w)).WithSpec(core.PodSpec().
			WithTerminationGracePeriodSeconds(0).
			WithContainers(core.Container().
				WithName("httpd").
				WithImage("busybox:1").
				WithCommand("httpd", "-f", "-p", "8080", "-h", "/page").
				WithReadinessProbe(core.Probe().WithPeriodSeconds(1).
					WithHTTPGet(core.HTTPGetAction().WithPath("/index.html").WithPort(intstr.FromInt32(8080)))).
				WithVolumeMounts(core.VolumeMount().WithName("page").WithMountPath("/page"))).
			WithVolumes(core.Volume().WithName("page").WithConfigMap(core.ConfigMapVolumeSource().WithName(w.Name))))))
}

type webhooks struct {
	client.Reader
}

// Default fills in what a schema cannot.
func (*webhooks) Default(_ context.Context, w *Website) error {
	if w.Spec.Title == "" {
		w.Spec.Title = w.Name
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	if w.Annotations == nil {
		w.Annotations = map[string]string{}
	}
	w.Annotations[group+"/defaulted-by"] = host
	return nil
}

// ValidateCreate refuses a greeting that another page has, which no schema can know.
func (v *webhooks) ValidateCreate(ctx context.Context, w *Website) (admission.Warnings, error) {
	var all WebsiteList
	if err := v.List(ctx, &all, client.InNamespace(w.Namespace)); err != nil {
		return nil, err
	}
	for _, other := range all.Items {
		if other.Name != w.Name && other.Spec.Greeting == w.Spec.Greeting {
			return nil, fmt.Errorf("the greeting %q is taken by %s", w.Spec.Greeting, other.Name)
		}
	}
	if w.Spec.Tier == "fancy" {
		return admission.Warnings{"fancy pages are slow"}, nil
	}
	return nil, nil
}

// ValidateUpdate is the same.
func (v *webhooks) ValidateUpdate(ctx context.Context, _, w *Website) (admission.Warnings, error) {
	return v.ValidateCreate(ctx, w)
}

// ValidateDelete refuses to remove a page that says so.
func (*webhooks) ValidateDelete(_ context.Context, w *Website) (admission.Warnings, error) {
	if w.Annotations[group+"/keep"] != "" {
		return nil, fmt.Errorf("%s is to be kept", w.Name)
	}
	return nil, nil
}
