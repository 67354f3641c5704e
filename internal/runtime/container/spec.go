package container

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cap"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/oci"
	pathrs "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/moby/sys/user"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/cgroup"
	"tutti.dev/tutti/internal/host/mount"
	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/internal/runtime"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// spec translates a workload into an OCI runtime specification, starting from
// containerd's defaults.
func (r *Runtime) spec(ctx context.Context, pod runtime.Pod, w runtime.Workload, root Root) (*specs.Spec, error) {
	if len(w.Args) == 0 {
		return nil, fmt.Errorf("%w: no command: neither the image nor the container has one", runtime.ErrInvalid)
	}
	s, err := oci.GenerateSpec(namespaces.WithNamespace(ctx, "tutti"), nil, &containers.Container{ID: w.ID.String()})
	if err != nil {
		return nil, err
	}
	s.Root = &specs.Root{Path: root.Path, Readonly: root.ReadOnly}
	p := s.Process
	p.Args, p.Cwd, p.Terminal = w.Args, w.Dir, w.TTY
	if p.Cwd == "" {
		p.Cwd = "/"
	}
	if !path.IsAbs(p.Cwd) {
		return nil, fmt.Errorf("%w: working directory %q is not an absolute path", runtime.ErrInvalid, p.Cwd)
	}
	p.Env = environment(pod, w)
	schedule(p, w)
	p.NoNewPrivileges = w.NoNewPrivileges || w.Landlock != nil
	if p.User, err = resolveUser(root.Programs, w); err != nil {
		return nil, err
	}
	if size := pod.IDs.Size; size > 0 && (p.User.UID >= size || slices.Max(p.User.AdditionalGids) >= size) {
		return nil, fmt.Errorf("%w: user %d with groups %v is outside the pod's user namespace; use numbers below %d, or leave hostUsers out", runtime.ErrInvalid, p.User.UID, p.User.AdditionalGids, size)
	}
	if p.ApparmorProfile, err = r.appArmor(w); err != nil {
		return nil, err
	}
	p.Capabilities = r.capabilities(w)
	p.OOMScoreAdj = r.oomScore(w.OOMScoreAdj)

	s.Linux.CgroupsPath = path.Join(r.podCgroup(pod), fmt.Sprintf("%s-%d", w.Name, w.Attempt))
	usual := s.Linux.Resources.Devices
	s.Linux.Resources = resources(w.Resources)
	s.Linux.Resources.Devices = usual
	s.Linux.Namespaces = r.namespaces(pod, w.Privileged)
	if w.Privileged || w.Unmasked {
		s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
	}
	s.Linux.MaskedPaths = append(s.Linux.MaskedPaths, root.Masked...)
	if w.Privileged {
		if s.Linux.Devices, err = oci.HostDevices(); err != nil {
			return nil, fmt.Errorf("list devices: %w", err)
		}
		s.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	} else if s.Linux.Seccomp, err = filter(s, w, root.Programs); err != nil {
		return nil, err
	}
	if err := devices(s.Linux, w.Devices); err != nil {
		return nil, err
	}
	if err := r.mounts(s, pod, w, root); err != nil {
		return nil, err
	}
	if pod.IDs.Size > 0 {
		s.Linux.Sysctl = map[string]string{}
		for name, value := range pod.Sysctls {
			if !isNetSysctl(name) {
				s.Linux.Sysctl[name] = value
			}
		}
	}
	return s, nil
}

// schedule sets limits and priorities, the machine's own where the workload has
// none.
func schedule(p *specs.Process, w runtime.Workload) {
	p.Rlimits = nil
	for _, l := range w.Rlimits {
		p.Rlimits = append(p.Rlimits, specs.POSIXRlimit{Type: l.Name, Soft: l.Soft, Hard: l.Hard})
	}
	if w.Nice != nil {
		p.Scheduler = &specs.Scheduler{Policy: specs.SchedOther, Nice: int32(*w.Nice)}
	}
	if w.IO != nil {
		class := map[string]specs.IOPriorityClass{"realtime": specs.IOPRIO_CLASS_RT, "best-effort": specs.IOPRIO_CLASS_BE, "idle": specs.IOPRIO_CLASS_IDLE}[w.IO.Class]
		p.IOPriority = &specs.LinuxIOPriority{Class: class, Priority: w.IO.Level}
	}
}

