package container

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/host/namespace"
	"tutti.dev/tutti/internal/keeper"
	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/internal/runtime"
)

const (
	podFile = "pod.json"
	shmSize = 64 << 20
)

// Open implements runtime.Runtime. Each part of the ground is made if it is
// not there, so that an Open that was interrupted, or a machine that was
// restarted, is made good by the next.
func (r *Runtime) Open(ctx context.Context, pod runtime.Pod) (ground string, err error) {
	if pod.ID == "" || strings.ContainsAny(pod.ID, "/_") {
		return "", fmt.Errorf("%w: %q is no pod identifier", runtime.ErrInvalid, pod.ID)
	}
	defer r.locks.lock(pod.ID)()
	// A record that the machine's failure left empty is written again.
	rec, err := r.recorded(pod.ID)
	recorded := err == nil
	if !recorded {
		rec = record{Pod: pod}
	}
	if err := r.open(ctx, &rec, recorded); err != nil {
		return "", fmt.Errorf("open pod %s: %w", pod.ID, err)
	}
	return rec.Ground, nil
}

func (r *Runtime) open(ctx context.Context, rec *record, recorded bool) error {
	pod := rec.Pod
	dir := r.podDir(pod.ID)
	ns := filepath.Join(dir, "ns")
	if err := os.MkdirAll(ns, 0o711); err != nil {
		return err
	}
	// Nothing of a pod is without its control group, which ends with the
	// machine: where that is gone, so is the ground. The name is written first,
	// so that a ground never goes by that of an earlier one.
	anew := !cgroup.Exists(r.podCgroup(pod))
	if anew {
		rec.Ground = rand.Text()
	}
	if anew || !recorded {
		if err := r.write(*rec); err != nil {
			return err
		}
	}
	r.records.Store(pod.ID, *rec)
	if anew {
		if err := cgroup.Make(r.podCgroup(pod), limits(pod.Resources)); err != nil {
			return err
		}
	}
	if err := r.openNamespaces(pod, ns); err != nil {
		return err
	}
	if shm := filepath.Join(dir, "shm"); !pod.HostIPC && !mount.Is(shm) {
		if err := os.MkdirAll(shm, 0o755); err != nil {
			return err
		}
		if err := mount.Tmpfs(shm, shmSize, 0o777|os.ModeSticky); err != nil {
			return err
		}
		if err := os.Chown(shm, int(pod.IDs.First), int(pod.IDs.First)); err != nil {
			return err
		}
	}
	if pod.SharePID {
		return r.startPause(ctx, pod)
	}
	return nil
}

// record is what is kept of a pod.
type record struct {
	runtime.Pod
	Ground string `json:",omitempty"`
}

func (r *Runtime) write(rec record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	path := filepath.Join(r.podDir(rec.ID), podFile)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	if err := os.Rename(path+".new", path); err != nil {
		return err
	}
	r.records.Store(rec.ID, rec)
	return nil
}

// UpdatePod implements runtime.Runtime.
func (r *Runtime) UpdatePod(_ context.Context, podID string, res runtime.Resources) error {
	defer r.locks.lock(podID)()
	rec, err := r.recorded(podID)
	if err != nil {
		return fmt.Errorf("update pod: %w", err)
	}
	if reflect.DeepEqual(rec.Resources, res) {
		return nil
	}
	rec.Resources = res
	if err = cgroup.Make(r.podCgroup(rec.Pod), limits(res)); err == nil {
		err = r.write(rec)
	}
	if err != nil {
		return fmt.Errorf("update pod %s: %w", podID, err)
	}
	return nil
}

