package hostprocess

import (
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
)

// Annotations of a pod that say how its processes are to be run.
const (
	// AnnotationRoot says what a program of the image "host" may do outside of
	// its volumes: RootShared, RootReadOnly (if nothing is said) or RootOverlay.
	AnnotationRoot = AnnotationPrefix + "root"
	// AnnotationLandlock is all of the file system that the processes may use:
	// "ro=/usr:/etc rw=/data".
	AnnotationLandlock = AnnotationPrefix + "landlock"
	// AnnotationLimits are limits as of setrlimit(2), soft or soft:hard:
	// "nofile=1024:65536 core=unlimited".
	AnnotationLimits = AnnotationPrefix + "limits"
	// AnnotationNice is a number from -20 to 19.
	AnnotationNice = AnnotationPrefix + "nice"
	// AnnotationIO is "idle", "best-effort:0" to "best-effort:7", or
	// "realtime:0" to "realtime:7".
	AnnotationIO = AnnotationPrefix + "io"
)

// Values of AnnotationRoot.
const (
	RootShared   = "shared"
	RootReadOnly = "readonly"
	RootOverlay  = "overlay"
)

// Settings is what a pod's annotations say.
type Settings struct {
	Root               string
	Landlock           bool // with nothing but what is listed
	ReadOnly, Writable []string
	Limits             []Limit
	Nice               *int
	IOClass            string // "" is the machine's own
	IOLevel            int
}

// Limit is one of setrlimit(2), its name in small letters without RLIMIT_.
type Limit struct {
	Name       string
	Soft, Hard uint64
}

// Unlimited is RLIM_INFINITY.
const Unlimited = ^uint64(0)

var limits = []string{
	"as", "core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss", "rtprio", "rttime", "sigpending", "stack",
}

// ParseSettings reads a pod's annotations. Those with another prefix are no
// business of it; an error is for the pod's owner.
func ParseSettings(annotations map[string]string) (Settings, error) {
	s := Settings{Root: RootReadOnly}
	for key, value := range annotations {
		if !strings.HasPrefix(key, AnnotationPrefix) {
			continue
		}
		var err error
		switch key {
		case AnnotationRoot:
			if s.Root = value; !slices.Contains([]string{RootShared, RootReadOnly, RootOverlay}, value) {
				err = fmt.Errorf("%q is no root; use shared, readonly or overlay", value)
			}
		case AnnotationLandlock:
			err = s.parseLandlock(value)
		case AnnotationLimits:
			err = s.parseLimits(value)
		case AnnotationNice:
			n, nerr := strconv.Atoi(value)
			if s.Nice = &n; nerr != nil || n < -20 || n > 19 {
				err = fmt.Errorf("%q is no niceness; use a number from -20 to 19", value)
			}
		case AnnotationIO:
			err = s.parseIO(value)
		default:
			err = fmt.Errorf("there is no such setting; use %sroot, landlock, limits, nice or io", AnnotationPrefix)
		}
		if err != nil {
			return s, fmt.Errorf("annotation %s: %w", key, err)
		}
	}
	return s, nil
}

func (s *Settings) parseLandlock(value string) error {
	s.Landlock = true
	for field := range strings.FieldsSeq(value) {
		access, list, _ := strings.Cut(field, "=")
		for p := range strings.SplitSeq(list, ":") {
			switch {
			case !path.IsAbs(p):
				return fmt.Errorf("%q is no list of absolute paths; write ro=/usr:/etc rw=/data", field)
			case access == "ro":
				s.ReadOnly = append(s.ReadOnly, p)
			case access == "rw":
				s.Writable = append(s.Writable, p)
			default:
				return fmt.Errorf("%q is no access; write ro=/usr:/etc rw=/data", access)
			}
		}
	}
	return nil
}

func (s *Settings) parseLimits(value string) error {
	number := func(text string) (uint64, error) {
		if text == "unlimited" {
			return Unlimited, nil
		}
		return strconv.ParseUint(text, 10, 64)
	}
	for field := range strings.FieldsSeq(value) {
		name, bounds, _ := strings.Cut(field, "=")
		if !slices.Contains(limits, name) {
			return fmt.Errorf("%q is no limit; use %s", name, strings.Join(limits, ", "))
		}
		soft, hard, both := strings.Cut(bounds, ":")
		if !both {
			hard = soft
		}
		l := Limit{Name: name}
		var serr, herr error
		l.Soft, serr = number(soft)
		l.Hard, herr = number(hard)
		if serr != nil || herr != nil || l.Soft > l.Hard {
			return fmt.Errorf("%q is no limit; write nofile=1024, nofile=1024:65536 or core=unlimited", field)
		}
		if slices.ContainsFunc(s.Limits, func(have Limit) bool { return have.Name == name }) {
			return fmt.Errorf("%s is there twice; leave one out", name)
		}
		s.Limits = append(s.Limits, l)
	}
	return nil
}

func (s *Settings) parseIO(value string) error {
	class, level, _ := strings.Cut(value, ":")
	if s.IOClass = class; value == "idle" {
		return nil
	}
	n, err := strconv.Atoi(level)
	if s.IOLevel = n; err != nil || n < 0 || n > 7 || class != "best-effort" && class != "realtime" {
		return fmt.Errorf("%q is no I/O priority; use idle, best-effort:0 to best-effort:7 or realtime:0 to realtime:7", value)
	}
	return nil
}
