package process

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/capability"
	"github.com/moby/sys/user"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// kernelThread is PF_KTHREAD of the kernel's.
const kernelThread = 0x00200000

// proc is where the kernel shows processes.
const proc = "/proc"

// Look takes a snapshot of a process of this machine that has the machine's
// file system. What cannot be imported is an error.
func Look(pid int) (Snapshot, error) {
	all, err := procfs.NewFS(proc)
	if err != nil {
		return Snapshot{}, fmt.Errorf("read %s: %w", proc, err)
	}
	p, err := all.Proc(pid)
	if err != nil {
		return Snapshot{}, fmt.Errorf("there is no process %d; `ps ax` lists those that run", pid)
	}
	s, err := look(all, p)
	return s, refusal(pid, err)
}

// refusal says what an error of looking at a process means to a person.
func refusal(pid int, err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("process %d is another user's; use sudo", pid)
	case errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH):
		return fmt.Errorf("process %d has ended meanwhile; import one that stays", pid)
	}
	return err
}

func look(all procfs.FS, p procfs.Proc) (Snapshot, error) {
	stat, err := p.Stat()
	if err != nil {
		return Snapshot{}, err
	}
	s := Snapshot{PID: p.PID, Name: stat.Comm, Nice: stat.Nice}
	switch {
	case stat.Flags&kernelThread != 0:
		return s, fmt.Errorf("process %d (%s) is a thread of the kernel; name the process of a program", p.PID, stat.Comm)
	case stat.State == "Z" || stat.State == "X":
		return s, fmt.Errorf("process %d (%s) has ended and only waits for its parent to notice; import one that runs", p.PID, stat.Comm)
	}
	l := looker{all: all, Proc: p, dir: filepath.Join(proc, strconv.Itoa(p.PID)), s: &s}
	for _, step := range []func() error{l.root, l.program, l.status, l.limits, l.groups, l.relatives} {
		if err := step(); err != nil {
			return s, err
		}
	}
	return s, l.files()
}

type looker struct {
	procfs.Proc
	all procfs.FS
	dir string
	s   *Snapshot
	of  []procfs.Proc // the process and those that come from it
}

// root refuses a process whose files are not this machine's.
func (l *looker) root() error {
	its, err := os.Stat(filepath.Join(l.dir, "root"))
	if err != nil {
		return err
	}
	ours, err := os.Stat("/")
	if err != nil {
		return err
	}
	if !os.SameFile(its, ours) {
		return fmt.Errorf("process %d (%s) has a root of its own, as in a container; what started it says how to run it", l.PID, l.s.Name)
	}
	return nil
}

func (l *looker) program() (err error) {
	s := l.s
	if s.Exe, err = os.Readlink(filepath.Join(l.dir, "exe")); err != nil {
		return err
	}
	s.Exe, s.Deleted = strings.CutSuffix(s.Exe, " (deleted)")
	if s.Args, err = l.CmdLine(); err != nil {
		return err
	}
	if s.Dir, err = l.Cwd(); err != nil {
		return err
	}
	if s.Env, err = l.Environ(); err != nil {
		return err
	}
	if len(s.Args) > 0 {
		s.Called = s.called(strings.TrimPrefix(s.Args[0], "-")) // a login shell's
	}
	return nil
}

// called is the path by which the process's file was called, "" when its first
// argument does not lead there.
func (s *Snapshot) called(name string) string {
	var places []string
	switch {
	case filepath.IsAbs(name):
		places = []string{name}
	case strings.Contains(name, "/"):
		places = []string{filepath.Join(s.Dir, name)}
	default:
		for _, v := range s.Env {
			if list, ok := strings.CutPrefix(v, "PATH="); ok {
				for _, dir := range filepath.SplitList(list) {
					places = append(places, filepath.Join(dir, name))
				}
			}
		}
		if found, err := exec.LookPath(name); err == nil {
			places = append(places, found)
		}
	}
	for _, p := range places {
		if to, err := filepath.EvalSymlinks(p); err == nil && to == s.Exe {
			return p
		}
	}
	return ""
}

// usual are the capabilities that a container of Kubernetes has.
var usual = []string{"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"}