// openNamespaces makes the namespaces that are the pod's own but not held by
// a process. As with the UTS namespace of Kubernetes, a pod on the machine's
// network has the machine's name.
func (r *Runtime) openNamespaces(pod runtime.Pod, dir string) error {
	var kinds []namespace.Kind
	if !pod.HostIPC && !mount.Is(filepath.Join(dir, string(namespace.IPC))) {
		kinds = append(kinds, namespace.IPC)
	}
	own := pod.NetNS != ""
	if pod.IDs.Size > 0 {
		return r.setUpNamespaces(pod, dir)
	}
	if own && !pod.HostUTS && !mount.Is(filepath.Join(dir, string(namespace.UTS))) {
		kinds = append(kinds, namespace.UTS)
	}
	if len(kinds) == 0 && !(own && pod.HostUTS) {
		return nil
	}
	join := map[namespace.Kind]string{}
	if own {
		join[namespace.Net] = pod.NetNS
	}
	return namespace.Make(dir, kinds, join, func() error { return r.configureNamespaces(pod) })
}

// configureNamespaces sets what the pod asks for in the namespaces of the
// calling thread.
func (r *Runtime) configureNamespaces(pod runtime.Pod) error {
	sysctls := map[string]string{}
	if pod.NetNS != "" && !pod.HostUTS {
		if err := unix.Sethostname([]byte(pod.Hostname)); err != nil {
			return fmt.Errorf("set host name %q: %w", pod.Hostname, err)
		}
	}
	if pod.NetNS != "" {
		// As containerd does: a port below 1024 or a ping is no privilege in
		// a network of one's own.
		sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
		sysctls["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	for name, value := range pod.Sysctls {
		sysctls[name] = value
	}
	for name, value := range sysctls {
		if pod.IDs.Size > 0 && !isNetSysctl(name) {
			continue // only the pod's own root may: each container sets them
		}
		if err := setSysctl(name, value); err != nil {
			if _, asked := pod.Sysctls[name]; asked {
				return fmt.Errorf("%w: set sysctl %s=%s: %v", runtime.ErrInvalid, name, value, err)
			}
			r.Log.Debug("sysctl not set", "name", name, "err", err)
		}
	}
	return nil
}

func isNetSysctl(name string) bool {
	return strings.HasPrefix(name, "net.") || strings.HasPrefix(name, "net/")
}

// setSysctl sets a variable of the calling thread's namespaces. Dots separate
// the parts of a name; in one that has slashes they do not.
func setSysctl(name, value string) error {
	if !strings.Contains(name, "/") {
		name = strings.ReplaceAll(name, ".", "/")
	}
	for _, part := range strings.Split(name, "/") {
		if part == "" || part == "." || part == ".." {
			return errors.New("bad name")
		}
	}
	for _, namespaced := range []string{"net/", "kernel/shm", "kernel/msg", "kernel/sem", "fs/mqueue/"} {
		if strings.HasPrefix(name, namespaced) {
			return os.WriteFile("/proc/sys/"+name, []byte(value), 0)
		}
	}
	return errors.New("it belongs to the machine, not to the pod")
}

func (r *Runtime) pod(id string) (runtime.Pod, error) {
	rec, err := r.recorded(id)
	return rec.Pod, err
}

func (r *Runtime) recorded(id string) (rec record, err error) {
	if known, ok := r.records.Load(id); ok {
		return known.(record), nil
	}
	data, err := os.ReadFile(filepath.Join(r.podDir(id), podFile))
	if errors.Is(err, fs.ErrNotExist) {
		return rec, fmt.Errorf("pod %s: %w", id, runtime.ErrNotFound)
	}
	if err == nil {
		err = json.Unmarshal(data, &rec)
	}
	if err != nil {
		return rec, fmt.Errorf("read pod %s: %w", id, err)
	}
	return rec, nil
}

// Close implements runtime.Runtime.
func (r *Runtime) Close(ctx context.Context, podID string) error {
	if podID == "" || strings.ContainsAny(podID, "/_") {
		return fmt.Errorf("%w: %q is no pod identifier", runtime.ErrInvalid, podID)
	}
	defer r.locks.lock(podID)()
	if err := r.close(ctx, podID); err != nil {
		return fmt.Errorf("close pod %s: %w", podID, err)
	}
	return nil
}

func (r *Runtime) close(ctx context.Context, podID string) error {
	pod, err := r.pod(podID)
	if err != nil && !errors.Is(err, runtime.ErrNotFound) {
		r.Log.Warn("pod is unreadable, closing what there is of it", "pod", podID, "err", err)
	}
	all, err := r.Keeper.List(ctx)
	if err != nil {
		return err
	}
	// The list lacks what is being started just now, for a caller who did not
	// wait for it: to remove that waits.
	ids := map[string]bool{pauseID(podID): true}
	for _, w := range all {
		if w.GetEnvelope().GetLabels()[labelPod] == podID {
			ids[w.Id] = true
		}
	}
	attempts, err := filepath.Glob(filepath.Join(r.podDir(podID), "containers", "*", "*"))
	if err != nil {
		return err
	}
	for _, dir := range attempts {
		if attempt, err := strconv.Atoi(filepath.Base(dir)); err == nil {
			ids[runtime.ID{Pod: podID, Name: filepath.Base(filepath.Dir(dir)), Attempt: attempt}.String()] = true
		}
	}
	var wait sync.WaitGroup
	errs := make(chan error, len(ids))
	for id := range ids {
		wait.Go(func() { errs <- r.Keeper.Remove(ctx, id, true) })
	}
	wait.Wait()
	close(errs)
	for e := range errs {
		err = errors.Join(err, e)
	}
	if err != nil {
		return err
	}
	if pod.Cgroup != "" {
		if err := cgroup.Remove(r.podCgroup(pod)); err != nil {
			return err
		}
	}
	r.records.Delete(podID)
	return errors.Join(r.removeOpenRoots(podID), removeGround(r.podDir(podID)))
}

// pidNamespace opens the PID namespace of a running workload of the pod.
func (r *Runtime) pidNamespace(ctx context.Context, pod runtime.Pod, of runtime.ID) (*os.File, error) {
	if of.Pod != pod.ID {
		return nil, fmt.Errorf("%w: it belongs to another pod", runtime.ErrInvalid)
	}
	w, err := r.Keeper.Get(ctx, of.String())
	if err != nil {
		return nil, err
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/pid", w.Pid))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", runtime.ErrNotRunning, err)
	}
	// If it still runs, the number was nobody else's when we opened that.
	if w, err = r.Keeper.Get(ctx, of.String()); err == nil && !w.Running {
		err = runtime.ErrNotRunning
	}
	if err != nil {
		ns.Close()
		return nil, err
	}
	return ns, nil
}