func environment(pod runtime.Pod, w runtime.Workload) []string {
	var env []string
	has := func(name string) bool {
		return slices.ContainsFunc(w.Env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
	}
	if !has("PATH") {
		env = append(env, defaultPath)
	}
	if !has("HOSTNAME") {
		name := pod.Hostname
		if pod.NetNS == "" {
			name, _ = os.Hostname()
		}
		env = append(env, "HOSTNAME="+name)
	}
	if w.TTY && !has("TERM") {
		env = append(env, "TERM=xterm")
	}
	return append(env, w.Env...)
}

// resolveUser finds the numbers of a workload's user and groups in its own
// file system.
func resolveUser(root string, w runtime.Workload) (specs.User, error) {
	read := func(name string) io.Reader {
		f, err := openInRoot(root, name)
		if err != nil {
			return nil
		}
		defer f.Close()
		data, err := io.ReadAll(io.LimitReader(f, 4<<20))
		if err != nil {
			return nil
		}
		return strings.NewReader(string(data))
	}
	found, err := user.GetExecUser(w.User, nil, read("/etc/passwd"), read("/etc/group"))
	if err != nil && w.RequireNonRoot {
		return specs.User{}, fmt.Errorf("%w: user %q has no number in the image: %v", runtime.ErrRunsAsRoot, w.User, err)
	}
	if err != nil {
		return specs.User{}, fmt.Errorf("%w: user %q: %v", runtime.ErrInvalid, w.User, err)
	}
	if found.Uid == 0 && w.RequireNonRoot {
		return specs.User{}, fmt.Errorf("%w: user %q is number 0", runtime.ErrRunsAsRoot, w.User)
	}
	u := specs.User{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	// The primary group is repeated, so that a process cannot get around a
	// file's denial for that group by dropping it.
	u.AdditionalGids = []uint32{u.GID}
	if w.OnlyGroups {
		found.Sgids = nil
	} else if name, _, named := strings.Cut(w.User, ":"); named {
		// Naming a group drops, in the library, those that the image gives the user.
		if own, err := user.GetExecUser(name, nil, read("/etc/passwd"), read("/etc/group")); err == nil {
			found.Sgids = own.Sgids
		}
	}
	for _, g := range found.Sgids {
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	for _, g := range w.Groups {
		u.AdditionalGids = append(u.AdditionalGids, uint32(g))
	}
	slices.Sort(u.AdditionalGids)
	u.AdditionalGids = slices.Compact(u.AdditionalGids)
	return u, nil
}

// held are the capabilities that this machine lets us give.
var held = sync.OnceValues(cap.Current)

func (r *Runtime) capabilities(w runtime.Workload) *specs.LinuxCapabilities {
	have, err := held()
	if err != nil {
		r.Log.Warn("own capabilities are unknown", "err", err)
		have = cap.Known()
	}
	caps := have
	if !w.Privileged {
		caps = nil
		for _, c := range w.Capabilities {
			if slices.Contains(have, c) {
				caps = append(caps, c)
			} else {
				r.Log.Warn("capability cannot be given on this machine", "workload", w.ID.String(), "capability", c)
			}
		}
	}
	return &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
}

// oomScore is the score to ask for: without CAP_SYS_RESOURCE it cannot be less
// than that of this process.
func (r *Runtime) oomScore(want *int) *int {
	score := 0
	if want != nil {
		score = *want
	}
	have, err := held()
	if err == nil && !slices.Contains(have, "CAP_SYS_RESOURCE") {
		data, err := os.ReadFile("/proc/self/oom_score_adj")
		own, aerr := strconv.Atoi(strings.TrimSpace(string(data)))
		if err == nil && aerr == nil && score < own {
			return &own
		}
		if err == nil && aerr == nil && score < 0 {
			r.Log.Debug("OOM score cannot be lowered on this machine", "want", score, "get", own)
			return &own
		}
	}
	return &score
}

func (r *Runtime) namespaces(pod runtime.Pod, privileged bool) []specs.LinuxNamespace {
	dir := filepath.Join(r.podDir(pod.ID), "ns")
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	if ns := r.userNS(pod); ns != "" {
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace, Path: ns})
	}
	if !pod.HostIPC {
		list = append(list, specs.LinuxNamespace{Type: specs.IPCNamespace, Path: filepath.Join(dir, "ipc")})
	}
	if pod.NetNS != "" {
		list = append(list, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: pod.NetNS})
		if !pod.HostUTS {
			list = append(list, specs.LinuxNamespace{Type: specs.UTSNamespace, Path: filepath.Join(dir, "uts")})
		}
	}
	switch {
	case pod.HostPID:
	case pod.SharePID:
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace, Path: filepath.Join(dir, "pid")})
	default:
		list = append(list, specs.LinuxNamespace{Type: specs.PIDNamespace})
	}
	if cgroup.Unified() && !privileged {
		list = append(list, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	return list
}

func filter(s *specs.Spec, w runtime.Workload, root string) (*specs.LinuxSeccomp, error) {
	profile := w.Seccomp
	switch profile {
	case "":
		return nil, nil
	case "default":
		f := seccomp.DefaultProfile(s)
		// To compile the filter for the 32-bit system calls too takes 12 ms
		// of each start, so those are for images that have a use for them;
		// elsewhere they are refused.
		if len(f.Architectures) > 0 && !has32Bit(root, w.Args[0]) {
			f.Architectures = f.Architectures[:1]
		}
		return f, nil
	}
	data, err := os.ReadFile(profile)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no seccomp profile %s on this machine; put it there", runtime.ErrInvalid, profile)
	}
	if err != nil {
		return nil, fmt.Errorf("seccomp profile: %w", err)
	}
	f := new(specs.LinuxSeccomp)
	if err := json.Unmarshal(data, f); err != nil {
		return nil, fmt.Errorf("%w: seccomp profile %s: %v", runtime.ErrInvalid, profile, err)
	}
	return f, nil
}

