package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"strings"

	"github.com/distribution/reference"
	"k8s.io/apimachinery/pkg/util/validation"

	"tutti.dev/tutti/internal/agent/node"
	"tutti.dev/tutti/internal/agent/pressure"
	"tutti.dev/tutti/internal/api"
)

// format is the layout of the data directory that this program writes. A
// program that finds a higher one must not touch it.
const format = 1

// file is what is kept in DataDir.Config.
type file struct {
	Format int `json:"format"`
	api.Settings
}

// defaults are the settings of a machine that was told nothing.
func defaults() (api.Settings, error) {
	host, err := os.Hostname()
	if err != nil {
		return api.Settings{}, fmt.Errorf("find this machine's name: %w", err)
	}
	return api.Settings{Port: 6443, RegistryPort: 5000, NodeName: strings.ToLower(host), ClusterCIDR: "10.42.0.0/16", ServiceCIDR: "10.43.0.0/16"}, nil
}

// readSettings reads what a machine was told before. found is false for a
// directory that is new.
func readSettings(dir api.DataDir) (s api.Settings, found bool, err error) {
	text, err := os.ReadFile(dir.Config())
	switch {
	case errors.Is(err, fs.ErrNotExist):
		_, err := dir.Check()
		return s, false, err
	case err != nil:
		return s, false, fmt.Errorf("read settings: %w", err)
	}
	var f file
	if err := json.Unmarshal(text, &f); err != nil {
		return s, false, fmt.Errorf("%s is damaged (%w); restore it from a backup, or begin anew with `tutti stop --purge`", dir.Config(), err)
	}
	switch {
	case f.Format > format:
		return s, false, fmt.Errorf("%s was written by a newer tutti (format %d, this one knows %d); install that version", dir, f.Format, format)
	case f.Format < 1:
		return s, false, fmt.Errorf("%s is damaged (it has no format); restore it from a backup, or begin anew with `tutti stop --purge`", dir.Config())
	}
	return f.Settings, true, nil
}

// merge lays what is asked for over what was asked before, over the defaults.
// What the cluster is built on cannot change any more.
func merge(asked, before api.Settings, found bool) (api.Settings, error) {
	s, err := defaults()
	if err != nil {
		return s, err
	}
	overlay(&s, before)
	if found {
		switch {
		case before.Agent && !asked.Agent:
			return s, errors.New("this data directory is an agent's, of a cluster elsewhere; run `tutti agent` with it, or begin anew with `tutti stop --purge`")
		case asked.Agent && !before.Agent:
			return s, errors.New("this data directory has a cluster of its own; choose another with --data-dir, or begin anew with `tutti stop --purge`")
		}
		for _, fixed := range []struct{ flag, asked, is string }{
			{"--node-name", asked.NodeName, s.NodeName},
			{"--cluster-cidr", asked.ClusterCIDR, s.ClusterCIDR},
			{"--service-cidr", asked.ServiceCIDR, s.ServiceCIDR},
		} {
			if fixed.asked != "" && fixed.asked != fixed.is {
				return s, fmt.Errorf("%s cannot change from %s to %s; leave it out, or begin anew with `tutti stop --purge`", fixed.flag, fixed.is, fixed.asked)
			}
		}
	}
	overlay(&s, asked)
	return s, validate(s)
}

func overlay(s *api.Settings, with api.Settings) {
	set := func(to *string, v string) {
		if v != "" {
			*to = v
		}
	}
	set(&s.Address, with.Address)
	set(&s.NodeName, with.NodeName)
	set(&s.ClusterCIDR, with.ClusterCIDR)
	set(&s.ServiceCIDR, with.ServiceCIDR)
	set(&s.UnsafeSysctls, with.UnsafeSysctls)
	set(&s.Mirrors, with.Mirrors)
	set(&s.EvictionHard, with.EvictionHard)
	set(&s.SystemReserved, with.SystemReserved)
	s.Agent = s.Agent || with.Agent
	if with.Port != 0 {
		s.Port = with.Port
	}
	if with.RegistryPort != 0 {
		s.RegistryPort = with.RegistryPort
	}
}

