package controlplane

import (
	"fmt"
	"os"
	"path/filepath"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	auditv1 "k8s.io/apiserver/pkg/apis/audit/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"sigs.k8s.io/yaml"
)

// auditPolicy records who changed what, and who read what from outside. It leaves out what machines say all day.
func auditPolicy() *auditv1.Policy {
	const never = auditv1.LevelNone
	return &auditv1.Policy{
		TypeMeta:   metav1.TypeMeta{APIVersion: auditv1.SchemeGroupVersion.String(), Kind: "Policy"},
		OmitStages: []auditv1.Stage{auditv1.StageRequestReceived},
		Rules: []auditv1.PolicyRule{
			{Level: never, NonResourceURLs: []string{"/healthz*", "/livez*", "/readyz*", "/version", "/openapi/*"}},
			{Level: never, Resources: []auditv1.GroupResources{
				{Group: "", Resources: []string{"events"}},
				{Group: "events.k8s.io", Resources: []string{"events"}},
				{Group: "coordination.k8s.io", Resources: []string{"leases"}},
			}},
			{Level: never, UserGroups: []string{user.NodesGroup, "system:serviceaccounts:kube-system"}, Verbs: []string{"get", "list", "watch"}},
			{Level: never, Users: []string{user.APIServerUser, user.KubeScheduler, user.KubeControllerManager, user.KubeProxy, DNSUser, VolumesUser},
				Verbs: []string{"get", "list", "watch"}},
			{Level: never, UserGroups: []string{user.NodesGroup}, Resources: []auditv1.GroupResources{{Resources: []string{"pods/status", "nodes/status"}}}},
			{Level: auditv1.LevelMetadata},
		},
	}
}

// auditTo has requests recorded in dir/audit.log, without ever making a request wait for it.
func auditTo(o *genericoptions.AuditOptions, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make the audit directory: %w", err)
	}
	b, err := yaml.Marshal(auditPolicy())
	if err != nil {
		return fmt.Errorf("write the audit policy: %w", err)
	}
	o.PolicyFile = filepath.Join(dir, "policy.yaml")
	if err := os.WriteFile(o.PolicyFile, b, 0o600); err != nil {
		return fmt.Errorf("write the audit policy: %w", err)
	}
	o.LogOptions.Path = filepath.Join(dir, "audit.log")
	o.LogOptions.MaxSize = 50 // MB
	o.LogOptions.MaxBackups = 4
	o.LogOptions.MaxAge = 30 // days
	o.LogOptions.BatchOptions.Mode = genericoptions.ModeBatch
	return nil
}
