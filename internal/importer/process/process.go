// Package process writes a manifest for a process that runs: Look says what
// there is to be seen of it, Translate makes a manifest of that.
package process

import (
	"cmp"
	"fmt"
	"net"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	"k8s.io/apimachinery/pkg/runtime"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/importer"
)

// Snapshot is a process at one moment, with what comes from it.
type Snapshot struct {
	PID  int
	Name string // as the kernel has it
	// Exe is the program's file; Called is the path of its first argument, if
	// that leads there.
	Exe, Called string
	Deleted     bool // the file is not there any more
	Args        []string
	Dir         string
	Env         []string // NAME=value

	UID, GID int64
	Groups   []int64
	User     string // "" when the number has no name

	// Effective are its capabilities, without CAP_; Lacking are those of
	// Kubernetes' default that it does not have.
	Effective, Lacking []string
	NoNewPrivileges    bool
	Seccomp            bool
	Umask              string // octal

	Nice        int
	IO          string // as its annotation has it, "" the kernel's own
	OOMScoreAdj int
	// Limits are those that process 1 does not have, by name.
	Limits []Limit
	// What its control group and those above it allow; 0 is everything.
	Memory, MilliCPU, Processes int64

	Sockets []Socket
	Unix    []string // paths of sockets that it listens on
	Written []string // regular files that are open for writing
	Read    []string // and those for reading only
	Mapped  []string // code, besides the program's own

	Parent   Relative
	Children []Relative
	Unit     string // systemd's, "" none
}

// Limit is of setrlimit(2), with "unlimited" for none.
type Limit struct{ Name, Soft, Hard string }

// Socket is one that the process, or one that comes from it, listens on.
type Socket struct {
	Protocol corev1.Protocol
	Address  net.IP
	Port     int32
}

// Relative is another process.
type Relative struct {
	PID  int
	Name string
}

// session are variables of the session or service that started the process,
// and mean nothing to another.
var session = regexp.MustCompile(`^(_|PWD|OLDPWD|SHLVL|TERM|TERMCAP|COLORTERM|LS_COLORS|COLUMNS|LINES|DISPLAY|WAYLAND_DISPLAY|XAUTHORITY|DBUS_SESSION_BUS_ADDRESS|` +
	`XDG_.*|SSH_.*|SUDO_.*|MAIL|HOSTNAME|TMUX.*|STY|WINDOW|INVOCATION_ID|JOURNAL_STREAM|NOTIFY_SOCKET|WATCHDOG_.*|LISTEN_.*|SYSTEMD_EXEC_PID|MAINPID|MANAGERPID|` +
	`MEMORY_PRESSURE_.*|CREDENTIALS_DIRECTORY|LESSOPEN|LESSCLOSE|HIST.*|PS1|PS2|PROMPT_COMMAND)=`)

// Translate makes the manifest of a process like this one.
func Translate(s Snapshot) importer.Manifest {
	name := cmp.Or(importer.Name(path.Base(s.Exe)), fmt.Sprintf("process-%d", s.PID))
	if n := importer.Name(s.Name); n != "" && s.Called != "" && path.Base(s.Called) != path.Base(s.Exe) {
		name = n // one program with many names, or an interpreter's script
	}
	t := &translation{Snapshot: s, pod: importer.NewPod(name)}
	m := importer.Manifest{
		Title: fmt.Sprintf("process %d (%s), by `tutti import process`: what could be seen of it while it ran.", s.PID, s.Name),
		Steps: []string{
			"It needs a namespace with the label " + hostprocess.LabelAllow + "=true.",
			"End the process first, and whatever starts it again, as two of one program do harm on the same files.",
		},
	}
	t.pod.Annotate(hostprocess.AnnotationRoot, hostprocess.RootReadOnly)
	t.origin()
	t.command()
	t.environment()
	t.user()
	t.resources()
	t.listen()
	t.volumes()
	m.Notes, m.Image = t.notes, append([]string{s.Exe}, slices.Concat(s.Mapped, s.Read)...)
	m.Objects = append(append([]runtime.Object{}, t.pod.Beside()...), t.pod.Deployment())
	return m
}

type translation struct {
	Snapshot
	pod   *importer.Pod
	notes importer.Notes
}

