package unit

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"tutti.dev/tutti/internal/api/hostprocess"
)

// limitKeys are the limits of setrlimit(2).
var limitKeys = []string{"CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NOFILE", "AS", "NPROC", "MEMLOCK", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"}

// resources are what the program may use of the machine.
func (t *translation) resources() error {
	var limits []string
	for _, k := range limitKeys {
		value := t.text(t.last("Service", "Limit"+k))
		if value == "" {
			continue
		}
		soft, hard, both := strings.Cut(value, ":")
		if !both {
			hard = soft
		}
		s, okS := limit(k, soft)
		h, okH := limit(k, hard)
		if !okS || !okH {
			t.notes.Add("Limit"+k+"="+value, "is not understood; write it into the annotation "+hostprocess.AnnotationLimits)
			continue
		}
		if s != h {
			s += ":" + h
		}
		limits = append(limits, strings.ToLower(k)+"="+s)
	}
	if len(limits) > 0 {
		t.pod.Annotate(hostprocess.AnnotationLimits, strings.Join(limits, " "))
	}
	if n := t.last("Service", "Nice"); n != "" {
		t.pod.Annotate(hostprocess.AnnotationNice, n)
	}
	t.io()

	r := corev1.ResourceRequirements{Limits: corev1.ResourceList{}, Requests: corev1.ResourceList{}}
	if said := t.last("Service", "MemoryMax", "MemoryLimit"); said != "" && said != "infinity" {
		if q, ok := size(said); ok {
			r.Limits[corev1.ResourceMemory] = q
			r.Requests[corev1.ResourceMemory] = resource.MustParse("0")
		} else {
			t.notes.Add("MemoryMax="+said, "has no equivalent in parts of the machine; write bytes into resources.limits.memory")
		}
	}
	for _, k := range []string{"MemoryMin", "MemoryLow"} { // the larger one is what must be there
		if said := t.last("Service", k); said != "" {
			if q, ok := size(said); ok {
				r.Requests[corev1.ResourceMemory] = q
			} else {
				t.notes.Add(k+"="+said, "has no equivalent in parts of the machine; write bytes into resources.requests.memory")
			}
		}
	}
	if said := t.last("Service", "CPUQuota"); said != "" {
		percent, err := strconv.ParseFloat(strings.TrimSuffix(said, "%"), 64)
		if err != nil || percent <= 0 {
			t.notes.Add("CPUQuota="+said, "is not understood; write it into resources.limits.cpu")
		} else {
			r.Limits[corev1.ResourceCPU] = *resource.NewMilliQuantity(int64(math.Ceil(percent*10)), resource.DecimalSI)
			r.Requests[corev1.ResourceCPU] = resource.MustParse("0")
		}
	}
	if len(r.Limits)+len(r.Requests) > 0 {
		t.pod.Main().Resources = r
	}
	return nil
}

// limit is one number of a limit, bytes and microseconds as the kernel has
// them.
func limit(key, value string) (string, bool) {
	if value == "infinity" {
		return "unlimited", true
	}
	switch key {
	case "CPU":
		s, ok := seconds(value)
		return strconv.FormatInt(s, 10), ok
	case "NICE":
		if n, err := strconv.Atoi(value); err == nil && (value[0] == '+' || value[0] == '-') {
			return strconv.Itoa(20 - n), true // as the kernel has it
		}
	}
	if _, err := strconv.ParseUint(value, 10, 64); err == nil {
		return value, true
	}
	if q, ok := size(value); ok && !slices.Contains([]string{"NPROC", "RTPRIO", "RTTIME"}, key) {
		return strconv.FormatInt(q.Value(), 10), true
	}
	return "", false
}

// size reads systemd's sizes: K, M, G, T, P and E are powers of 1024.
func size(value string) (resource.Quantity, bool) {
	value = strings.TrimSuffix(strings.TrimSpace(value), "B")
	if n := len(value); n > 0 && strings.IndexByte("KMGTPE", value[n-1]) >= 0 {
		value += "i"
	}
	q, err := resource.ParseQuantity(value)
	return q, err == nil && q.Sign() >= 0
}

// io is the class and priority of ioprio_set(2).
func (t *translation) io() {
	class := t.last("Service", "IOSchedulingClass")
	level := t.last("Service", "IOSchedulingPriority")
	names := map[string]string{"1": "realtime", "2": "best-effort", "3": "idle"}
	if n := names[class]; n != "" {
		class = n
	}
	if class == "" && level != "" {
		class = "best-effort"
	}
	switch {
	case class == "" || class == "none" || class == "0":
	case class == "idle":
		t.pod.Annotate(hostprocess.AnnotationIO, class)
	case level == "":
		t.pod.Annotate(hostprocess.AnnotationIO, class+":4") // the kernel's middle
	default:
		t.pod.Annotate(hostprocess.AnnotationIO, class+":"+level)
	}
}

// privileges are what the program may do beyond its user.
func (t *translation) privileges() error {
	c := &corev1.SecurityContext{}
	if yes(t.last("Service", "NoNewPrivileges")) {
		escalate := false
		c.AllowPrivilegeEscalation = &escalate
	}
	bounding, err := t.capabilities("CapabilityBoundingSet")
	if err != nil {
		return err
	}
	ambient, err := t.capabilities("AmbientCapabilities")
	if err != nil {
		return err
	}
	capabilities := &corev1.Capabilities{}
	switch {
	case bounding.set && bounding.not:
		capabilities.Drop = bounding.names
	case bounding.set:
		capabilities.Drop = []corev1.Capability{"ALL"}
		if t.account.uid == 0 {
			capabilities.Add = bounding.names
		}
	}
	if t.account.uid == 0 && (!bounding.set || bounding.not) {
		t.notes.Add("User=root", "with systemd root has every capability, in a pod those of Kubernetes' default; add what is missing to securityContext.capabilities")
	}
	switch {
	case ambient.not:
		t.notes.Add("AmbientCapabilities=~"+fmt.Sprint(ambient.names), "all but some cannot be said; name those that it needs in securityContext.capabilities")
	case t.account.uid != 0:
		for _, name := range ambient.names {
			if name == "NET_BIND_SERVICE" { // the pod's own network has no ports of privilege
				if t.pod.Spec.SecurityContext == nil {
					t.pod.Spec.SecurityContext = &corev1.PodSecurityContext{}
				}
				t.pod.Spec.SecurityContext.Sysctls = append(t.pod.Spec.SecurityContext.Sysctls, corev1.Sysctl{Name: "net.ipv4.ip_unprivileged_port_start", Value: "0"})
				continue
			}
			capabilities.Add = append(capabilities.Add, name)
			t.notes.Add("AmbientCapabilities=CAP_"+string(name), "in a pod a user who is not root has it only for programs whose files have it; `setcap` gives it to a file")
		}
	}
	if len(capabilities.Add)+len(capabilities.Drop) > 0 {
		c.Capabilities = capabilities
	}
	if c.AllowPrivilegeEscalation != nil || c.Capabilities != nil {
		t.pod.Main().SecurityContext = c
	}
	return nil
}

// capabilities are a set, or with not all but those of a set.
type capabilities struct {
	set, not bool
	names    []corev1.Capability
}

// capabilities reads a set of them: lines add up, a line with ~ takes away. An
// empty line is the empty set.
func (t *translation) capabilities(key string) (c capabilities, err error) {
	c.set = t.assigned("Service", key)
	for i, v := range t.values("Service", key) {
		v, without := strings.CutPrefix(v, "~")
		if i == 0 {
			c.not = without
		}
		words, closed := split(v)
		if !closed {
			return c, openQuote(key, v)
		}
		for _, w := range words {
			name := corev1.Capability(strings.TrimPrefix(strings.ToUpper(w), "CAP_"))
			c.names = slices.DeleteFunc(c.names, func(n corev1.Capability) bool { return n == name })
			if without == c.not {
				c.names = append(c.names, name)
			}
		}
	}
	return c, nil
}
