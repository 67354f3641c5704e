package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
	watchtools "k8s.io/client-go/tools/watch"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/test/e2e/machine"
)

const (
	namespace = "bench"
	image     = "busybox:1"
	patience  = 2 * time.Minute
)

func benchTutti(r *report, m *machine.Machine, rootfs string, o options) error {
	info, err := os.Stat(m.Binary())
	if err != nil {
		return err
	}
	if err := r.add(figure{Subject: "tutti", Name: "size of the binary", Unit: "MiB", Value: mib(info.Size())}); err != nil {
		return err
	}
	if err := timeUp(r, m, "empty data directory to ready"); err != nil {
		return err
	}
	defer m.Purge()
	file, err := archive(rootfs)
	if err != nil {
		return err
	}
	if run := m.Tutti("image", "import", file, image); run.Err != nil {
		return errors.New(run.String())
	}
	ctx := context.Background()
	client, err := connect(m)
	if err != nil {
		return err
	}
	if err := makeNamespace(ctx, client); err != nil {
		return err
	}

	time.Sleep(o.settle)
	idle, err := machineMemory(m)
	if err != nil {
		return err
	}
	for _, part := range []struct {
		name   string
		memory machine.Memory
	}{{"server", idle.server}, {"keeper", idle.keeper}} {
		for _, f := range []figure{
			{Name: "idle memory of the " + part.name + ", RSS", Value: mib(part.memory.RSS)},
			{Name: "idle memory of the " + part.name + ", PSS", Value: mib(part.memory.PSS)},
			{Name: "idle memory of the " + part.name + ", anonymous", Value: mib(part.memory.Anonymous)},
		} {
			f.Subject, f.Unit = "tutti", "MiB"
			if err := r.add(f); err != nil {
				return err
			}
		}
	}

	for _, k := range kinds {
		if err := benchPods(ctx, r, m, client, k, o); err != nil {
			return err
		}
	}
	if run := m.Tutti("stop"); run.Err != nil {
		return errors.New(run.String())
	}
	return timeUp(r, m, "data directory with data to ready")
}

// kind is one of pods: containers, and programs of the machine.
type kind struct{ name, several, class, image string }

var kinds = []kind{{name: "pod", several: "pods", image: image}, {name: "process", several: "processes", class: hostprocess.Handler, image: hostprocess.Image}}

func benchPods(ctx context.Context, r *report, m *machine.Machine, client kubernetes.Interface, k kind, o options) error {
	var took []time.Duration
	for i := range o.n {
		d, err := timePods(ctx, client, k, []string{fmt.Sprintf("one-%d", i)})
		if err != nil {
			return err
		}
		took = append(took, d)
		if err := deletePods(ctx, client); err != nil {
			return err
		}
	}
	if err := r.add(repeated("tutti", "one "+k.name+", create to Ready", took)); err != nil {
		return err
	}

	idle, err := machineMemory(m)
	if err != nil {
		return err
	}
	var names []string
	for i := range o.pods {
		names = append(names, fmt.Sprintf("many-%d", i))
	}
	d, err := timePods(ctx, client, k, names)
	if err != nil {
		return err
	}
	if err := r.add(figure{Subject: "tutti", Name: fmt.Sprintf("%d %s at once, first create to last Ready", o.pods, k.several), Unit: "ms", Value: ms(d)}); err != nil {
		return err
	}
	time.Sleep(o.settle)
	busy, err := machineMemory(m)
	if err != nil {
		return err
	}
	each := figure{Subject: "tutti", Name: "memory added for each " + k.name + ", without its own processes, PSS", Unit: "MiB", Value: mib((busy.overhead - idle.overhead) / int64(o.pods))}
	if err := r.add(each); err != nil {
		return err
	}
	return deletePods(ctx, client)
}

func timeUp(r *report, m *machine.Machine, name string) error {
	begin := time.Now()
	if err := m.Up(); err != nil {
		return err
	}
	return r.add(figure{Subject: "tutti", Name: name, Unit: "ms", Value: ms(time.Since(begin))})
}

