package podvolume

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	k8sruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/kubelet/network/dns"
	kubeletutil "k8s.io/kubernetes/pkg/kubelet/util"
)

// resolver computes resolv.conf by the pod's DNS policy.
type resolver struct{ *dns.Configurer }

func newResolver(cfg Config) resolver {
	var servers []net.IP
	if cfg.ClusterDNS.IsValid() {
		servers = []net.IP{cfg.ClusterDNS.AsSlice()}
	}
	file := cfg.ResolvConf
	if file == "" {
		file = machineResolvConf("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
	}
	events := recorder(cfg.Event)
	return resolver{dns.NewConfigurer(events, &v1.ObjectReference{Kind: "Node", Name: cfg.NodeName}, nil, servers, cfg.ClusterDomain, file)}
}

// machineResolvConf avoids the stub of systemd-resolved, whose loopback
// address means another machine inside of a pod.
func machineResolvConf(etc, systemd string) string {
	content, err := os.ReadFile(etc)
	if err != nil {
		return ""
	}
	if bytes.Contains(content, []byte("127.0.0.53")) {
		if _, err := os.Stat(systemd); err == nil {
			return systemd
		}
	}
	return etc
}

// content is the whole file.
func (r resolver) content(ctx context.Context, pod *v1.Pod) (string, error) {
	config, err := r.GetPodDNS(ctx, pod)
	if err != nil {
		return "", fmt.Errorf("resolv.conf of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	var b strings.Builder
	if len(config.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(config.Searches, " "))
	}
	for _, server := range config.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(config.Options) > 0 {
		// They come in no order, and the same pod should get the same file.
		fmt.Fprintf(&b, "options %s\n", strings.Join(slices.Sorted(slices.Values(config.Options)), " "))
	}
	return b.String(), nil
}

// recorder passes what the borrowed code has to say about a pod on to it.
type recorder func(pod *v1.Pod, eventType, reason, message string)

func (r recorder) Event(object k8sruntime.Object, eventType, reason, message string) {
	if pod, ok := object.(*v1.Pod); ok {
		r(pod, eventType, reason, message)
	}
}

func (r recorder) Eventf(object k8sruntime.Object, eventType, reason, format string, args ...any) {
	r.Event(object, eventType, reason, fmt.Sprintf(format, args...))
}

func (r recorder) AnnotatedEventf(object k8sruntime.Object, _ map[string]string, eventType, reason, format string, args ...any) {
	r.Eventf(object, eventType, reason, format, args...)
}

func (r recorder) WithLogger(klog.Logger) record.EventRecorderLogger { return r }

// Hostname returns the name that the kernel gives to the pod's programs. For
// a pod in the machine's network it is the machine's.
func (m *Manager) Hostname(pod *v1.Pod) (string, error) {
	if pod.Spec.HostNetwork {
		return os.Hostname()
	}
	host, domain, err := hostAndDomain(pod, m.cfg.ClusterDomain)
	if err != nil {
		return "", err
	}
	return kubeletutil.GetNodenameForKernel(host, domain, pod.Spec.SetHostnameAsFQDN)
}

func hostAndDomain(pod *v1.Pod, clusterDomain string) (host, domain string, err error) {
	if name := pod.Spec.HostnameOverride; name != nil {
		if problems := validation.IsDNS1123Subdomain(*name); len(problems) > 0 {
			return "", "", fmt.Errorf("pod HostnameOverride %q is not a valid DNS subdomain: %s", *name, strings.Join(problems, ";"))
		}
		return truncated(*name), "", nil
	}
	host = pod.Name
	if pod.Spec.Hostname != "" {
		if problems := validation.IsDNS1123Label(pod.Spec.Hostname); len(problems) > 0 {
			return "", "", fmt.Errorf("pod Hostname %q is not a valid DNS label: %s", pod.Spec.Hostname, strings.Join(problems, ";"))
		}
		host = pod.Spec.Hostname
	}
	if pod.Spec.Subdomain != "" {
		if problems := validation.IsDNS1123Label(pod.Spec.Subdomain); len(problems) > 0 {
			return "", "", fmt.Errorf("pod Subdomain %q is not a valid DNS label: %s", pod.Spec.Subdomain, strings.Join(problems, ";"))
		}
		domain = fmt.Sprintf("%s.%s.svc.%s", pod.Spec.Subdomain, pod.Namespace, clusterDomain)
	}
	return truncated(host), domain, nil
}

// truncated fits a pod's name into a host name.
func truncated(name string) string {
	const longest = 63
	if len(name) <= longest {
		return name
	}
	return strings.TrimRight(name[:longest], "-.")
}

// hosts is the content of /etc/hosts.
func hosts(pod *v1.Pod, host, domain string, podIPs []string) string {
	var b strings.Builder
	b.WriteString("# Kubernetes-managed hosts file.\n" +
		"127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::0\tip6-localnet\n" +
		"fe00::0\tip6-mcastprefix\n" +
		"fe00::1\tip6-allnodes\n" +
		"fe00::2\tip6-allrouters\n")
	for _, ip := range podIPs {
		if domain != "" {
			fmt.Fprintf(&b, "%s\t%s.%s\t%s\n", ip, host, domain, host)
		} else {
			fmt.Fprintf(&b, "%s\t%s\n", ip, host)
		}
	}
	b.WriteString(aliases(pod))
	return b.String()
}

func aliases(pod *v1.Pod) string {
	if len(pod.Spec.HostAliases) == 0 {
		return ""
	}
	var b strings.Builder
	b.WriteString("\n# Entries added by HostAliases.\n")
	for _, a := range pod.Spec.HostAliases {
		fmt.Fprintf(&b, "%s\t%s\n", a.IP, strings.Join(a.Hostnames, "\t"))
	}
	return b.String()
}

func (m *Manager) hostsContent(pod *v1.Pod, podIPs []string) (string, error) {
	if pod.Spec.HostNetwork {
		machine, err := os.ReadFile("/etc/hosts")
		if err != nil {
			return "", fmt.Errorf("hosts file of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		return "# Kubernetes-managed hosts file (host network).\n" + string(machine) + aliases(pod), nil
	}
	host, domain, err := hostAndDomain(pod, m.cfg.ClusterDomain)
	if err != nil {
		return "", err
	}
	return hosts(pod, host, domain, podIPs), nil
}

func (m *Manager) writeResolvConf(pod *v1.Pod) error {
	content, err := m.resolve.content(context.Background(), pod)
	if err != nil {
		return err
	}
	return m.writeEtc(pod, "resolv.conf", content)
}

// writeEtc writes a file that containers may have mounted already: in place,
// and only when it says something new.
func (m *Manager) writeEtc(pod *v1.Pod, name, content string) error {
	path := m.layout.Etc(string(pod.UID), name)
	if says(path, content) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	// Whatever the umask.
	return os.Chmod(path, 0o644)
}

// says tells whether a file has this content. A container can write to some:
// no more is read than it should have.
func says(path, content string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	have, err := io.ReadAll(io.LimitReader(f, int64(len(content))+1))
	return err == nil && string(have) == content
}
