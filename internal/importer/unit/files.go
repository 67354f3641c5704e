package unit

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/api/hostprocess"
)

// kinds are the directories that systemd makes for a service, each with the
// variable that names it to the program.
var kinds = []struct{ key, parent, variable string }{
	{"RuntimeDirectory", "/run", "RUNTIME_DIRECTORY"},
	{"StateDirectory", "/var/lib", "STATE_DIRECTORY"},
	{"CacheDirectory", "/var/cache", "CACHE_DIRECTORY"},
	{"LogsDirectory", "/var/log", "LOGS_DIRECTORY"},
	{"ConfigurationDirectory", "/etc", "CONFIGURATION_DIRECTORY"},
}

// directories are volumes; a container before the program makes them and
// gives them to its user. That below /run goes with the pod, as it goes with
// the unit; the others stay on the machine.
func (t *translation) directories() error {
	for _, k := range kinds {
		names, err := t.words("Service", k.key)
		if err != nil {
			return err
		}
		mode := t.last("Service", k.key+"Mode")
		if mode == "" {
			mode = "0755"
		}
		var all []string
		for _, n := range names {
			n, link, _ := strings.Cut(n, ":")
			if link != "" {
				t.notes.Add(k.key+"="+n+":"+link, "the directory is a volume, but the link to it has no equivalent")
			}
			dir := path.Join(k.parent, n)
			all = append(all, dir)
			if k.key == "RuntimeDirectory" {
				t.pod.EmptyDir(dir, corev1.StorageMediumMemory)
			} else {
				t.pod.HostPath(dir, dir, corev1.HostPathDirectoryOrCreate, false)
			}
			owner := fmt.Sprintf(" -o %d -g %d", t.account.uid, t.account.gid)
			if k.key == "ConfigurationDirectory" {
				owner = ""
			}
			t.mkdir = append(t.mkdir, fmt.Sprintf("install -d%s -m %s %s", owner, quote(mode), quote(dir)))
		}
		if len(all) > 0 {
			t.variable(k.variable, strings.Join(all, ":"))
		}
	}
	if p := t.last("Service", "RuntimeDirectoryPreserve"); p != "" && !no(p) {
		t.notes.Add("RuntimeDirectoryPreserve="+p, "the RuntimeDirectory goes with the pod; it stays when only the container is started again")
	}
	return nil
}

// files says what of the machine's file system the program sees and writes.
// Without ProtectSystem that is everything, as with systemd.
func (t *translation) files() error {
	protect := t.last("Service", "ProtectSystem")
	root := hostprocess.RootShared
	var readOnly []string
	switch {
	case protect == "strict":
		root = hostprocess.RootReadOnly
	case protect == "full":
		readOnly = []string{"/usr", "/boot", "/efi", "/etc"}
	case yes(protect):
		readOnly = []string{"/usr", "/boot", "/efi"}
	}
	t.pod.Annotate(hostprocess.AnnotationRoot, root)
	for _, dir := range readOnly {
		if exists(t.root, dir) {
			t.pod.HostPath(dir, dir, corev1.HostPathDirectory, true)
		}
	}
	homes := []string{"/home", "/root", "/run/user"}
	switch home := t.last("Service", "ProtectHome"); {
	case yes(home):
		t.notes.Add("ProtectHome="+home, "the directories are empty for the program, rather than out of its reach")
		t.hide(homes...)
	case home == "tmpfs":
		t.hide(homes...)
	case home == "read-only":
		for _, dir := range homes {
			if exists(t.root, dir) {
				t.pod.HostPath(dir, dir, corev1.HostPathDirectory, true)
			}
		}
	}
	if tmp := t.last("Service", "PrivateTmp"); tmp != "" && !no(tmp) {
		t.pod.EmptyDir("/tmp", "")
		t.pod.EmptyDir("/var/tmp", "")
	}
	if err := t.paths("ReadOnlyPaths", "ReadOnlyDirectories", func(said, p string, kind corev1.HostPathType) {
		t.pod.HostPath(p, p, kind, true)
	}); err != nil {
		return err
	}
	if err := t.paths("ReadWritePaths", "ReadWriteDirectories", func(said, p string, kind corev1.HostPathType) {
		// Elsewhere it may write anyway.
		if root == hostprocess.RootReadOnly || slices.ContainsFunc(readOnly, func(dir string) bool { return below(p, dir) }) {
			t.pod.HostPath(p, p, kind, false)
		}
	}); err != nil {
		return err
	}
	if err := t.paths("InaccessiblePaths", "InaccessibleDirectories", func(said, p string, kind corev1.HostPathType) {
		if kind != corev1.HostPathDirectory {
			t.notes.Add(said, "a single file cannot be hidden from a process of the host")
			return
		}
		t.notes.Add(said, "the directories are empty for the program, rather than out of its reach")
		t.hide(p)
	}); err != nil {
		return err
	}
	return t.binds()
}

// hide lets the program see empty directories.
func (t *translation) hide(dirs ...string) {
	for _, dir := range dirs {
		if exists(t.root, dir) {
			t.pod.EmptyDir(dir, corev1.StorageMediumMemory)
		}
	}
}

func below(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}

// paths gives each path of a list that is there, and that no volume of the
// unit is at or above already, to add.
func (t *translation) paths(key, older string, add func(said, p string, kind corev1.HostPathType)) error {
	words, err := t.words("Service", key, older)
	if err != nil {
		return err
	}
	for _, w := range words {
		said := key + "=" + w
		p := strings.TrimLeft(w, "+-")
		optional := strings.Contains(w[:len(w)-len(p)], "-")
		p = path.Clean(p)
		if rest, ok := strings.CutPrefix(p, "/var/run/"); ok { // a link on every machine
			p = "/run/" + rest
		}
		if slices.ContainsFunc(t.pod.Main().VolumeMounts, func(m corev1.VolumeMount) bool { return !m.ReadOnly && below(p, m.MountPath) }) {
			continue
		}
		info, err := fs.Stat(t.root, in(p))
		switch {
		case err != nil && optional:
			t.notes.Add(said, "is not on this machine, and was left out")
		case err != nil || info.IsDir():
			add(said, p, corev1.HostPathDirectory)
		case info.Mode().IsRegular():
			add(said, p, corev1.HostPathFile)
		default:
			add(said, p, corev1.HostPathUnset)
		}
	}
	return nil
}

// binds are BindPaths and TemporaryFileSystem: other things at a place.
func (t *translation) binds() error {
	for _, key := range []string{"BindPaths", "BindReadOnlyPaths"} {
		words, err := t.words("Service", key)
		if err != nil {
			return err
		}
		for _, w := range words {
			parts := strings.Split(strings.TrimPrefix(w, "-"), ":")
			source, target := parts[0], parts[0]
			if len(parts) > 1 {
				target = parts[1]
			}
			if strings.HasPrefix(w, "-") && !exists(t.root, source) {
				t.notes.Add(key+"="+w, "is not on this machine, and was left out")
				continue
			}
			t.pod.HostPath(source, path.Clean(target), corev1.HostPathUnset, key == "BindReadOnlyPaths")
		}
	}
	words, err := t.words("Service", "TemporaryFileSystem")
	if err != nil {
		return err
	}
	for _, w := range words {
		dir, options, _ := strings.Cut(w, ":")
		t.pod.EmptyDir(path.Clean(dir), corev1.StorageMediumMemory)
		if options != "" {
			t.notes.Add("TemporaryFileSystem="+w, "is a volume in memory; its options have no equivalent but sizeLimit")
		}
	}
	return nil
}