func (l *looker) status() error {
	text, err := os.ReadFile(filepath.Join(l.dir, "status"))
	if err != nil {
		return err
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		fields[name] = strings.TrimSpace(value)
	}
	s := l.s
	number := func(field string, at int) (n int64) {
		if all := strings.Fields(fields[field]); len(all) > at {
			n, _ = strconv.ParseInt(all[at], 10, 64)
		}
		return n
	}
	const effective = 1 // of real, effective, saved, and file system's
	s.UID, s.GID = number("Uid", effective), number("Gid", effective)
	for i := range strings.Fields(fields["Groups"]) {
		s.Groups = append(s.Groups, number("Groups", i))
	}
	if u, err := user.LookupUid(int(s.UID)); err == nil {
		s.User = u.Name
	}
	s.Umask, s.NoNewPrivileges, s.Seccomp = fields["Umask"], fields["NoNewPrivs"] == "1", fields["Seccomp"] == "2"
	mask, err := strconv.ParseUint(fields["CapEff"], 16, 64)
	if err != nil {
		return fmt.Errorf("read the capabilities of process %d: %w", l.PID, err)
	}
	for _, c := range capability.ListKnown() {
		if mask&(1<<c) != 0 {
			s.Effective = append(s.Effective, strings.ToUpper(c.String()))
		}
	}
	for _, c := range usual {
		if !slices.Contains(s.Effective, c) {
			s.Lacking = append(s.Lacking, c)
		}
	}
	adj, err := os.ReadFile(filepath.Join(l.dir, "oom_score_adj"))
	if err != nil {
		return err
	}
	s.OOMScoreAdj, _ = strconv.Atoi(strings.TrimSpace(string(adj)))
	return nil
}

// limitNames are in the kernel's order.
var limitNames = []string{"cpu", "fsize", "data", "stack", "core", "rss", "nproc", "nofile", "memlock", "as", "locks", "sigpending", "msgqueue", "nice", "rtprio", "rttime"}

func (l *looker) limits() error {
	word := func(n uint64) string {
		if n == math.MaxUint64 {
			return "unlimited"
		}
		return strconv.FormatUint(n, 10)
	}
	for i, name := range limitNames {
		var its, first unix.Rlimit
		if err := unix.Prlimit(l.PID, i, nil, &its); err != nil {
			return fmt.Errorf("read the limits of process %d: %w", l.PID, err)
		}
		if err := unix.Prlimit(1, i, nil, &first); err == nil && its != first {
			l.s.Limits = append(l.s.Limits, Limit{name, word(its.Cur), word(its.Max)})
		}
	}
	// As of ioprio_get(2), of a process: the class stands above the level.
	const who, shift = 1, 13
	io, _, errno := unix.Syscall(unix.SYS_IOPRIO_GET, who, uintptr(l.PID), 0)
	if errno != 0 {
		return fmt.Errorf("read the I/O priority of process %d: %w", l.PID, errno)
	}
	switch level := io & (1<<shift - 1) & 7; io >> shift {
	case 1:
		l.s.IO = fmt.Sprintf("realtime:%d", level)
	case 2:
		l.s.IO = fmt.Sprintf("best-effort:%d", level)
	case 3:
		l.s.IO = "idle"
	}
	return nil
}

var unitPath = regexp.MustCompile(`^/system\.slice/(?:.+/)?([^/]+\.service)(?:/|$)`)

// groups reads what the process's control groups allow, and whose they are.
func (l *looker) groups() error {
	all, err := l.Cgroups()
	if err != nil {
		return err
	}
	const root = "/sys/fs/cgroup"
	for _, g := range all {
		if m := unitPath.FindStringSubmatch(g.Path); m != nil {
			l.s.Unit = strings.ReplaceAll(m[1], `\x2d`, "-")
		}
		mount := filepath.Join(root, strings.Join(g.Controllers, ","))
		if len(g.Controllers) == 0 {
			mount = root
			if _, err := os.Stat(filepath.Join(root, "unified")); err == nil {
				mount = filepath.Join(root, "unified")
			}
		}
		for dir := filepath.Join(mount, g.Path); dir != mount && strings.HasPrefix(dir, mount); dir = filepath.Dir(dir) {
			read := func(file string) (fields []string) {
				text, _ := os.ReadFile(filepath.Join(dir, file))
				return strings.Fields(string(text))
			}
			number := func(fields []string, i int) int64 {
				if len(fields) <= i {
					return 0
				}
				n, _ := strconv.ParseInt(fields[i], 10, 64) // "max" is 0
				return n
			}
			least := func(to *int64, n int64) {
				const none = 1 << 60 // how version 1 writes it
				if n > 0 && n < none && (*to == 0 || n < *to) {
					*to = n
				}
			}
			least(&l.s.Memory, number(read("memory.max"), 0))
			least(&l.s.Memory, number(read("memory.limit_in_bytes"), 0))
			least(&l.s.Processes, number(read("pids.max"), 0))
			if f := read("cpu.max"); number(f, 1) > 0 {
				least(&l.s.MilliCPU, number(f, 0)*1000/number(f, 1))
			}
			if period := number(read("cpu.cfs_period_us"), 0); period > 0 {
				least(&l.s.MilliCPU, number(read("cpu.cfs_quota_us"), 0)*1000/period)
			}
		}
	}
	return nil
}