func validate(s api.Settings) error {
	if s.Port < 1 || s.Port > 65535 {
		return fmt.Errorf("--port %d is not a port; choose one from 1 to 65535", s.Port)
	}
	if s.RegistryPort != api.NoRegistry && (s.RegistryPort < 1 || s.RegistryPort > 65535 || s.RegistryPort == s.Port) {
		return fmt.Errorf("--registry-port %d is not a free port; choose another from 1 to 65535, or %d for no registry", s.RegistryPort, api.NoRegistry)
	}
	mirrors, err := parseMirrors(s.Mirrors)
	if err != nil {
		return err
	}
	if len(mirrors) > 0 && s.RegistryPort == api.NoRegistry {
		return fmt.Errorf("--mirrors needs the registry, which --registry-port %d turns off; leave out one of them", api.NoRegistry)
	}
	if _, err := pressure.Parse(s.EvictionHard); err != nil {
		return err
	}
	if _, err := node.ParseReserved(s.SystemReserved); err != nil {
		return err
	}
	if s.Address != "" {
		if _, err := netip.ParseAddr(s.Address); err != nil {
			return fmt.Errorf("--address %q is not an IP address; give one of this machine's, or 0.0.0.0 for all", s.Address)
		}
	}
	if bad := validation.IsDNS1123Subdomain(s.NodeName); len(bad) > 0 {
		return fmt.Errorf("%q cannot be the name of a node; choose one of lower case letters, digits, '-' and '.' with --node-name", s.NodeName)
	}
	cluster, err := parseNetwork("--cluster-cidr", s.ClusterCIDR, 24)
	if err != nil {
		return err
	}
	service, err := parseNetwork("--service-cidr", s.ServiceCIDR, 28)
	if err != nil {
		return err
	}
	own := netip.PrefixFrom(local, local.BitLen())
	switch {
	case cluster.Overlaps(service):
		return fmt.Errorf("--cluster-cidr %s and --service-cidr %s overlap; choose others", cluster, service)
	case cluster.Overlaps(own):
		return fmt.Errorf("--cluster-cidr %s has %s in it, by which pods know this machine; choose another", cluster, local)
	case service.Overlaps(own):
		return fmt.Errorf("--service-cidr %s has %s in it, by which pods know this machine; choose another", service, local)
	}
	return nil
}

// parseMirrors returns the URL of each registry that is mirrored by the name
// that images have for it.
func parseMirrors(list string) (map[string]string, error) {
	mirrors := map[string]string{}
	if list == "" || list == api.NoMirrors {
		return mirrors, nil
	}
	for _, item := range strings.Split(list, ",") {
		host, at, explicit := strings.Cut(item, "=")
		named, err := reference.ParseNormalizedNamed(host + "/name")
		if err != nil || reference.Domain(named) != host {
			return nil, fmt.Errorf("--mirrors: %q is not a registry; name it as images do, such as docker.io or quay.io", host)
		}
		if _, twice := mirrors[host]; twice {
			return nil, fmt.Errorf("--mirrors: %s is there twice; leave one out", host)
		}
		if !explicit {
			at = "https://" + host
			if host == "docker.io" {
				at = "https://registry-1.docker.io" // where docker, too, asks for its images
			}
		}
		u, err := url.Parse(at)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || *u != (url.URL{Scheme: u.Scheme, Host: u.Host}) {
			return nil, fmt.Errorf("--mirrors: %q is not the address of a registry; give https://HOST[:PORT], without a path or a password", at)
		}
		mirrors[host] = at
	}
	return mirrors, nil
}

// parseNetwork reads a network of at least the size of a /bits.
func parseNetwork(flag, value string, bits int) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(value)
	if err != nil || !p.Addr().Is4() || p.Masked() != p || p.Bits() > bits {
		return p, fmt.Errorf("%s %q is not an IPv4 network of at least a /%d; give one such as 10.42.0.0/16", flag, value, bits)
	}
	return p, nil
}

// Configure keeps settings for the next start, with those of before, and says
// whether any is new. What cannot be is refused, and nothing changed.
func Configure(dir api.DataDir, asked api.Settings) (changed bool, err error) {
	before, found, err := readSettings(dir)
	if err != nil {
		return false, err
	}
	s, err := merge(asked, before, found)
	if err != nil {
		return false, err
	}
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return false, fmt.Errorf("make the data directory: %w", err)
	}
	return !found || s != before, writeSettings(dir, s)
}

// writeSettings makes the directory ours, or keeps what changed. The file is
// never half there.
func writeSettings(dir api.DataDir, s api.Settings) error {
	text, err := json.MarshalIndent(file{format, s}, "", "  ")
	if err != nil {
		return err
	}
	text = append(text, '\n')
	if old, err := os.ReadFile(dir.Config()); err == nil && bytes.Equal(old, text) {
		return nil
	}
	next := dir.Config() + ".new"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	_, err = f.Write(text)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	if err := os.Rename(next, dir.Config()); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}
