package agent

import (
	"context"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// objects reads what pods refer to, one by one: a node may read no more.
type objects struct{ client kubernetes.Interface }

// authorizationLag is how long the node authorizer may need to learn that a
// pod was bound here; until then it forbids what the pod refers to.
const authorizationLag = time.Second

func (o objects) GetConfigMap(ctx context.Context, namespace, name string) (m *v1.ConfigMap, err error) {
	err = allowed(ctx, func() error {
		m, err = o.client.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
	return m, err
}

func (o objects) GetSecret(ctx context.Context, namespace, name string) (s *v1.Secret, err error) {
	err = allowed(ctx, func() error {
		s, err = o.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
		return err
	})
	return s, err
}

// allowed repeats f for a short while as long as it is forbidden.
func allowed(ctx context.Context, f func() error) error {
	pause := 2 * time.Millisecond
	for until := time.Now().Add(authorizationLag); ; pause *= 2 {
		err := f()
		if !apierrors.IsForbidden(err) || time.Now().Add(pause).After(until) {
			return err
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
