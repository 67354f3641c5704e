package agent

import (
	"context"
	"fmt"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/runtime"
)

// mayRun says why a pod may not be a process of the host, nil if it may or is
// none. Admission has asked already, but a RuntimeClass can be another by the
// time that its pods start, and static pods come without admission. Those are
// root's, whose directory their files are in: no namespace need allow them.
func (a *Agent) mayRun(ctx context.Context, p *v1.Pod, rt runtime.Runtime) error {
	if rt != a.Runtimes[hostprocess.Handler] {
		return nil
	}
	if err := hostprocess.Check(p); err != nil {
		return err
	}
	a.mu.Lock()
	static := a.static[p.UID] // an annotation would be anybody's
	a.mu.Unlock()
	if static {
		return nil
	}
	n, err := a.client.CoreV1().Namespaces().Get(ctx, p.Namespace, metav1.GetOptions{})
	if err != nil {
		return fmt.Errorf("look up whether the namespace may run processes of the host: %w", err)
	}
	return hostprocess.Allowed(p.Namespace, n.Labels)
}
