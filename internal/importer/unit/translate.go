package unit

import (
	"fmt"
	"hash/fnv"
	"io/fs"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/unit"
	"github.com/moby/sys/user"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	kube "k8s.io/apimachinery/pkg/runtime"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/importer"
)

// translation is a unit on its way to a manifest. Each step takes from the
// unit the settings that it knows; rest lists those that nobody took.
type translation struct {
	root  fs.FS
	unit  Unit
	taken map[string]bool // section.key

	pod   *importer.Pod
	notes importer.Notes

	account   account
	variables map[string]string // of the program's environment, as systemd has them
	secret    map[string]bool   // those of them that are in the Secret
	global    bool              // one on each machine
	oneshot   bool
	umask     string   // "" the usual
	mkdir     []string // commands that make its directories
}

// account is whom the program runs as.
type account struct {
	name, home, shell string
	uid, gid          int64
}

// Translate makes the manifest of a unit. root is the file system of the
// machine that the unit is of: its users, files of variables and directories
// are looked up there. The program listens on ports.
func Translate(root fs.FS, u Unit, ports []importer.Port) (importer.Manifest, error) {
	name := importer.Name(strings.TrimSuffix(u.Name, suffix))
	if name == "" {
		return importer.Manifest{}, fmt.Errorf("%s has no letter or digit in its name; give the file another name", u.File)
	}
	t := &translation{root: root, unit: u, taken: map[string]bool{}, pod: importer.NewPod(name), variables: map[string]string{}, secret: map[string]bool{}}
	prefix, _, _ := strings.Cut(strings.TrimSuffix(u.Name, suffix), "@")
	if n := importer.Name(prefix); n != "" {
		t.pod.Labels[importer.LabelName] = n
	}
	t.oneshot = t.last("Service", "Type") == "oneshot"
	t.pod.About = t.text(t.last("Unit", "Description"))
	if !t.oneshot {
		t.pod.Listen(ports)
	} else if len(ports) > 0 {
		t.notes.Add("--port", "what runs to its end has no Service")
	}
	for _, step := range []func() error{t.fleet, t.user, t.directories, t.environment, t.files, t.resources, t.privileges, t.commands} {
		if err := step(); err != nil {
			return importer.Manifest{}, fmt.Errorf("%s: %w", u.Name, err)
		}
	}
	t.order()
	controller := t.controller()
	title := fmt.Sprintf("%s, from %s, by `tutti import unit`.", u.Name, u.File)
	if d := t.values("Unit", "Documentation"); len(d) > 0 {
		title += "\nIts documentation: " + t.text(strings.Join(d, " "))
	}
	t.rest()
	m := importer.Manifest{
		Title: title,
		Steps: []string{
			"It needs a namespace with the label " + hostprocess.LabelAllow + "=true.",
			"Stop the unit first, as two of one program do harm on the same files: `systemctl disable --now " + u.Name + "`.",
		},
		Notes: t.notes, Objects: append(t.pod.Beside(), controller),
	}
	if !t.oneshot {
		m.Steps = append(m.Steps, "The pod has an address of its own: what listens on 127.0.0.1 nobody else reaches. `hostNetwork: true` gives it the machine's.")
	}
	return m, nil
}

// controller is the object that makes the pods.
func (t *translation) controller() kube.Object {
	d := t.pod.Deployment()
	switch {
	case t.oneshot:
		never, template := int32(0), d.Spec.Template
		j := &batchv1.Job{TypeMeta: metav1.TypeMeta{APIVersion: "batch/v1", Kind: "Job"}, ObjectMeta: d.ObjectMeta, Spec: batchv1.JobSpec{Template: template}}
		j.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
		if r := t.last("Service", "Restart"); r == "" || r == "no" {
			j.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
			j.Spec.BackoffLimit = &never
		}
		if s, ok := seconds(t.last("Service", "TimeoutStartSec", "TimeoutSec")); ok && s > 0 {
			j.Spec.ActiveDeadlineSeconds = &s
		}
		return j
	case t.global:
		return &appsv1.DaemonSet{TypeMeta: metav1.TypeMeta{APIVersion: "apps/v1", Kind: "DaemonSet"}, ObjectMeta: d.ObjectMeta,
			Spec: appsv1.DaemonSetSpec{Selector: d.Spec.Selector, Template: d.Spec.Template}}
	}
	return d
}