// has32Bit tells whether an image is made to run programs of the machine's
// 32-bit mode: it has a loader for them, or its shell or the program that is
// to run is one.
func has32Bit(root, program string) bool {
	for _, loader := range []string{"/lib/ld-linux.so.2", "/lib/ld-musl-i386.so.1", "/lib/ld-linux-armhf.so.3", "/lib/ld-musl-armhf.so.1", "/libx32/ld-linux-x32.so.2"} {
		if f, err := pathrs.OpenInRoot(root, loader); err == nil {
			f.Close()
			return true
		}
	}
	for _, name := range []string{"/bin/sh", program} {
		head := make([]byte, 5)
		if f, err := openInRoot(root, name); err == nil {
			_, err := io.ReadFull(f, head)
			f.Close()
			if err == nil && string(head) == elf.ELFMAG+string(byte(elf.ELFCLASS32)) {
				return true
			}
		}
	}
	return false
}

// openInRoot opens a regular file of a file system that is not trusted: links
// in it lead nowhere else.
func openInRoot(root, name string) (*os.File, error) {
	handle, err := pathrs.OpenInRoot(root, name)
	if err != nil {
		return nil, err
	}
	defer handle.Close()
	if info, err := handle.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", name, os.ErrInvalid)
	}
	return pathrs.Reopen(handle, unix.O_RDONLY)
}