// connect makes a client as any other, but through the machine's network.
func connect(m *machine.Machine) (kubernetes.Interface, error) {
	config, err := clientcmd.BuildConfigFromFlags("", filepath.Join(m.Dir, "admin.kubeconfig"))
	if err != nil {
		return nil, err
	}
	config.Dial, config.QPS = m.Dial, -1
	return kubernetes.NewForConfig(config)
}

func makeNamespace(ctx context.Context, client kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace, Labels: map[string]string{hostprocess.LabelAllow: "true"}}}, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	w, err := client.CoreV1().ServiceAccounts(namespace).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=default"})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		if e.Type == watch.Added {
			return nil
		}
	}
	return errors.New("no service account appeared in the namespace")
}

// timePods creates pods, several at once, and returns how long it took from
// before the first was sent until a watching client had seen all Ready.
func timePods(ctx context.Context, client kubernetes.Interface, k kind, names []string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	pods := client.CoreV1().Pods(namespace)
	list, err := pods.List(ctx, metav1.ListOptions{})
	if err != nil {
		return 0, err
	}
	// The API server may end a watch whose reader falls behind.
	w, err := watchtools.NewRetryWatcherWithContext(ctx, list.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return pods.Watch(ctx, o) },
	})
	if err != nil {
		return 0, err
	}
	defer w.Stop()
	const hands = 10
	work, failed := make(chan string), make(chan error, hands)
	begin := time.Now()
	for range min(hands, len(names)) {
		go func() {
			for name := range work {
				if _, err := pods.Create(ctx, sleeper(name, k), metav1.CreateOptions{}); err != nil {
					failed <- err
					cancel()
					return
				}
			}
		}()
	}
	go func() {
		defer close(work)
		for _, n := range names {
			select {
			case work <- n:
			case <-ctx.Done():
				return
			}
		}
	}()
	ready := map[string]bool{}
	for e := range w.ResultChan() {
		pod, ok := e.Object.(*corev1.Pod)
		if !ok {
			return 0, fmt.Errorf("watch pods: %v", e.Object)
		}
		for _, c := range pod.Status.Conditions {
			if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				ready[pod.Name] = true
			}
		}
		if len(ready) == len(names) {
			return time.Since(begin), nil
		}
	}
	select {
	case err := <-failed:
		return 0, fmt.Errorf("create a pod: %w", err)
	default:
		return 0, fmt.Errorf("%d of %d pods became Ready within %v", len(ready), len(names), patience)
	}
}

func sleeper(name string, k kind) *corev1.Pod {
	var grace int64
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.PodSpec{
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "main", Image: k.image, Command: []string{"/bin/sleep", "100000"}, ImagePullPolicy: corev1.PullNever,
			}},
		},
	}
	if k.class != "" {
		pod.Spec.RuntimeClassName = &k.class
	}
	return pod
}

// deletePods deletes every pod and waits until they are gone.
func deletePods(ctx context.Context, client kubernetes.Interface) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	pods := client.CoreV1().Pods(namespace)
	if err := pods.DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		return err
	}
	for {
		list, err := pods.List(ctx, metav1.ListOptions{})
		if err != nil {
			return fmt.Errorf("wait until the pods are gone: %w", err)
		}
		if len(list.Items) == 0 {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// memory is what tutti uses on a machine.
type memory struct {
	server, keeper machine.Memory
	overhead       int64 // PSS of every process but those that the pods ask for
}

func machineMemory(m *machine.Machine) (memory, error) {
	var all memory
	processes, err := m.Processes()
	if err != nil {
		return all, err
	}
	server, err := m.Server()
	if err != nil {
		return all, err
	}
	keeper, err := m.Keeper()
	if err != nil {
		return all, err
	}
	for _, p := range processes {
		if p.Name() == "sleep" {
			continue
		}
		used, err := p.Memory()
		if err != nil {
			continue // it has gone
		}
		all.overhead += used.PSS
		switch p.PID {
		case server.PID:
			all.server = used
		case keeper.PID:
			all.keeper = used
		}
	}
	return all, nil
}
