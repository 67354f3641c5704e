package podvolume

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
)

const (
	// rootCA is written once per namespace, by the control plane, and is in
	// every pod: it is cached, and read again when a token is renewed after
	// rootCAFor. Everything else is read when it is needed and watched.
	rootCA    = "kube-root-ca.crt"
	rootCAFor = 10 * time.Minute
)

// retryForbidden repeats a request that the API refuses because it has not
// seen yet that the pod runs here. That takes milliseconds.
func retryForbidden[T any](ctx context.Context, request func() (T, error)) (T, error) {
	return retry(ctx, apierrors.IsForbidden, request)
}

func retry[T any](ctx context.Context, passing func(error) bool, request func() (T, error)) (T, error) {
	for pause := 2 * time.Millisecond; ; pause *= 2 {
		result, err := request()
		if err == nil || !passing(err) || pause > 300*time.Millisecond {
			return result, err
		}
		select {
		case <-ctx.Done():
			return result, err
		case <-time.After(pause):
		}
	}
}

// key names a ConfigMap or Secret.
type key struct {
	secret          bool
	namespace, name string
}

// objects reads what volumes are written from, and watches it for the pods
// that use it.
type objects struct {
	client  kubernetes.Interface
	log     *slog.Logger
	changed func(types.UID, key)
	ctx     context.Context
	cancel  context.CancelFunc

	mu      sync.Mutex
	watches map[key]*objectWatch
	rootCAs map[string]cachedRootCA // by namespace
}

type objectWatch struct {
	pods   map[types.UID]string // the version each has
	latest *string              // the version last heard of, nil before any
	cancel context.CancelFunc
}

type cachedRootCA struct {
	configMap *v1.ConfigMap
	read      time.Time
}

func newObjects(client kubernetes.Interface, log *slog.Logger, changed func(types.UID, key)) *objects {
	o := &objects{client: client, log: log, changed: changed, watches: map[key]*objectWatch{}, rootCAs: map[string]cachedRootCA{}}
	o.ctx, o.cancel = context.WithCancel(context.Background())
	return o
}

func (o *objects) close() { o.cancel() }

func (o *objects) configMap(ctx context.Context, namespace, name string) (*v1.ConfigMap, error) {
	if name == rootCA {
		o.mu.Lock()
		cached, ok := o.rootCAs[namespace]
		o.mu.Unlock()
		if ok && time.Since(cached.read) < rootCAFor {
			return cached.configMap, nil
		}
	}
	cm, err := retryForbidden(ctx, func() (*v1.ConfigMap, error) {
		return o.client.CoreV1().ConfigMaps(namespace).Get(ctx, name, metav1.GetOptions{})
	})
	if err == nil && name == rootCA {
		o.mu.Lock()
		// Those of namespaces that have gone would stay for ever.
		maps.DeleteFunc(o.rootCAs, func(_ string, c cachedRootCA) bool { return time.Since(c.read) >= rootCAFor })
		o.rootCAs[namespace] = cachedRootCA{cm, time.Now()}
		o.mu.Unlock()
	}
	return cm, err
}

func (o *objects) secret(ctx context.Context, namespace, name string) (*v1.Secret, error) {
	return retryForbidden(ctx, func() (*v1.Secret, error) {
		return o.client.CoreV1().Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	})
}

// token asks for a token of the pod's service account that ends with the pod.
func (o *objects) token(ctx context.Context, pod *v1.Pod, source *v1.ServiceAccountTokenProjection) (*authenticationv1.TokenRequest, error) {
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		ExpirationSeconds: source.ExpirationSeconds,
		BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID},
	}}
	if source.Audience != "" {
		request.Spec.Audiences = []string{source.Audience}
	}
	passing := func(err error) bool { return apierrors.IsForbidden(err) || apierrors.IsNotFound(err) }
	return retry(ctx, passing, func() (*authenticationv1.TokenRequest, error) {
		return o.client.CoreV1().ServiceAccounts(pod.Namespace).CreateToken(ctx, pod.Spec.ServiceAccountName, request, metav1.CreateOptions{})
	})
}

// use says which objects a pod's volumes were written from, each with its
// version ("" when it was missing). The objects are watched until the pod no
// longer uses them.
func (o *objects) use(pod types.UID, versions map[key]string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for k, w := range o.watches {
		if _, ok := versions[k]; !ok {
			o.drop(k, w, pod)
		}
	}
	for k, version := range versions {
		w := o.watches[k]
		if w == nil {
			w = &objectWatch{pods: map[types.UID]string{}}
			var ctx context.Context
			ctx, w.cancel = context.WithCancel(o.ctx)
			o.watches[k] = w
			go o.watch(ctx, k, w)
		}
		if _, ok := w.pods[pod]; !ok && w.latest != nil && *w.latest != version {
			// The others were told between this pod's reading and now.
			go o.changed(pod, k)
		}
		w.pods[pod] = version
	}
}

func (o *objects) forget(pod types.UID) { o.use(pod, nil) }

func (o *objects) drop(k key, w *objectWatch, pod types.UID) {
	delete(w.pods, pod)
	if len(w.pods) == 0 {
		w.cancel()
		delete(o.watches, k)
	}
}

// watch runs until ctx ends and tells each pod whose version is not the
// object's.
func (o *objects) watch(ctx context.Context, k key, w *objectWatch) {
	options := metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, k.name).String()}
	for pause := time.Second; ; pause = min(pause*2, time.Minute) {
		events, err := o.open(ctx, k, options)
		if err == nil {
			pause = time.Second
			o.deliver(ctx, k, w, events)
		} else if !errors.Is(err, context.Canceled) {
			o.log.Debug("cannot watch an object of a volume", "namespace", k.namespace, "name", k.name, "secret", k.secret, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause/2 + rand.N(pause)):
		}
	}
}

func (o *objects) open(ctx context.Context, k key, options metav1.ListOptions) (watch.Interface, error) {
	if k.secret {
		return o.client.CoreV1().Secrets(k.namespace).Watch(ctx, options)
	}
	return o.client.CoreV1().ConfigMaps(k.namespace).Watch(ctx, options)
}

// deliver handles the events of one watch, which begins with the object as it
// is.
func (o *objects) deliver(ctx context.Context, k key, w *objectWatch, events watch.Interface) {
	defer events.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case event, ok := <-events.ResultChan():
			if !ok || event.Type == watch.Error {
				return
			}
			object, err := meta.Accessor(event.Object)
			if err != nil || object.GetName() != k.name {
				continue
			}
			version := object.GetResourceVersion()
			if event.Type == watch.Deleted {
				version = ""
			}
			o.mu.Lock()
			w.latest = &version
			var stale []types.UID
			for pod, has := range w.pods {
				if has != version {
					stale = append(stale, pod)
				}
			}
			o.mu.Unlock()
			for _, pod := range stale {
				o.changed(pod, k)
			}
		}
	}
}
