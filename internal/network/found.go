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

const forwarding = "net/ipv4/ip_forward"

// enableForwarding turns routing on. Turning the global switch overwrites the
// switch of each link, so those that differ from it are remembered as well.
func (f *found) enableForwarding(dir string) error {
	value, err := readSysctl(forwarding)
	if err != nil {
		return fmt.Errorf("read sysctl %s: %w", forwarding, err)
	}
	if value == "1" {
		return nil
	}
	if _, known := f.Sysctls[forwarding]; !known {
		f.Sysctls[forwarding] = value
		links, err := filepath.Glob(sysctlPath("net/ipv4/conf/*/forwarding"))
		if err != nil {
			return err
		}
		for _, path := range links {
			name := strings.TrimPrefix(path, "/proc/sys/")
			if v, err := readSysctl(name); err == nil && v != value {
				f.Sysctls[name] = v
			}
		}
		if err := replaceJSON(foundPath(dir), f); err != nil {
			return fmt.Errorf("write settings found on the machine: %w", err)
		}
	}
	return writeSysctl(forwarding, "1")
}

// restore puts the settings back. Settings of links that have gone are
// skipped.
func (f *found) restore() error {
	value, changed := f.Sysctls[forwarding]
	if !changed {
		return nil
	}
	err := writeSysctl(forwarding, value)
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