// mounts completes the usual mounts by the pod's and the workload's own.
func (r *Runtime) mounts(s *specs.Spec, pod runtime.Pod, w runtime.Workload, root Root) error {
	shm := filepath.Join(r.podDir(pod.ID), "shm")
	if pod.HostIPC {
		shm = "/dev/shm"
	}
	access := "ro"
	if w.Privileged {
		access = "rw"
	}
	usual := []specs.Mount{}
	for _, m := range s.Mounts {
		switch m.Destination {
		case "/run": // images bring their own
			continue
		case "/dev/shm":
			m = specs.Mount{Destination: m.Destination, Type: "bind", Source: shm, Options: []string{"rbind", "rprivate", "nosuid", "noexec", "nodev"}}
		case "/sys":
			m.Options = []string{"nosuid", "noexec", "nodev", access}
		}
		usual = append(usual, m)
	}
	usual = append(usual, specs.Mount{
		Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup",
		Options: []string{"nosuid", "noexec", "nodev", "relatime", access},
	})

	own := slices.Clone(w.Mounts)
	slices.SortStableFunc(own, func(a, b runtime.Mount) int {
		return strings.Count(path.Clean(a.Target), "/") - strings.Count(path.Clean(b.Target), "/")
	})
	s.Mounts = slices.DeleteFunc(slices.Concat(root.Mounts, usual), func(m specs.Mount) bool {
		return slices.ContainsFunc(own, func(o runtime.Mount) bool { return path.Clean(o.Target) == m.Destination })
	})
	for _, m := range own {
		if !path.IsAbs(m.Target) {
			return fmt.Errorf("%w: mount on %q: not an absolute path", runtime.ErrInvalid, m.Target)
		}
		if _, err := os.Stat(m.Source); err != nil {
			return fmt.Errorf("%w: mount on %s: %v", runtime.ErrInvalid, m.Target, err)
		}
		options := []string{"rbind"}
		if ns := r.userNS(pod); ns != "" {
			if err := mount.IDMapped(m.Source, "", ns); errors.Is(err, mount.ErrUnmappable) {
				return fmt.Errorf("%w: what is to be mounted on %s is on a file system that cannot be mounted with other owners (hostUsers: false); use another volume, or leave hostUsers out", runtime.ErrInvalid, m.Target)
			} else if err != nil {
				return fmt.Errorf("mount on %s: %w", m.Target, err)
			}
			options = append(options, "idmap")
		}
		switch m.Propagation {
		case "", "private":
			options = append(options, "rprivate")
		case "rslave", "rshared":
			options = append(options, m.Propagation)
			if s.Linux.RootfsPropagation != "rshared" {
				s.Linux.RootfsPropagation = m.Propagation
			}
		default:
			return fmt.Errorf("%w: mount on %s: unknown propagation %q", runtime.ErrInvalid, m.Target, m.Propagation)
		}
		switch {
		case m.ReadOnly && m.RecursiveReadOnly:
			options = append(options, "rro")
		case m.ReadOnly:
			options = append(options, "ro")
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: path.Clean(m.Target), Type: "bind", Source: m.Source, Options: options})
	}
	return nil
}

// devices adds the workload's own devices and its rights to them.
func devices(l *specs.Linux, own []runtime.Device) error {
	for _, d := range own {
		if !path.IsAbs(d.Target) {
			return fmt.Errorf("%w: device %q: not an absolute path", runtime.ErrInvalid, d.Target)
		}
		var stat unix.Stat_t
		if err := unix.Stat(d.Source, &stat); err != nil {
			return fmt.Errorf("%w: device %s: %v", runtime.ErrInvalid, d.Target, &os.PathError{Op: "stat", Path: d.Source, Err: err})
		}
		kind := "b"
		switch stat.Mode & unix.S_IFMT {
		case unix.S_IFBLK:
		case unix.S_IFCHR:
			kind = "c"
		default:
			return fmt.Errorf("%w: device %s: %s is not a device", runtime.ErrInvalid, d.Target, d.Source)
		}
		access := "rwm"
		if d.ReadOnly {
			access = "rm"
		}
		major, minor := int64(unix.Major(stat.Rdev)), int64(unix.Minor(stat.Rdev))
		mode := os.FileMode(stat.Mode & 0o777)
		l.Devices = append(l.Devices, specs.LinuxDevice{
			Path: path.Clean(d.Target), Type: kind, Major: major, Minor: minor, FileMode: &mode, UID: &stat.Uid, GID: &stat.Gid,
		})
		l.Resources.Devices = append(l.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: kind, Major: &major, Minor: &minor, Access: access})
	}
	return nil
}

