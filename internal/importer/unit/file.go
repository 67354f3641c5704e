// Package unit turns services of systemd into manifests: it reads a unit as
// systemd does, from its file, drop-ins and template, and says in Kubernetes'
// words what it says. What cannot be said is listed, never left out: the
// translation takes from the unit what it knows, and lists what is left.
package unit

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/unit"
)

// A Unit is a service as systemd sees it.
type Unit struct {
	Name string // postgresql@15-main.service
	File string // where it was read

	sections []string
	settings []setting
}

type setting struct{ section, key, value string }

// dirs are where systemd looks for units, the most important first.
var dirs = []string{"/etc/systemd/system", "/run/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system"}

const suffix = ".service"

// others are the kinds of units that are not services.
var others = []string{".automount", ".device", ".mount", ".path", ".scope", ".slice", ".socket", ".swap", ".target", ".timer"}

// in is a machine's path in its file system.
func in(name string) string {
	if name = strings.TrimPrefix(path.Clean("/"+name), "/"); name == "" {
		return "."
	}
	return name
}

func exists(root fs.FS, name string) bool {
	_, err := fs.Stat(root, in(name))
	return err == nil
}

// Load reads a unit with its drop-ins from a machine's file system. arg is a
// file's path, from the directory dir if it is not absolute, or the name of a
// unit that systemd would find. postgresql@15-main.service is read from
// postgresql@.service.
func Load(root fs.FS, dir, arg string) (Unit, error) {
	switch ext := path.Ext(arg); {
	case ext == suffix:
	case slices.Contains(others, ext):
		return Unit{}, fmt.Errorf("%s is a unit of another kind; only services (.service) can be imported", arg)
	case strings.Contains(arg, "/"):
		return Unit{}, fmt.Errorf("%s is not named like a service; give a file whose name ends in .service", arg)
	default:
		arg += suffix // as systemctl has it
	}
	name := path.Base(arg)
	at := arg
	if !path.IsAbs(arg) {
		at = path.Join(dir, arg)
	}
	look := []string{path.Dir(at)}
	if !strings.Contains(arg, "/") || slices.Contains(dirs, look[0]) {
		look = append(look, slices.DeleteFunc(slices.Clone(dirs), func(d string) bool { return d == look[0] })...)
	}
	prefix, instance, _ := strings.Cut(strings.TrimSuffix(name, suffix), "@")
	names := []string{name}
	if instance != "" {
		names = append(names, prefix+"@"+suffix)
	}
	u := Unit{Name: name}
	for _, n := range names {
		for _, d := range look {
			if u.File == "" && exists(root, path.Join(d, n)) {
				u.File = path.Join(d, n)
			}
		}
		if strings.Contains(arg, "/") && u.File != "" {
			break
		}
	}
	if u.File == "" {
		if strings.Contains(arg, "/") {
			return Unit{}, fmt.Errorf("%s does not exist; check the path", arg)
		}
		return Unit{}, fmt.Errorf("no unit %s is here or where systemd looks; `systemctl list-unit-files` names those that are", name)
	}
	if to, err := fs.ReadLink(root, in(u.File)); err == nil {
		target := path.Base(to)
		switch {
		case to == "/dev/null":
			return Unit{}, fmt.Errorf("%s is masked; `systemctl unmask %s` undoes that", u.File, name)
		case path.Ext(target) == suffix && target != prefix+"@"+suffix:
			u.Name = target // an alias
		}
	}
	return u, u.read(root, look)
}

// read reads the unit's file and its drop-ins.
func (u *Unit) read(root fs.FS, look []string) error {
	if err := u.add(root, u.File); err != nil {
		return err
	}
	if !slices.Contains(u.sections, "Service") {
		return fmt.Errorf("%s has no section [Service]; give a file of systemd's whose name ends in .service", u.File)
	}
	if prefix, isTemplate := strings.CutSuffix(u.Name, "@"+suffix); isTemplate {
		i := slices.IndexFunc(u.settings, func(s setting) bool { return s.section == "Install" && s.key == "DefaultInstance" })
		if i < 0 {
			return fmt.Errorf("%s is a template; say of what, as in %s", u.Name, prefix+"@INSTANCE"+suffix)
		}
		u.Name = prefix + "@" + u.settings[i].value + suffix
	}
	// Of drop-ins with the same name the most particular one counts.
	found := map[string]string{}
	for _, d := range u.dropIns() {
		for _, l := range slices.Backward(look) {
			entries, err := fs.ReadDir(root, in(path.Join(l, d)))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("read %s: %w", path.Join(l, d), err)
			}
			for _, e := range entries {
				if strings.HasSuffix(e.Name(), ".conf") {
					found[e.Name()] = path.Join(l, d, e.Name())
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if to, err := fs.ReadLink(root, in(found[name])); err == nil && to == "/dev/null" {
			continue
		}
		if err := u.add(root, found[name]); err != nil {
			return err
		}
	}
	return nil
}

// dropIns are the names of directories with drop-ins for the unit, the most
// general first.
func (u *Unit) dropIns() []string {
	names := []string{"service.d"}
	base, instance, _ := strings.Cut(strings.TrimSuffix(u.Name, suffix), "@")
	for i, c := range base {
		if c == '-' {
			names = append(names, base[:i+1]+suffix+".d")
		}
	}
	if instance != "" {
		names = append(names, base+"@"+suffix+".d")
	}
	return append(names, u.Name+".d")
}

// add appends what a file says.
func (u *Unit) add(root fs.FS, file string) error {
	text, err := fs.ReadFile(root, in(file))
	if err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	sections, err := unit.DeserializeSections(bytes.NewReader(uncommented(text)))
	if err != nil {
		return fmt.Errorf("%s is not written as a unit of systemd (%v); `systemd-analyze verify` tells more", file, err)
	}
	for _, section := range sections {
		u.sections = append(u.sections, section.Section)
		for _, o := range section.Entries {
			value := strings.TrimSpace(strings.ReplaceAll(o.Value, "\\\n", " "))
			u.settings = append(u.settings, setting{section.Section, o.Name, value})
		}
	}
	return nil
}

// uncommented leaves out comments, which may stand between the lines of one
// value, and the returns of other systems' line ends.
func uncommented(text []byte) []byte {
	var b bytes.Buffer
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		line = bytes.TrimRight(line, "\r")
		if start := bytes.TrimSpace(line); len(start) == 0 || start[0] != '#' && start[0] != ';' {
			b.Write(line)
			b.WriteByte('\n')
		}
	}
	return b.Bytes()
}
