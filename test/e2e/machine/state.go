package machine

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// State describes the machine as sorted lines: its processes, mounts, links,
// addresses, routes, packet rules, settings, control groups and files of
// tutti. Two equal states mean that nothing was left behind in between.
func (m *Machine) State() ([]string, error) {
	var lines []string
	processes, err := m.Processes()
	if err != nil {
		return nil, err
	}
	for _, p := range processes {
		lines = append(lines, "process "+strings.Join(p.Args, " "))
	}
	mounts, err := m.mounts()
	if err != nil {
		return nil, err
	}
	for _, mount := range mounts {
		if !slices.Contains(m.inherited, mount) {
			lines = append(lines, mount)
		}
	}
	for _, c := range []struct {
		kind    string
		command []string
	}{
		{"address", []string{"ip", "-o", "addr"}},
		{"link", []string{"ip", "-o", "link"}},
		{"route", []string{"ip", "route", "show", "table", "all"}},
		{"rule", []string{"ip", "rule"}},
		{"nft", []string{"nft", "list", "ruleset"}},
		{"setting", []string{"grep", "-rs", "", "/proc/sys/net/ipv4", "/proc/sys/net/ipv6", "/proc/sys/net/netfilter"}},
		{"file", []string{"find", "/run", "/etc", "/var/lib", "/dev/shm", "-xdev", "-name", "*tutti*"}},
	} {
		r := m.Run(30*time.Second, c.command[0], c.command[1:]...)
		if r.Err != nil && c.kind != "setting" { // some settings cannot be read
			return nil, errors.New(r.String())
		}
		for line := range strings.Lines(r.Stdout) {
			if line = volatile.ReplaceAllString(strings.TrimSpace(line), ""); !passing.MatchString(line) &&
				(!strings.HasPrefix(line, "/run/tutti-") || strings.HasPrefix(line, "/run/"+m.root())) {
				lines = append(lines, c.kind+" "+line)
			}
		}
	}
	groups, err := m.cgroups()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		lines = append(lines, "cgroup "+g)
	}
	if _, err := os.Stat(m.Dir); err == nil {
		lines = append(lines, "data directory")
	}
	slices.Sort(lines)
	return lines, nil
}

// mounts lists the machine's mounts.
func (m *Machine) mounts() ([]string, error) {
	info, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", m.inside.pid()))
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(info)) {
		// Fields 4 and 5 are the mount's root and place.
		if f := strings.Fields(line); len(f) > 5 {
			lines = append(lines, "mount "+f[3]+" on "+f[4])
		}
	}
	return lines, nil
}

var (
	// volatile parts differ from one look to the next.
	volatile = regexp.MustCompile(` valid_lft \S+ preferred_lft \S+`)
	passing  = regexp.MustCompile(`nf_conntrack_count|/route/|random|tcp_fastopen_key|stable_secret`)
)

// Left says what of the second state is not in the first, and the reverse,
// each line with a sign.
func Left(before, after []string) []string {
	count := map[string]int{}
	for _, l := range before {
		count[l]--
	}
	for _, l := range after {
		count[l]++
	}
	var diff []string
	for l, n := range count {
		switch {
		case n > 0:
			diff = append(diff, "+ "+l)
		case n < 0:
			diff = append(diff, "- "+l)
		}
	}
	slices.Sort(diff)
	return diff
}

// root is the name of the root of control groups, and in /run: for any data
// directory but the default one a digest of its path.
func (m *Machine) root() string {
	sum := sha256.Sum256([]byte(m.Dir))
	return "tutti-" + hex.EncodeToString(sum[:4])
}

// cgroups lists the control groups of this machine's tutti in every
// hierarchy, parents first.
func (m *Machine) cgroups() ([]string, error) {
	root := m.root()
	var groups []string
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // others come and go
		}
		if err == nil && d.IsDir() && slices.Contains(strings.Split(path, "/"), root) {
			groups = append(groups, path)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list control groups: %w", err)
	}
	return groups, nil
}

// removeCgroups removes groups that have no processes any more.
func (m *Machine) removeCgroups() error {
	groups, err := m.cgroups()
	errs := []error{err}
	slices.Reverse(groups) // children first
	for _, g := range groups {
		err := os.Remove(g)
		// The kernel may need a moment to let go of what was just killed.
		for deadline := time.Now().Add(5 * time.Second); errors.Is(err, syscall.EBUSY) && time.Now().Before(deadline); err = os.Remove(g) {
			time.Sleep(10 * time.Millisecond)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