// values are what the unit says for a key that adds up; an empty value forgets
// those before it. Keys of the same meaning count as one.
func (t *translation) values(section string, keys ...string) []string {
	var all []string
	for _, s := range t.unit.settings {
		if s.section != section || !slices.Contains(keys, s.key) {
			continue
		}
		if s.value == "" {
			all = nil
		} else {
			all = append(all, s.value)
		}
	}
	for _, k := range keys {
		t.take(section, k)
	}
	return all
}

// last is what the unit says for a key of which the last one counts.
func (t *translation) last(section string, keys ...string) string {
	all := t.values(section, keys...)
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1]
}

// words are the values of a key that is a list, taken apart and expanded.
func (t *translation) words(section string, keys ...string) ([]string, error) {
	var all []string
	for _, v := range t.values(section, keys...) {
		words, closed := split(v)
		if !closed {
			return nil, openQuote(keys[0], v)
		}
		for _, w := range words {
			all = append(all, t.text(w))
		}
	}
	return all, nil
}

func openQuote(key, value string) error {
	return fmt.Errorf("in %s=%s a quote is not closed; close it", key, value)
}

func (t *translation) take(section, key string) { t.taken[section+"."+key] = true }

// assigned says whether the unit has a key at all.
func (t *translation) assigned(section, key string) bool {
	return slices.ContainsFunc(t.unit.settings, func(s setting) bool { return s.section == section && s.key == key })
}

// yes is a boolean as systemd reads it.
func yes(value string) bool {
	return slices.Contains([]string{"1", "yes", "y", "true", "t", "on"}, strings.ToLower(value))
}

func no(value string) bool {
	return slices.Contains([]string{"0", "no", "n", "false", "f", "off"}, strings.ToLower(value))
}

