package controlplane

import (
	"context"
	"fmt"
	"net/netip"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	applyadmission "k8s.io/client-go/applyconfigurations/admissionregistration/v1"
	applycore "k8s.io/client-go/applyconfigurations/core/v1"
	applydiscovery "k8s.io/client-go/applyconfigurations/discovery/v1"
	applynode "k8s.io/client-go/applyconfigurations/node/v1"
	applyrbac "k8s.io/client-go/applyconfigurations/rbac/v1"
	applystorage "k8s.io/client-go/applyconfigurations/storage/v1"
	"k8s.io/client-go/kubernetes"
	applyregistration "k8s.io/kube-aggregator/pkg/client/applyconfiguration/apiregistration/v1"
	registration "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/controlplane/metrics"
	"tutti.dev/tutti/internal/controlplane/pki"
)

const (
	// fieldManager owns the fields that bootstrap sets.
	fieldManager = "tutti"
	// Provisioner is the provisioner of the default storage class.
	Provisioner = "tutti.dev/local"

	rbacGroup = "rbac.authorization.k8s.io"
	dnsName   = "kube-dns"
)

// bootstrap makes the objects that every cluster of tutti has, and repairs them where they were changed. It may run at
// every start.
func bootstrap(ctx context.Context, client kubernetes.Interface, cfg Config) error {
	force := metav1.ApplyOptions{FieldManager: fieldManager, Force: true}
	for _, r := range ownRoles() {
		if _, err := client.RbacV1().ClusterRoles().Apply(ctx, r, force); err != nil {
			return fmt.Errorf("apply cluster role %s: %w", *r.Name, err)
		}
	}
	for _, b := range ownBindings() {
		if _, err := client.RbacV1().ClusterRoleBindings().Apply(ctx, b, force); err != nil {
			return fmt.Errorf("apply cluster role binding %s: %w", *b.Name, err)
		}
	}
	for _, handler := range []string{"container", hostprocess.Handler} {
		if _, err := client.NodeV1().RuntimeClasses().Apply(ctx, applynode.RuntimeClass(handler).WithHandler(handler), force); err != nil {
			return fmt.Errorf("apply runtime class %s: %w", handler, err)
		}
	}
	if _, err := client.StorageV1().StorageClasses().Apply(ctx, localStorage(), force); err != nil {
		return fmt.Errorf("apply storage class local: %w", err)
	}
	if err := applyNodesOwnVolumes(ctx, client, force); err != nil {
		return err
	}
	return applyDNS(ctx, client, cfg, force)
}

// applyDNS makes the Service by which pods reach names. Its address is fixed, so a Service with another one is replaced.
func applyDNS(ctx context.Context, client kubernetes.Interface, cfg Config, force metav1.ApplyOptions) error {
	services := client.CoreV1().Services(metav1.NamespaceSystem)
	service := dnsService(cfg.DNSAddress)
	// Addresses are handed out only when the allocator knows its range, a moment after the API serves.
	err := until(ctx, "service "+dnsName, func() (bool, error) {
		_, err := services.Apply(ctx, service, force)
		if err != nil && transient(err) {
			return false, nil
		}
		return err == nil, err
	})
	if err != nil {
		return fmt.Errorf("apply service %s: %w", dnsName, err)
	}
	if _, err := client.DiscoveryV1().EndpointSlices(metav1.NamespaceSystem).Apply(ctx, dnsEndpoint(cfg.Advertise), force); err != nil {
		return fmt.Errorf("apply endpoint slice %s: %w", dnsName, err)
	}
	return nil
}

func dnsService(address netip.Addr) *applycore.ServiceApplyConfiguration {
	port := func(name string, p corev1.Protocol) *applycore.ServicePortApplyConfiguration {
		return applycore.ServicePort().WithName(name).WithPort(53).WithProtocol(p)
	}
	return applycore.Service(dnsName, metav1.NamespaceSystem).
		WithLabels(map[string]string{"k8s-app": dnsName, "kubernetes.io/cluster-service": "true"}).
		WithSpec(applycore.ServiceSpec().
			WithClusterIP(address.String()).
			WithPorts(port("dns", corev1.ProtocolUDP), port("dns-tcp", corev1.ProtocolTCP)))
}