func (t *translation) origin() {
	if t.Unit != "" {
		t.notes.Add(t.Unit, "the process belongs to this unit, and `tutti import unit %s` knows more of it", t.Unit)
	}
	if t.Parent.Name == t.Name && t.Parent.PID > 1 {
		t.notes.Add(fmt.Sprintf("process %d", t.Parent.PID), "is its parent and the same program, so that it is the one to import")
	}
	if t.Parent.PID == 1 && t.Unit == "" {
		t.notes.Add("process 1", "is its parent: if the program puts itself into the background, have it stay in the foreground, or its pod ends at once")
	}
	if len(t.Children) > 0 {
		var all []string
		for _, c := range t.Children {
			all = append(all, fmt.Sprintf("%d (%s)", c.PID, c.Name))
		}
		t.notes.Add("processes "+strings.Join(all, ", "), "come from it and need nothing of their own; what they use is here")
	}
}

// command is how to start the program. What a process calls itself need not be
// what it was called.
func (t *translation) command() {
	main := t.pod.Main()
	main.Command = []string{importer.Literal(cmp.Or(t.Called, t.Exe))}
	switch {
	case len(t.Args) == 1 && strings.Contains(t.Args[0], " ") && t.Called == "":
		t.notes.Add("command", "the process calls itself %q, and what it was started with cannot be seen any more; write its arguments into args", t.Args[0])
	case len(t.Args) > 0:
		if t.Called == "" && path.Base(t.Args[0]) != path.Base(t.Exe) {
			t.notes.Add("command", "the process calls itself %q; if the program depends on that, have a shell call it so", t.Args[0])
		}
		for _, a := range t.Args[1:] {
			main.Args = append(main.Args, importer.Literal(a))
			if name, value, ok := strings.Cut(strings.TrimLeft(a, "-"), "="); ok && importer.Secret(name, value) || importer.Secret("", a) {
				t.notes.Add("args", "one looks like a secret, and everybody on this machine can read it; have the program read it from a file or variable")
			}
		}
	}
	if t.Deleted {
		t.notes.Add(t.Exe, "the program's file is not there any more or is another one since it was started; the pod would start what is there then")
	}
	if t.Dir != "/" {
		main.WorkingDir = t.Dir
	}
	if t.Umask != "" && t.Umask != "0022" {
		main.Args = append(slices.Clone(main.Command), main.Args...)
		main.Command = []string{"/bin/sh", "-c", "umask " + t.Umask + "\nexec \"$@\"", t.pod.Name}
	}
}

func (t *translation) environment() {
	var left []string
	for _, v := range t.Env {
		name, value, ok := strings.Cut(v, "=")
		switch {
		case !ok || name == "":
		case session.MatchString(v):
			left = append(left, name)
		case t.pod.Env(name, importer.Literal(value), value):
			t.notes.Add(name, "looks like a secret: its value stands readable in the Secret of this manifest; take it out before you keep the file")
		}
	}
	if len(left) > 0 {
		t.notes.Add("environment", "left out is what belongs to the session that started the process: %s", strings.Join(left, " "))
	}
}

func (t *translation) user() {
	security := &corev1.PodSecurityContext{RunAsUser: &t.UID, RunAsGroup: &t.GID}
	for _, g := range t.Groups {
		if g != t.GID {
			security.SupplementalGroups = append(security.SupplementalGroups, g)
		}
	}
	if t.UID != 0 || t.GID != 0 || len(security.SupplementalGroups) > 0 {
		t.pod.Spec.SecurityContext = security
	}
	c := &corev1.SecurityContext{}
	if t.NoNewPrivileges {
		escalate := false
		c.AllowPrivilegeEscalation = &escalate
	}
	switch {
	case t.UID == 0 && len(t.Lacking) > 0:
		c.Capabilities = &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}
		for _, name := range t.Effective {
			c.Capabilities.Add = append(c.Capabilities.Add, corev1.Capability(name))
		}
	case t.UID == 0:
		t.notes.Add("user root", "the process has the capabilities %s; a pod has those of Kubernetes' default, so add what is missing to securityContext.capabilities", strings.Join(t.Effective, " "))
	case len(t.Effective) > 0:
		t.notes.Add("capabilities", "%s: in a pod a user who is not root has them only for programs whose files have them; `setcap` gives them to a file", strings.Join(t.Effective, " "))
	}
	if c.AllowPrivilegeEscalation != nil || c.Capabilities != nil {
		t.pod.Main().SecurityContext = c
	}
	if t.Seccomp {
		t.notes.Add("seccomp", "the process has a filter of its own making or its starter's; a pod has Kubernetes' RuntimeDefault")
	}
}

