package agent

import (
	"errors"
	"log/slog"
	"os"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"tutti.dev/tutti/internal/runtime"
)

// mapper is a runtime with user namespaces.
type mapper struct {
	runtime.Runtime
	runtime.UserNamespaces
}

func (mapper) CanMapIDs() error { return nil }

// No two pods have an ID in common, also when the agent has been started
// again meanwhile; what a pod had is given again once it is gone.
func TestUserIDs(t *testing.T) {
	a := &Agent{Config: Config{DataDir: t.TempDir(), MaxPods: 250}, log: slog.New(slog.DiscardHandler)}
	of := func(u *users, uid string) runtime.IDs {
		t.Helper()
		ids, err := u.of(&v1.Pod{ObjectMeta: metav1.ObjectMeta{UID: types.UID(uid)}, Spec: v1.PodSpec{HostUsers: new(bool)}}, mapper{})
		if err != nil {
			t.Fatal(err)
		}
		if ids.Size != 65536 || ids.First < 65536 || ids.First%65536 != 0 {
			t.Fatalf("%s has IDs %+v", uid, ids)
		}
		return ids
	}
	u := newUsers(a)
	one, two := of(u, "one"), of(u, "two")
	again := newUsers(a)
	three := of(again, "three")
	if one == two || one == three || two == three {
		t.Errorf("IDs %+v %+v %+v", one, two, three)
	}
	if got := of(again, "one"); got != one {
		t.Errorf("IDs became %+v, were %+v", got, one)
	}
	again.release("one")
	if _, err := os.Stat(again.GetPodDir("one") + "/userns"); !os.IsNotExist(err) {
		t.Errorf("after release: %v", err)
	}
	u.fault = errors.New("why")
	const says = "no user namespace can be given (why); correct /etc/subuid and /etc/subgid for the user kubelet, or leave hostUsers out"
	if _, err := u.of(&v1.Pod{Spec: v1.PodSpec{HostUsers: new(bool)}}, mapper{}); err == nil || err.Error() != says {
		t.Errorf("without a range: %v", err)
	}
	if ids, err := u.of(&v1.Pod{}, nil); err != nil || ids != (runtime.IDs{}) {
		t.Errorf("a pod with the machine's users: %+v %v", ids, err)
	}
}

func TestSubordinateIDs(t *testing.T) {
	const line = "0: kubelet 65536 4128768\n"
	if first, length, err := subordinate(line, line); err != nil || first != 65536 || length != 4128768 {
		t.Errorf("%d %d %v", first, length, err)
	}
	for _, c := range [][2]string{{line, ""}, {"", ""}, {line + line, line + line}, {"0: kubelet 65536", "0: kubelet 65536"}} {
		if first, length, err := subordinate(c[0], c[1]); err == nil {
			t.Errorf("%q %q: %d %d", c[0], c[1], first, length)
		}
	}
}
