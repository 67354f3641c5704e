package podvolume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/utils/ptr"
)

// A volume that cannot be made is told of by its name in the API.
func TestOtherVolumes(t *testing.T) {
	m, _ := newManager(t)
	made := map[string]bool{}
	for _, name := range []string{"hostPath", "emptyDir", "secret", "configMap", "downwardAPI", "projected", "persistentVolumeClaim", "ephemeral", "image", "csi", "nfs", "iscsi", "fc"} {
		made[name] = true
	}
	of := reflect.TypeFor[v1.VolumeSource]()
	for i := range of.NumField() {
		name, _, _ := strings.Cut(of.Field(i).Tag.Get("json"), ",")
		if made[name] {
			continue
		}
		t.Run(name, func(t *testing.T) {
			var s v1.VolumeSource
			reflect.ValueOf(&s).Elem().Field(i).Set(reflect.New(of.Field(i).Type.Elem()))
			p := testPod(v1.Volume{Name: "v", VolumeSource: s})
			defer m.Remove(context.Background(), p.UID)
			want := fmt.Sprintf("volume type %q is not supported by tutti; use a PersistentVolumeClaim, an emptyDir or a hostPath", name)
			if err := m.Prepare(t.Context(), p); err == nil || !strings.HasSuffix(err.Error(), want) {
				t.Errorf("error %v, want %s", err, want)
			}
		})
	}
}

// The tree of a volume may be large: OnRootMismatch looks at its root alone.
// A volume may be a link to it.
func TestOwnerOfVolumes(t *testing.T) {
	for policy, want := range map[v1.PodFSGroupChangePolicy]uint32{v1.FSGroupChangeAlways: 70, v1.FSGroupChangeOnRootMismatch: 9} {
		dir := t.TempDir()
		file := filepath.Join(dir, "rows")
		must(t, os.WriteFile(file, nil, 0o600))
		must(t, errors.Join(os.Chown(dir, 0, 70), os.Chmod(dir, 0o2770|os.ModeSetgid), os.Chown(file, 0, 9)))
		p := testPod()
		p.Spec.SecurityContext = &v1.PodSecurityContext{FSGroup: ptr.To[int64](70), FSGroupChangePolicy: &policy}
		link := filepath.Join(t.TempDir(), "link")
		must(t, os.Symlink(dir, link))
		must(t, owned(p, link, false))
		if got := mode(t, file).Gid; got != want {
			t.Errorf("%s: the file is of group %d, want %d", policy, got, want)
		}
	}
}