// The first process of a shared PID namespace is a workload that this package
// does not show. Container names are not empty, so its name cannot be taken.
func pauseID(pod string) string { return runtime.ID{Pod: pod}.String() }

func isPause(w *protocol.Workload) bool { return w.GetEnvelope().GetLabels()[labelName] == "" }

// startPause makes sure that the pod's shared PID namespace has its init and
// is pinned.
func (r *Runtime) startPause(ctx context.Context, pod runtime.Pod) error {
	defer r.locks.lock("pause " + pod.ID)()
	pin := filepath.Join(r.podDir(pod.ID), "ns", string(namespace.PID))
	w, err := r.Keeper.Get(ctx, pauseID(pod.ID))
	if err == nil && w.Running && mount.Is(pin) {
		return nil
	}
	if err == nil && !w.Running {
		// All that was in the namespace went with it.
		err = r.Keeper.Remove(ctx, w.Id, false)
		if err == nil {
			err = keeper.ErrNotFound
		}
	}
	if err != nil && !errors.Is(err, keeper.ErrNotFound) {
		return err
	}
	if err != nil {
		if w, err = r.runPause(ctx, pod); err != nil {
			return fmt.Errorf("start init of the shared PID namespace: %w", err)
		}
	}
	if err := namespace.Unpin(pin); err != nil {
		return err
	}
	return namespace.Pin(fmt.Sprintf("/proc/%d/ns/pid", w.Pid), pin)
}