func dnsEndpoint(address netip.Addr) *applydiscovery.EndpointSliceApplyConfiguration {
	family := discoveryv1.AddressTypeIPv4
	if address.Is6() {
		family = discoveryv1.AddressTypeIPv6
	}
	port := func(name string, p corev1.Protocol) *applydiscovery.EndpointPortApplyConfiguration {
		return applydiscovery.EndpointPort().WithName(name).WithPort(53).WithProtocol(p)
	}
	return applydiscovery.EndpointSlice(dnsName, metav1.NamespaceSystem).
		WithLabels(map[string]string{discoveryv1.LabelServiceName: dnsName, discoveryv1.LabelManagedBy: "tutti"}).
		WithAddressType(family).
		WithEndpoints(applydiscovery.Endpoint().
			WithAddresses(address.String()).
			WithConditions(applydiscovery.EndpointConditions().WithReady(true))).
		WithPorts(port("dns", corev1.ProtocolUDP), port("dns-tcp", corev1.ProtocolTCP))
}

func localStorage() *applystorage.StorageClassApplyConfiguration {
	return applystorage.StorageClass("local").
		WithAnnotations(map[string]string{"storageclass.kubernetes.io/is-default-class": "true"}).
		WithProvisioner(Provisioner).
		WithReclaimPolicy(corev1.PersistentVolumeReclaimDelete).
		WithAllowVolumeExpansion(true).
		WithVolumeBindingMode(storagev1.VolumeBindingWaitForFirstConsumer)
}

func rule(groups, resources []string, verbs ...string) *applyrbac.PolicyRuleApplyConfiguration {
	return applyrbac.PolicyRule().WithAPIGroups(groups...).WithResources(resources...).WithVerbs(verbs...)
}

// ownRoles are the rights of tutti's own identities, and what the cluster's roles gain by what tutti serves.
func ownRoles() []*applyrbac.ClusterRoleApplyConfiguration {
	repositories := func(verbs ...string) *applyrbac.PolicyRuleApplyConfiguration {
		return rule([]string{api.RegistryGroup}, []string{api.RegistryResource}, verbs...)
	}
	return []*applyrbac.ClusterRoleApplyConfiguration{
		// Those who may view pods may see what they use.
		applyrbac.ClusterRole("tutti:metrics-reader").
			WithLabels(map[string]string{rbacGroup + "/aggregate-to-view": "true"}).
			WithRules(rule([]string{metrics.Group}, []string{"nodes", "pods"}, "get", "list")),
		// Who may see a namespace's objects may pull its images, who may edit them may push.
		applyrbac.ClusterRole("tutti:registry-view").WithLabels(map[string]string{rbacGroup + "/aggregate-to-view": "true"}).
			WithRules(repositories("get", "list")),
		applyrbac.ClusterRole("tutti:registry-edit").WithLabels(map[string]string{rbacGroup + "/aggregate-to-edit": "true"}).
			WithRules(repositories("update", "delete")),
		applyrbac.ClusterRole("tutti:registry-pull").WithRules(repositories("get")),
		// What is mirrored, everybody may have whose pods may.
		applyrbac.ClusterRole("tutti:registry-mirrors").
			WithRules(rule([]string{api.RegistryGroup}, []string{api.MirrorResource}, "get")),
		// A node asks again what admission has asked: whether a namespace may run processes of the host.
		applyrbac.ClusterRole("tutti:node-namespaces").WithRules(rule([]string{""}, []string{"namespaces"}, "get")),
		applyrbac.ClusterRole(DNSUser).WithRules(
			rule([]string{""}, []string{"services"}, "list", "watch"),
			rule([]string{"discovery.k8s.io"}, []string{"endpointslices"}, "list", "watch"),
		),
		applyrbac.ClusterRole(VolumesUser).WithRules(
			rule([]string{""}, []string{"persistentvolumes"}, "get", "list", "watch", "create", "update", "delete"),
			rule([]string{""}, []string{"persistentvolumeclaims"}, "get", "list", "watch"),
			rule([]string{""}, []string{"persistentvolumeclaims/status"}, "update"),
			rule([]string{""}, []string{"nodes"}, "get", "list", "watch"),
			rule([]string{"storage.k8s.io"}, []string{"storageclasses"}, "get", "list", "watch"),
			rule([]string{"", "events.k8s.io"}, []string{"events"}, "create", "update", "patch"),
		),
	}
}

// registerMetrics puts metrics.k8s.io on the list of API groups. No Service is named: this server has it.
func registerMetrics(ctx context.Context, client registration.APIServiceInterface) error {
	name := metrics.Version + "." + metrics.Group
	service := applyregistration.APIService(name).WithSpec(applyregistration.APIServiceSpec().
		WithGroup(metrics.Group).WithVersion(metrics.Version).WithGroupPriorityMinimum(100).WithVersionPriority(100))
	if _, err := client.Apply(ctx, service, metav1.ApplyOptions{FieldManager: fieldManager, Force: true}); err != nil {
		return fmt.Errorf("apply API service %s: %w", name, err)
	}
	return nil
}

