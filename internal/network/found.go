package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// found is what the machine was like before the first change, and what has
// been made since: all that Purge needs to undo it.
type found struct {
	Bridge string `json:"bridge"`
	// Sysctls by path below /proc/sys.
	Sysctls map[string]string `json:"sysctls"`
}

func foundPath(dir string) string { return filepath.Join(dir, "found.json") }

func readFound(dir string) (found, error) {
	f := found{Sysctls: map[string]string{}}
	data, err := os.ReadFile(foundPath(dir))
	if errors.Is(err, os.ErrNotExist) {
		return f, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &f)
	}
	if err != nil {
		return f, fmt.Errorf("read settings found on the machine: %w", err)
	}
	return f, nil
}

func sysctlPath(name string) string { return filepath.Join("/proc/sys", name) }

func readSysctl(name string) (string, error) {
	data, err := os.ReadFile(sysctlPath(name))
	return strings.TrimSpace(string(data)), err
}

func writeSysctl(name, value string) error {
	if err := os.WriteFile(sysctlPath(name), []byte(value), 0); err != nil {
		return fmt.Errorf("set sysctl %s to %s: %w", name, value, err)
	}
	return nil
}

const (
	forwarding = "net/ipv4/ip_forward"
	redirects  = "net/ipv4/conf/all/send_redirects"
)

// prepare sets what the machine as a whole needs to route between pods, and
// remembers what it was.
//
// Pods reach each other by the link they came from; the kernel would tell them
// that there is a shorter way. There is none, and what it sends counts against
// the refusals that it may send to a pod.
func (f *found) prepare(dir string) error {
	for _, s := range [][2]string{{forwarding, "1"}, {redirects, "0"}} {
		name, want := s[0], s[1]
		value, err := readSysctl(name)
		if err != nil {
			return fmt.Errorf("read sysctl %s: %w", name, err)
		}
		if value == want {
			continue
		}
		if _, known := f.Sysctls[name]; !known {
			f.Sysctls[name] = value
			if name == forwarding {
				f.rememberLinks(value)
			}
			if err := replaceJSON(foundPath(dir), f); err != nil {
				return fmt.Errorf("write settings found on the machine: %w", err)
			}
		}
		if err := writeSysctl(name, want); err != nil {
			return err
		}
	}
	return nil
}

// rememberLinks notes the links that forward though the machine does not, or
// the other way round: the machine's switch overwrites theirs.
func (f *found) rememberLinks(machine string) {
	links, _ := filepath.Glob(sysctlPath("net/ipv4/conf/*/forwarding"))
	for _, path := range links {
		name := strings.TrimPrefix(path, "/proc/sys/")
		if v, err := readSysctl(name); err == nil && v != machine {
			f.Sysctls[name] = v
		}
	}
}

// restore puts the settings back, the machine's before its links'. Settings of
// links that have gone are skipped.
func (f *found) restore() error {
	var err error
	if value, changed := f.Sysctls[forwarding]; changed {
		err = writeSysctl(forwarding, value)
	}
	for name, v := range f.Sysctls {
		if name == forwarding {
			continue
		}
		if e := writeSysctl(name, v); e != nil && !errors.Is(e, os.ErrNotExist) {
			err = errors.Join(err, e)
		}
	}
	return err
}