// relatives finds what the process comes from and what comes from it.
func (l *looker) relatives() error {
	procs, err := l.all.AllProcs()
	if err != nil {
		return err
	}
	stats := map[int]procfs.ProcStat{}
	for _, p := range procs {
		if stat, err := p.Stat(); err == nil { // or it has gone meanwhile
			stats[p.PID] = stat
		}
	}
	own := stats[l.PID]
	l.s.Parent = Relative{own.PPID, stats[own.PPID].Comm}
	l.of = []procfs.Proc{l.Proc}
	for i := 0; i < len(l.of); i++ {
		for _, p := range procs {
			if stat, ok := stats[p.PID]; ok && stat.PPID == l.of[i].PID && stat.State != "Z" {
				l.of = append(l.of, p)
				l.s.Children = append(l.s.Children, Relative{p.PID, stat.Comm})
			}
		}
	}
	return nil
}

// files finds what the process and its children have open and mapped.
func (l *looker) files() error {
	inodes := map[uint64]bool{}
	for i, p := range l.of {
		if err := l.open(p, inodes); err != nil && i == 0 {
			return err
		}
	}
	maps, err := l.ProcMaps()
	if err != nil {
		return err
	}
	for _, m := range maps {
		if m.Perms.Execute && strings.HasPrefix(m.Pathname, "/") && m.Pathname != l.s.Exe {
			l.s.Mapped = append(l.s.Mapped, m.Pathname)
		}
	}
	for _, list := range []*[]string{&l.s.Mapped, &l.s.Read, &l.s.Written} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return l.sockets(inodes)
}

// open notes the files of one process, and the inodes of its sockets.
func (l *looker) open(p procfs.Proc, inodes map[uint64]bool) error {
	dir := filepath.Join(proc, strconv.Itoa(p.PID))
	entries, err := os.ReadDir(filepath.Join(dir, "fd"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		to, err := os.Readlink(filepath.Join(dir, "fd", e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if n, ok := strings.CutPrefix(to, "socket:["); ok {
			if inode, err := strconv.ParseUint(strings.TrimSuffix(n, "]"), 10, 64); err == nil {
				inodes[inode] = true
			}
			continue
		}
		info, err := os.Stat(to)
		if !strings.HasPrefix(to, "/") || strings.HasPrefix(to, "/proc/") || strings.HasPrefix(to, "/sys/") || err != nil || !info.Mode().IsRegular() {
			continue
		}
		about, err := p.FDInfo(e.Name())
		if err != nil {
			continue
		}
		flags, _ := strconv.ParseInt(about.Flags, 8, 64)
		if flags&unix.O_ACCMODE == unix.O_RDONLY {
			l.s.Read = append(l.s.Read, to)
		} else {
			l.s.Written = append(l.s.Written, to)
		}
	}
	return nil
}

// The kernel's states of sockets that wait for others.
const (
	listening = 0x0a
	unbound   = 0x07 // of UDP: not connected
)

// sockets finds those of the process's network that it waits at.
func (l *looker) sockets(inodes map[uint64]bool) error {
	network, err := procfs.NewFS(l.dir)
	if err != nil {
		return err
	}
	tcp, err := network.NetTCP()
	if err != nil {
		return err
	}
	tcp6, err := network.NetTCP6()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no IPv6 here
		return err
	}
	for _, t := range append(tcp, tcp6...) {
		if t.St == listening && inodes[t.Inode] {
			l.s.Sockets = append(l.s.Sockets, Socket{corev1.ProtocolTCP, t.LocalAddr, int32(t.LocalPort)})
		}
	}
	udp, err := network.NetUDP()
	if err != nil {
		return err
	}
	udp6, err := network.NetUDP6()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, u := range append(udp, udp6...) {
		if u.St == unbound && inodes[u.Inode] {
			l.s.Sockets = append(l.s.Sockets, Socket{corev1.ProtocolUDP, u.LocalAddr, int32(u.LocalPort)})
		}
	}
	local, err := network.NetUNIX()
	if err != nil {
		return err
	}
	const accepts = 1 << 16 // __SO_ACCEPTCON
	for _, u := range local.Rows {
		if uint64(u.Flags)&accepts != 0 && inodes[u.Inode] && u.Path != "" {
			l.s.Unix = append(l.s.Unix, u.Path)
		}
	}
	return nil
}
