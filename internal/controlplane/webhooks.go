package controlplane

import (
	"context"

	"k8s.io/apiserver/pkg/admission"
	mutatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/mutating"
	validatingwebhook "k8s.io/apiserver/pkg/admission/plugin/webhook/validating"
	"k8s.io/apiserver/pkg/authentication/user"
)

// bootstrapUser makes what every cluster of tutti has, at each start.
func bootstrapUser() user.Info { return User("tutti:bootstrap", user.SystemPrivilegedGroup) }

// sparing keeps webhooks away from what a machine must write to start: the bootstrap objects, and what its own agent
// says of the node and its pods. A webhook for everything, whose server has gone or is a pod that this machine has yet
// to start, would otherwise end every start, and with it the way to remove the webhook. Agents of other machines are
// not spared: webhooks may be what holds them to rules.
func sparing(nodeName string) admission.DecoratorFunc {
	own := map[string]bool{bootstrapUser().GetName(): true, Node(nodeName).GetName(): true}
	return func(plugin admission.Interface, name string) admission.Interface {
		if name == mutatingwebhook.PluginName || name == validatingwebhook.PluginName {
			return sparingPlugin{plugin, own}
		}
		return plugin
	}
}

type sparingPlugin struct {
	admission.Interface
	users map[string]bool
}

func (p sparingPlugin) spares(a admission.Attributes) bool {
	return a.GetUserInfo() != nil && p.users[a.GetUserInfo().GetName()]
}

// Admit implements [admission.MutationInterface].
func (p sparingPlugin) Admit(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	if plugin, ok := p.Interface.(admission.MutationInterface); ok && !p.spares(a) {
		return plugin.Admit(ctx, a, o)
	}
	return nil
}

// Validate implements [admission.ValidationInterface].
func (p sparingPlugin) Validate(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	if plugin, ok := p.Interface.(admission.ValidationInterface); ok && !p.spares(a) {
		return plugin.Validate(ctx, a, o)
	}
	return nil
}