// ownBindings give users their roles. system:kube-proxy has its own from Kubernetes. On machines that join, all parts of
// the agent are their node: it may read what Services are made of, and provide volumes, within nodesOwnVolumes.
func ownBindings() []*applyrbac.ClusterRoleBindingApplyConfiguration {
	bind := func(name, kind, subject, role string) *applyrbac.ClusterRoleBindingApplyConfiguration {
		return applyrbac.ClusterRoleBinding(name).
			WithSubjects(applyrbac.Subject().WithKind(kind).WithAPIGroup(rbacGroup).WithName(subject)).
			WithRoleRef(applyrbac.RoleRef().WithKind("ClusterRole").WithAPIGroup(rbacGroup).WithName(role))
	}
	return []*applyrbac.ClusterRoleBindingApplyConfiguration{
		bind(DNSUser, rbacv1.UserKind, DNSUser, DNSUser),
		bind(VolumesUser, rbacv1.UserKind, VolumesUser, VolumesUser),
		bind(RegistryUser, rbacv1.UserKind, RegistryUser, "system:auth-delegator"),
		bind("tutti:node-services", rbacv1.GroupKind, user.NodesGroup, "system:node-proxier"),
		bind("tutti:node-volumes", rbacv1.GroupKind, user.NodesGroup, VolumesUser),
		bind("tutti:registry-pull", rbacv1.GroupKind, user.NodesGroup, "tutti:registry-pull"),
		bind("tutti:node-namespaces", rbacv1.GroupKind, user.NodesGroup, "tutti:node-namespaces"),
		bind("tutti:registry-mirrors", rbacv1.GroupKind, user.AllAuthenticated, "tutti:registry-mirrors"),
		bind("tutti:kubelet-api-admin", rbacv1.UserKind, pki.KubeletClientName, "system:kubelet-api-admin"),
	}
}

// nodesOwnVolumes keeps a node from touching any other volumes than the local ones that are on it.
const nodesOwnVolumes = "node-volumes.tutti.dev"

func applyNodesOwnVolumes(ctx context.Context, client kubernetes.Interface, force metav1.ApplyOptions) error {
	policies := client.AdmissionregistrationV1()
	policy := applyadmission.ValidatingAdmissionPolicy(nodesOwnVolumes).WithSpec(applyadmission.ValidatingAdmissionPolicySpec().
		WithFailurePolicy(admissionv1.Fail).
		WithMatchConstraints(applyadmission.MatchResources().WithResourceRules(applyadmission.NamedRuleWithOperations().
			WithAPIGroups("").WithAPIVersions("v1").WithResources("persistentvolumes").
			WithOperations(admissionv1.Create, admissionv1.Update, admissionv1.Delete))).
		WithMatchConditions(applyadmission.MatchCondition().WithName("nodes").WithExpression("'" + user.NodesGroup + "' in request.userInfo.groups")).
		WithValidations(applyadmission.Validation().
			WithMessage("a node may provide only local volumes of its own; name it in their node affinity").
			WithExpression(`[object, oldObject].filter(v, v != null).all(v, has(v.spec.local) && has(v.spec.nodeAffinity) &&
				v.spec.nodeAffinity.required.nodeSelectorTerms.all(t, has(t.matchExpressions) && t.matchExpressions.exists(e,
					e.key == '` + corev1.LabelHostname + `' && e.operator == 'In' && e.values.all(n, 'system:node:' + n == request.userInfo.username))))`)))
	if _, err := policies.ValidatingAdmissionPolicies().Apply(ctx, policy, force); err != nil {
		return fmt.Errorf("apply admission policy %s: %w", nodesOwnVolumes, err)
	}
	binding := applyadmission.ValidatingAdmissionPolicyBinding(nodesOwnVolumes).WithSpec(applyadmission.ValidatingAdmissionPolicyBindingSpec().
		WithPolicyName(nodesOwnVolumes).WithValidationActions(admissionv1.Deny))
	if _, err := policies.ValidatingAdmissionPolicyBindings().Apply(ctx, binding, force); err != nil {
		return fmt.Errorf("apply the binding of admission policy %s: %w", nodesOwnVolumes, err)
	}
	return nil
}