// seconds reads a time span, rounded up, 0 for "infinity" and what stands for
// it; ok says that there is one.
func seconds(value string) (s int64, ok bool) {
	if value == "" {
		return 0, false
	}
	if value == "infinity" {
		return 0, true
	}
	total := 0.0
	for rest := strings.ReplaceAll(value, " ", ""); rest != ""; {
		n := strings.IndexFunc(rest, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
		if n < 0 {
			n = len(rest)
		}
		number, err := strconv.ParseFloat(rest[:n], 64)
		if err != nil {
			return 0, false
		}
		rest = rest[n:]
		e := strings.IndexFunc(rest, func(r rune) bool { return r >= '0' && r <= '9' })
		if e < 0 {
			e = len(rest)
		}
		unit, known := spans[rest[:e]]
		if !known {
			return 0, false
		}
		total += number * unit
		rest = rest[e:]
	}
	s = int64(total)
	if float64(s) < total {
		s++
	}
	return s, true
}

// spans are systemd.time(7)'s units, in seconds.
var spans = map[string]float64{
	"": 1, "s": 1, "sec": 1, "second": 1, "seconds": 1,
	"us": 1e-6, "usec": 1e-6, "µs": 1e-6, "ms": 1e-3, "msec": 1e-3,
	"m": 60, "min": 60, "minute": 60, "minutes": 60,
	"h": 3600, "hr": 3600, "hour": 3600, "hours": 3600,
	"d": 86400, "day": 86400, "days": 86400, "w": 604800, "week": 604800, "weeks": 604800,
}

// text expands the specifiers of a value (systemd.unit(5)).
func (t *translation) text(value string) string {
	var b strings.Builder
	for i := 0; i < len(value); i++ {
		if value[i] != '%' || i+1 == len(value) {
			b.WriteByte(value[i])
			continue
		}
		i++
		s, ok := t.specifier(value[i])
		if !ok {
			t.notes.Add("%"+value[i:i+1], "tutti does not know what it stands for here; replace it by hand")
			s = "%" + value[i:i+1]
		}
		b.WriteString(s)
	}
	return b.String()
}

var architectures = map[string]string{"amd64": "x86-64", "386": "x86", "arm64": "arm64", "arm": "arm", "riscv64": "riscv64", "s390x": "s390x", "ppc64le": "ppc64-le"}

// specifier is what a letter after % stands for. The users' are those of the
// service manager, root.
func (t *translation) specifier(c byte) (string, bool) {
	whole := strings.TrimSuffix(t.unit.Name, suffix)
	prefix, instance, _ := strings.Cut(whole, "@")
	final := prefix[strings.LastIndex(prefix, "-")+1:]
	switch c {
	case '%':
		return "%", true
	case 'n':
		return t.unit.Name, true
	case 'N':
		return whole, true
	case 'p':
		return prefix, true
	case 'P':
		return unit.UnitNameUnescape(prefix), true
	case 'i':
		return instance, true
	case 'I':
		return unit.UnitNameUnescape(instance), true
	case 'j':
		return final, true
	case 'J':
		return unit.UnitNameUnescape(final), true
	case 'f':
		if instance == "" {
			return unit.UnitNamePathUnescape(prefix), true
		}
		return unit.UnitNamePathUnescape(instance), true
	case 'y':
		return t.unit.File, true
	case 'Y':
		return path.Dir(t.unit.File), true
	case 'u', 'g':
		return "root", true
	case 'U', 'G':
		return "0", true
	case 'h':
		return "/root", true
	case 's':
		return "/bin/sh", true
	case 't':
		return "/run", true
	case 'S':
		return "/var/lib", true
	case 'C':
		return "/var/cache", true
	case 'L':
		return "/var/log", true
	case 'E':
		return "/etc", true
	case 'D':
		return "/usr/share", true
	case 'T':
		return "/tmp", true
	case 'V':
		return "/var/tmp", true
	case 'a':
		a, ok := architectures[runtime.GOARCH]
		return a, ok
	case 'H', 'l', 'q', 'm':
		file := map[byte]string{'m': "/etc/machine-id"}[c]
		if file == "" {
			file = "/etc/hostname"
		}
		text, err := fs.ReadFile(t.root, in(file))
		if err != nil {
			return "", false
		}
		s := strings.TrimSpace(string(text))
		if c == 'l' {
			s, _, _ = strings.Cut(s, ".")
		}
		t.notes.Add("%"+string(c), "stands for this machine, %s, in the manifest; elsewhere it is another", s)
		return s, true
	}
	return "", false
}

// user says whom the program runs as.
func (t *translation) user() error {
	t.account = account{name: "root", home: "/root", shell: "/bin/sh"}
	name := t.text(t.last("Service", "User"))
	group := t.text(t.last("Service", "Group"))
	dynamic := yes(t.last("Service", "DynamicUser"))
	extra, err := t.words("Service", "SupplementaryGroups")
	if err != nil {
		return err
	}
	if name == "" && dynamic {
		name = t.pod.Name
	}
	security := &corev1.PodSecurityContext{}
	if name != "" {
		found, known, err := t.lookup(name)
		switch {
		case err != nil:
			return err
		case known:
			t.account = found
		case dynamic:
			h := fnv.New32a()
			h.Write([]byte(name))
			// The numbers that systemd takes them from.
			id := int64(61184 + h.Sum32()%(65519-61184+1))
			t.account = account{name, "/", "/usr/sbin/nologin", id, id}
			t.notes.Add("DynamicUser=yes", "the program always runs as user %d, which nobody else here has; with systemd its StateDirectory is below /var/lib/private", id)
		default:
			return fmt.Errorf("user %q is not on this machine; create it, or import the unit where it runs", name)
		}
	}
	if group != "" {
		if t.account.gid, err = t.group(group); err != nil {
			return err
		}
	}
	if name != "" || group != "" {
		security.RunAsUser, security.RunAsGroup = &t.account.uid, &t.account.gid
	}
	for _, g := range extra {
		id, err := t.group(g)
		if err != nil {
			return err
		}
		security.SupplementalGroups = append(security.SupplementalGroups, id)
	}
	if name != "" || group != "" || len(extra) > 0 {
		t.pod.Spec.SecurityContext = security
	}
	return nil
}

// lookup finds a user by name or number; a number needs no entry.
func (t *translation) lookup(name string) (account, bool, error) {
	f, err := t.root.Open("etc/passwd")
	if err != nil {
		return account{}, false, fmt.Errorf("read the machine's users: %w", err)
	}
	defer f.Close()
	id, noNumber := strconv.ParseInt(name, 10, 32)
	all, err := user.ParsePasswdFilter(f, func(u user.User) bool {
		return u.Name == name || noNumber == nil && int64(u.Uid) == id
	})
	switch {
	case err != nil:
		return account{}, false, fmt.Errorf("read the machine's users: %w", err)
	case len(all) > 0:
		u := all[0]
		return account{u.Name, u.Home, u.Shell, int64(u.Uid), int64(u.Gid)}, true, nil
	case noNumber == nil:
		return account{name: name, home: "/", uid: id}, true, nil
	}
	return account{}, false, nil
}

func (t *translation) group(name string) (int64, error) {
	if id, err := strconv.ParseInt(name, 10, 32); err == nil {
		return id, nil
	}
	f, err := t.root.Open("etc/group")
	if err != nil {
		return 0, fmt.Errorf("read the machine's groups: %w", err)
	}
	defer f.Close()
	all, err := user.ParseGroupFilter(f, func(g user.Group) bool { return g.Name == name })
	if err != nil {
		return 0, fmt.Errorf("read the machine's groups: %w", err)
	}
	if len(all) == 0 {
		return 0, fmt.Errorf("group %q is not on this machine; create it, or import the unit where it runs", name)
	}
	return int64(all[0].Gid), nil
}

// variable puts one into the program's environment. A later one of the same
// name is in its place.
func (t *translation) variable(name, value string) {
	env := &t.pod.Main().Env
	*env = slices.DeleteFunc(*env, func(v corev1.EnvVar) bool { return v.Name == name })
	t.variables[name] = value
	if t.secret[name] = t.pod.Env(name, importer.Literal(value), value); t.secret[name] {
		t.notes.Add(name, "looks like a secret: its value stands readable in the Secret of this manifest; take it out before you keep the file")
	}
}

func (t *translation) environment() error {
	if t.account.uid != 0 {
		t.variable("HOME", t.account.home)
		t.variable("LOGNAME", t.account.name)
		t.variable("USER", t.account.name)
		if t.account.shell != "" {
			t.variable("SHELL", t.account.shell)
		}
	}
	settings, err := t.words("Service", "Environment")
	if err != nil {
		return err
	}
	for _, s := range settings {
		if name, value, ok := strings.Cut(s, "="); ok {
			t.variable(name, value)
		} else {
			t.notes.Add("Environment="+s, "is not of the form NAME=value; systemd does not heed it either")
		}
	}
	for _, file := range t.values("Service", "EnvironmentFile") {
		said := "EnvironmentFile=" + file
		file, optional := strings.CutPrefix(t.text(file), "-")
		files, err := fs.Glob(t.root, in(file))
		if err != nil {
			return fmt.Errorf("find %s: %w", file, err)
		}
		if len(files) == 0 {
			if !optional {
				t.notes.Add(said, "does not exist here, and systemd would not start the unit without it")
			}
			continue
		}
		for _, f := range files {
			text, err := fs.ReadFile(t.root, f)
			if err != nil {
				return fmt.Errorf("read the variables in /%s: %w", f, err)
			}
			all, closed := assignments(string(text))
			if !closed {
				return fmt.Errorf("in /%s a quote is not closed; close it", f)
			}
			for _, a := range all {
				t.variable(a[0], a[1])
			}
		}
		t.notes.Add(said, "what the file says now is in the manifest; what it says later is not seen")
	}
	unset, err := t.words("Service", "UnsetEnvironment")
	if err != nil {
		return err
	}
	for _, name := range unset {
		name, _, _ = strings.Cut(name, "=")
		delete(t.variables, name)
		env := &t.pod.Main().Env
		*env = slices.DeleteFunc(*env, func(v corev1.EnvVar) bool { return v.Name == name })
	}
	return nil
}