func (t *translation) resources() {
	var limits []string
	for _, l := range t.Limits {
		value := l.Soft
		if l.Hard != l.Soft {
			value += ":" + l.Hard
		}
		limits = append(limits, l.Name+"="+value)
	}
	if len(limits) > 0 {
		t.pod.Annotate(hostprocess.AnnotationLimits, strings.Join(limits, " "))
	}
	if t.Nice != 0 {
		t.pod.Annotate(hostprocess.AnnotationNice, strconv.Itoa(t.Nice))
	}
	if t.IO != "" {
		t.pod.Annotate(hostprocess.AnnotationIO, t.IO)
	}
	if t.OOMScoreAdj != 0 {
		t.notes.Add(fmt.Sprintf("oom_score_adj %d", t.OOMScoreAdj), "comes from the pod's resources: requests that are equal to limits make it the last to be killed")
	}
	r := corev1.ResourceRequirements{Limits: corev1.ResourceList{}, Requests: corev1.ResourceList{}}
	limit := func(name corev1.ResourceName, q *resource.Quantity) {
		r.Limits[name] = *q
		r.Requests[name] = resource.MustParse("0")
	}
	if t.Memory > 0 {
		limit(corev1.ResourceMemory, resource.NewQuantity(t.Memory, resource.BinarySI))
	}
	if t.MilliCPU > 0 {
		limit(corev1.ResourceCPU, resource.NewMilliQuantity(t.MilliCPU, resource.DecimalSI))
	}
	if len(r.Limits) > 0 {
		t.pod.Main().Resources = r
	}
	if t.Processes > 0 {
		t.notes.Add(fmt.Sprintf("at most %d processes", t.Processes), "a pod has at most 1024; nproc in the annotation %s limits those of a user", hostprocess.AnnotationLimits)
	}
}

// ephemeral is where the kernel takes the ports of clients from.
const ephemeral = 32768

// listen takes over the ports that others can reach.
func (t *translation) listen() {
	var ports []importer.Port
	for _, s := range t.Sockets {
		p := importer.Port{Number: s.Port, Protocol: s.Protocol}
		said := fmt.Sprintf("%s port %d at %s", strings.ToLower(string(s.Protocol)), s.Port, s.Address)
		switch {
		case s.Protocol == corev1.ProtocolUDP && s.Port >= ephemeral:
			continue // a client's
		case s.Address.IsLoopback():
			t.notes.Add(said, "nobody but its own pod reaches it; have the program listen at all addresses and add the port, or give the pod hostNetwork: true")
			continue
		case !s.Address.IsUnspecified():
			t.notes.Add(said, "a pod has another address; have the program listen at all addresses, or give the pod hostNetwork: true")
		}
		if !slices.Contains(ports, p) {
			ports = append(ports, p)
		}
	}
	slices.SortFunc(ports, func(a, b importer.Port) int {
		return cmp.Or(cmp.Compare(a.Protocol, b.Protocol), cmp.Compare(a.Number, b.Number))
	})
	t.pod.Listen(ports)
	t.pod.Ready()
	for _, p := range t.Unix {
		t.notes.Add("socket "+p, "others find it only if its directory is a volume that they have too")
	}
}

// shallow are directories of the machine with too much in them to be a
// volume: a file in one of them is a volume by itself.
var shallow = []string{"/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/lib64", "/mnt", "/opt", "/proc", "/root", "/run", "/sbin", "/srv", "/sys", "/usr", "/var", "/var/lib", "/var/log", "/var/cache", "/var/spool"}

// private are directories that each pod has of its own.
var private = []string{"/tmp", "/var/tmp", "/dev/shm", "/run"}

// volumes are for what the process has open for writing. Elsewhere it cannot
// write, so that nobody's data is touched by mistake.
func (t *translation) volumes() {
	var dirs []string
	for _, f := range t.Written {
		if slices.ContainsFunc(private, func(d string) bool { return strings.HasPrefix(f, d+"/") }) {
			t.notes.Add(f, "each pod has a directory of its own there, which goes with it; a hostPath volume makes it the machine's")
			continue
		}
		if dir := path.Dir(f); !slices.Contains(shallow, dir) {
			dirs = append(dirs, dir)
		} else {
			t.pod.HostPath(f, f, corev1.HostPathFile, false)
		}
	}
	slices.Sort(dirs)
	last := ""
	for _, dir := range dirs { // one directory comes before what is in it
		if last == "" || dir != last && !strings.HasPrefix(dir, last+"/") {
			t.pod.HostPath(dir, dir, corev1.HostPathDirectory, false)
			last = dir
		}
	}
	t.notes.Add(hostprocess.AnnotationRoot, "it may write where it has files open for writing now; add volumes for what it writes at other times, or say shared, and it writes wherever its user may")
}
