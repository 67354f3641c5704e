package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	profiles "github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/pkg/apparmor"

	"tutti.dev/tutti/internal/runtime"
)

// defaultAppArmor is the name under which containerd's default profile is
// loaded into the kernel.
const defaultAppArmor = "tutti-default"

// appArmor finds the profile that a workload is confined by, "" for none.
func (r *Runtime) appArmor(w runtime.Workload) (string, error) {
	switch {
	case w.AppArmor == "unconfined", w.Privileged && (w.AppArmor == "" || w.AppArmor == "default"):
		return "", nil
	case w.AppArmor != "" && w.AppArmor != "default":
		return w.AppArmor, isLoaded(w.AppArmor)
	case apparmor.HostSupports():
		if err := profiles.LoadDefaultProfile(defaultAppArmor); err != nil {
			return "", fmt.Errorf("load AppArmor's default profile: %w", err)
		}
		return defaultAppArmor, nil
	case w.AppArmor == "default":
		return "", fmt.Errorf("%w: the default AppArmor profile cannot be loaded, the kernel has no AppArmor or /sbin/apparmor_parser is missing; install the package apparmor, or leave appArmorProfile out", runtime.ErrInvalid)
	}
	return "", nil
}

// isLoaded says what to do if the kernel does not have a profile, or no
// AppArmor.
func isLoaded(name string) error {
	list, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list AppArmor profiles: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		// A name may have blanks; the mode is after the last.
		if i := strings.LastIndex(line, " ("); i > 0 && line[:i] == name {
			return nil
		}
	}
	return fmt.Errorf("%w: AppArmor profile %q is not loaded on this machine; load it with apparmor_parser", runtime.ErrInvalid, name)
}