func resources(r runtime.Resources) *specs.LinuxResources {
	l := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: r.CPUSet}, Memory: &specs.LinuxMemory{}}
	if r.CPUShares > 0 {
		shares := uint64(r.CPUShares)
		l.CPU.Shares = &shares
	}
	if r.CPUQuota != 0 {
		l.CPU.Quota = &r.CPUQuota
	}
	if r.CPUPeriod > 0 {
		period := uint64(r.CPUPeriod)
		l.CPU.Period = &period
	}
	if r.Memory > 0 {
		l.Memory.Limit = &r.Memory
		if cgroup.SwapLimited() {
			l.Memory.Swap = &r.Memory // memory and swap together: no swap
		}
	}
	if r.Pids > 0 {
		l.Pids = &specs.LinuxPids{Limit: &r.Pids}
	}
	for size, limit := range r.HugePages {
		l.HugepageLimits = append(l.HugepageLimits, specs.LinuxHugepageLimit{Pagesize: size, Limit: uint64(limit)})
	}
	if cgroup.Unified() {
		// A container is one thing: when memory runs out, all of it goes.
		l.Unified = map[string]string{"memory.oom.group": "1"}
	}
	return l
}

func limits(r runtime.Resources) cgroup.Limits {
	return cgroup.Limits{
		CPUShares: r.CPUShares, CPUQuota: r.CPUQuota, CPUPeriod: r.CPUPeriod,
		Memory: r.Memory, Pids: r.Pids, HugePages: r.HugePages, CPUSet: r.CPUSet,
	}
}

// runPause starts the pod's init: the keeper's own program in another life, on
// a root that holds nothing else.
func (r *Runtime) runPause(ctx context.Context, pod runtime.Pod) (*protocol.Workload, error) {
	info, err := r.Keeper.Info(ctx)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(r.podDir(pod.ID), "ns", "root")
	if pod.IDs.Size > 0 {
		id := runtime.ID{Pod: pod.ID}
		if err := r.makeOpenRoot(pod, id); err != nil {
			return nil, err
		}
		root = r.rootDir(pod, id)
	}
	// The pod's root could not make the file itself.
	if err := os.MkdirAll(root, 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(root, "init"), nil, 0o755); err != nil {
		return nil, err
	}
	for _, d := range []string{"proc", "dev", "sys"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			return nil, err
		}
	}
	s, err := oci.GenerateSpec(namespaces.WithNamespace(ctx, "tutti"), nil, &containers.Container{ID: pauseID(pod.ID)})
	if err != nil {
		return nil, err
	}
	s.Root = &specs.Root{Path: root, Readonly: true}
	s.Process.Args, s.Process.Cwd, s.Process.Env = []string{"/init", "pause"}, "/", nil
	s.Process.Capabilities = &specs.LinuxCapabilities{}
	s.Process.User = specs.User{UID: 65534, GID: 65534}
	s.Process.Rlimits = nil
	s.Process.OOMScoreAdj = r.oomScore(new(-998))
	s.Linux.CgroupsPath = path.Join(r.podCgroup(pod), "init")
	s.Linux.Namespaces = r.namespaces(runtime.Pod{ID: pod.ID, NetNS: pod.NetNS, HostIPC: pod.HostIPC, IDs: pod.IDs}, false)
	s.Mounts = []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "mode=755", "size=64k"}},
		{Destination: "/init", Type: "bind", Source: info.Binary, Options: []string{"rbind", "rprivate", "ro"}},
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	return r.Keeper.Start(ctx, pauseID(pod.ID), data, &protocol.Envelope{
		Log: os.DevNull, Labels: map[string]string{labelClass: r.Class, labelPod: pod.ID, labelAttempt: "0"}, Program: r.Program,
	})
}
