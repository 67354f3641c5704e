// Package cgroup makes, limits and removes control groups by their path below
// the hierarchies' roots, on version 1, on version 2 and on both.
package cgroup

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/process"
)

// Limits of a group; zero does not limit.
type Limits struct {
	CPUShares, CPUQuota, CPUPeriod int64 // shares on the scale of version 1
	Memory, Pids                   int64
	HugePages                      map[string]int64
	CPUSet                         string
}

func group(path string, l Limits) (cgroups.Manager, error) {
	if path = filepath.Clean("/" + path); path == "/" {
		return nil, errors.New("the root is not a group")
	}
	r := &cgroups.Resources{
		SkipDevices: true,
		CpuQuota:    l.CPUQuota, CpuPeriod: uint64(l.CPUPeriod), CpusetCpus: l.CPUSet,
		Memory: l.Memory,
		// As version 1 does by itself: what is in use is not killed for a limit.
		MemoryCheckBeforeUpdate: true,
	}
	if l.CPUShares > 0 {
		r.CpuShares = uint64(l.CPUShares)
		r.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(r.CpuShares)
	}
	if l.Memory > 0 && SwapLimited() {
		r.MemorySwap = l.Memory
	}
	if l.Pids > 0 {
		r.PidsLimit = &l.Pids
	}
	for size, limit := range l.HugePages {
		r.HugetlbLimit = append(r.HugetlbLimit, &cgroups.HugepageLimit{Pagesize: size, Limit: uint64(limit)})
	}
	return manager.New(&cgroups.Cgroup{Path: path, Resources: r})
}

// Make makes a group, and its parents, or changes its limits. To be given less
// memory than it uses, and cannot be rid of, is an error.
func Make(path string, l Limits) error {
	g, err := group(path, l)
	if err != nil {
		return fmt.Errorf("make control group %s: %w", path, err)
	}
	if err := g.Apply(-1); err != nil {
		return fmt.Errorf("make control group %s: %w", path, err)
	}
	c, err := g.GetCgroups()
	if err != nil {
		return fmt.Errorf("make control group %s: %w", path, err)
	}
	if err := g.Set(c.Resources); err != nil {
		return fmt.Errorf("limit control group %s: %w", path, err)
	}
	return nil
}

// Join moves a process into a group, which is made if need be. It does nothing
// to one that is there already.
func Join(path string, pid int) error {
	g, err := group(path, Limits{})
	if err == nil {
		err = g.Apply(pid)
	}
	if err != nil {
		return fmt.Errorf("move process %d into control group %s: %w", pid, path, err)
	}
	return nil
}

// Remove kills what runs in a group and removes it with all groups in it. No
// such group is no error.
func Remove(path string) error {
	g, err := group(path, Limits{})
	if err != nil {
		return fmt.Errorf("remove control group %s: %w", path, err)
	}
	for _, dir := range g.GetPaths() {
		if err := Kill(dir); err != nil {
			return fmt.Errorf("kill processes of control group %s: %w", path, err)
		}
	}
	if err := g.Destroy(); err != nil {
		return fmt.Errorf("remove control group %s: %w", path, err)
	}
	return nil
}

// Kill kills every process in the group of a directory and below, and returns
// when they have ended. Who forks meanwhile is met in the next round.
func Kill(dir string) error {
	for range 100 {
		var dying []*os.File
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return fs.SkipDir
			}
			if err != nil || d.Name() != "cgroup.procs" {
				return err
			}
			open := map[int]*os.File{}
			for pid := range members(path) {
				ticks, err := process.StartTicks(pid)
				if err != nil {
					continue
				}
				if f, err := process.Open(pid, ticks); err == nil {
					open[pid] = f
				}
			}
			if len(open) == 0 {
				return nil
			}
			// A pid can have come to mean another process before it was
			// opened, but what is a member now is what was opened.
			now := members(path)
			for pid, f := range open {
				if !now[pid] || process.Signal(f, unix.SIGKILL) != nil {
					f.Close()
					continue
				}
				dying = append(dying, f)
			}
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(dying) == 0 {
			return nil
		}
		for _, f := range dying {
			_ = f.SetReadDeadline(time.Now().Add(10 * time.Second))
			err := process.Wait(f)
			f.Close()
			if err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("processes in %s fork faster than they can be killed", dir)
}

// Memory of a group in bytes. Limit is 0 for none.
type Memory struct{ Limit, Usage, WorkSet int64 }

// ReadMemory reads what a group may have of memory and what it has.
func ReadMemory(path string) (Memory, error) {
	g, err := group(path, Limits{})
	if err != nil {
		return Memory{}, fmt.Errorf("read memory of control group %s: %w", path, err)
	}
	s, err := g.Stats(&cgroups.StatsOptions{Controllers: cgroups.Memory})
	if err != nil {
		return Memory{}, fmt.Errorf("read memory of control group %s: %w", path, err)
	}
	m := &s.MemoryStats
	read := Memory{Usage: int64(m.Usage.Usage), WorkSet: int64(WorkSet(m))}
	// No limit is written as one that no machine has.
	if m.Usage.Limit < 1<<62 {
		read.Limit = int64(m.Usage.Limit)
	}
	return read, nil
}

// WorkSet is how many bytes of what a group uses cannot be reclaimed at once:
// all but the file pages that were not used lately, as everywhere in
// Kubernetes.
func WorkSet(m *cgroups.MemoryStats) uint64 {
	cold := m.Stats["total_inactive_file"]
	if Unified() {
		cold = m.Stats["inactive_file"]
	}
	return m.Usage.Usage - min(cold, m.Usage.Usage)
}

// members reads a list of processes; none when the group is going away.
func members(path string) map[int]bool {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	set := map[int]bool{}
	for field := range bytes.FieldsSeq(data) {
		// 0 is a process of a namespace that is not seen from here.
		if pid, err := strconv.Atoi(string(field)); err == nil && pid != 0 {
			set[pid] = true
		}
	}
	return set
}

// SwapLimited tells whether the kernel can be asked to keep a group from
// swapping.
var SwapLimited = sync.OnceValue(func() bool {
	if !cgroups.IsCgroup2UnifiedMode() {
		mountpoint, err := cgroups.FindCgroupMountpoint("", "memory")
		if err != nil {
			return false
		}
		_, err = os.Stat(filepath.Join(mountpoint, "memory.memsw.limit_in_bytes"))
		return err == nil
	}
	// To forbid swapping is the one limit that is passed over where the
	// kernel does not count swap, so it can always be asked for.
	return true
})

// Unified tells whether this machine has version 2 only.
func Unified() bool { return cgroups.IsCgroup2UnifiedMode() }

// Exists tells whether any hierarchy has the group.
func Exists(path string) bool {
	g, err := group(path, Limits{})
	if err != nil {
		return false
	}
	for _, dir := range g.GetPaths() {
		if _, err := os.Stat(dir); err == nil {
			return true
		}
	}
	return false
}
