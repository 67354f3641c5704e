package agent

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/userns"

	"tutti.dev/tutti/internal/runtime"
)

// users gives each pod that wants a user namespace (hostUsers: false, KEP-127)
// IDs of this machine that no other pod has. Which they are is kept in the
// pod's directory.
type users struct {
	a       *Agent
	manager *userns.UsernsManager
	fault   error // why no IDs can be given
}

func newUsers(a *Agent) *users {
	u := &users{a: a}
	u.manager, u.fault = userns.MakeUserNsManager(klog.Background(), u, nil)
	if u.fault != nil {
		a.log.Warn("pods cannot have user namespaces", "err", u.fault)
	}
	return u
}

// ownUsers says whether a pod wants a user namespace.
func ownUsers(p *v1.Pod) bool { return p.Spec.HostUsers != nil && !*p.Spec.HostUsers }

// of are the IDs of a pod, none when it has the machine's users.
func (u *users) of(p *v1.Pod, rt runtime.Runtime) (runtime.IDs, error) {
	if !ownUsers(p) {
		return runtime.IDs{}, nil
	}
	if err := canMapIDs(rt); err != nil {
		return runtime.IDs{}, err
	}
	if u.fault != nil {
		return runtime.IDs{}, fmt.Errorf("no user namespace can be given (%w); correct /etc/subuid and /etc/subgid for the user kubelet, or leave hostUsers out", u.fault)
	}
	ns, err := u.manager.GetOrCreateUserNamespaceMappings(klog.Background(), p, "")
	if err != nil {
		return runtime.IDs{}, fmt.Errorf("give the pod IDs of its own: %w", err)
	}
	m := ns.Uids[0]
	return runtime.IDs{First: m.HostId, Size: m.Length}, nil
}

// release takes back what a pod has, nothing of which may run.
func (u *users) release(uid string) {
	if u.fault == nil {
		u.manager.Release(klog.Background(), types.UID(uid))
	}
}

// canMapIDs says why a runtime cannot give pods a user namespace.
func canMapIDs(rt runtime.Runtime) error {
	mapper, ok := rt.(runtime.UserNamespaces)
	if !ok {
		return errors.New("the pod's RuntimeClass has no user namespaces; use the class container, or leave hostUsers out")
	}
	return mapper.CanMapIDs()
}

// HandlerSupportsUserNamespaces, like what follows, is for the manager.
func (u *users) HandlerSupportsUserNamespaces(string) (bool, error) { return true, nil }

func (u *users) GetMaxPods() int { return u.a.MaxPods }

func (u *users) GetPodDir(uid types.UID) string {
	return filepath.Join(u.a.DataDir, "pods", string(uid))
}

func (u *users) ListPodsFromDisk() ([]types.UID, error) {
	dirs, err := os.ReadDir(filepath.Join(u.a.DataDir, "pods"))
	var uids []types.UID
	for _, d := range dirs {
		uids = append(uids, types.UID(d.Name()))
	}
	return uids, err
}

// GetKubeletMappings is the range to give IDs from: as with a kubelet that of
// the user kubelet in /etc/subuid and /etc/subgid, if there is that user and
// the program getsubids, or else all above those of the first pod's size.
func (u *users) GetKubeletMappings(_ klog.Logger, size uint32) (first, length uint32, err error) {
	const name, program = "kubelet", "getsubids"
	_, err = user.Lookup(name)
	path, perr := exec.LookPath(program)
	if errors.As(err, new(user.UnknownUserError)) || errors.Is(perr, exec.ErrNotFound) {
		return size, -size, nil // to the end of 32 bits
	}
	if err = errors.Join(err, perr); err != nil {
		return 0, 0, err
	}
	uids, err := exec.Command(path, name).Output()
	gids, gerr := exec.Command(path, "-g", name).Output()
	if err = errors.Join(err, gerr); err != nil {
		return 0, 0, fmt.Errorf("ask %s for the range of the user %s: %w", program, name, err)
	}
	return subordinate(string(uids), string(gids))
}

// subordinate reads the one range that getsubids tells for users and groups:
// "0: kubelet 65536 4128768".
func subordinate(uids, gids string) (first, length uint32, err error) {
	if uids != gids {
		return 0, 0, fmt.Errorf("the ranges for users (%q) and groups (%q) differ", uids, gids)
	}
	if n, _ := fmt.Sscan(uids, new(string), new(string), &first, &length, new(string)); n != 4 {
		return 0, 0, fmt.Errorf("%q is not one range", uids)
	}
	return first, length, nil
}
