package app

import (
	"cmp"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"

	"tutti.dev/tutti/internal/api"
)

// Status is a cluster by application: what `tutti status` shows and, as
// JSON, what scripts read.
type Status struct {
	// Ready says that a pod could be scheduled now: the API answers and a
	// node is known to be ready and to take pods.
	Ready bool `json:"ready"`
	// Nodes is nil when they may not be seen.
	Nodes []Node `json:"nodes"`
	Apps  []App  `json:"apps"`

	// What follows is there when it was measured.

	// Connections are who talks to whom, now and in the last minutes.
	Connections []Connection `json:"connections,omitempty"`
	// Notes say what could not be told, and why.
	Notes []string `json:"notes,omitempty"`
	// Silent is since when the API does not answer: the rest is of before.
	Silent *time.Time `json:"silent,omitempty"`
}

// Node is a machine of the cluster.
type Node struct {
	Name        string   `json:"name"`
	Ready       bool     `json:"ready"`
	Schedulable bool     `json:"schedulable"`
	Address     string   `json:"address,omitempty"`
	Version     string   `json:"version,omitempty"`
	Problems    []string `json:"problems,omitempty"`
	Capacity    Usage    `json:"capacity"`
	Usage       *Usage   `json:"usage,omitempty"` // when measured
}

// App is an application in a namespace. What belongs to none has the name "".
type App struct {
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	Ready     bool      `json:"ready"`
	Services  []Service `json:"services"`
}

// Service is one part of an application: a workload and its pods.
type Service struct {
	Name     string `json:"name"`
	Kind     string `json:"kind"`
	Ready    int    `json:"ready"`
	Desired  int    `json:"desired"`
	Restarts int    `json:"restarts"`
	// LastRestart is when a container last ended that was started again.
	LastRestart *time.Time `json:"lastRestart,omitempty"`
	Created     time.Time  `json:"created"`
	Images      []string   `json:"images"`
	// Version is what is wanted: the label app.kubernetes.io/version, or the
	// image's tag. Replaces are other versions that still run.
	Version  string   `json:"version,omitempty"`
	Replaces []string `json:"replaces,omitempty"`
	// Usage is that of the pods together, when measured.
	Usage *Usage `json:"usage,omitempty"`
	// URLs can be opened from outside of the cluster, Addresses from inside.
	URLs      []string `json:"urls,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
	// State is how far it is: "2 of 3 ready".
	State    string   `json:"state"`
	OK       bool     `json:"ok"`
	Problems []string `json:"problems,omitempty"`
}

// Steady is the status without the figures that change all the time though
// nothing happens.
func (s Status) Steady() Status {
	s.Nodes, s.Apps, s.Connections = slices.Clone(s.Nodes), slices.Clone(s.Apps), slices.Clone(s.Connections)
	for i := range s.Nodes {
		s.Nodes[i].Usage = nil
	}
	for i, a := range s.Apps {
		s.Apps[i].Services = slices.Clone(a.Services)
		for j := range a.Services {
			s.Apps[i].Services[j].Usage = nil
		}
	}
	for i, c := range s.Connections {
		s.Connections[i].Open, s.Connections[i].Recent, s.Connections[i].Bytes, s.Connections[i].Addresses = 0, 0, 0, 0
		s.Connections[i].Waiting = min(c.Waiting, 1)
		for _, p := range []*Peer{&s.Connections[i].From, &s.Connections[i].To} {
			if p.Kind == PeerOutside {
				p.Name = ""
			}
		}
	}
	return s
}

// Summarize orders a snapshot by application. Kubernetes' own parts are left
// out unless system is set.
func Summarize(s Snapshot, system bool) Status {
	st := Status{Apps: []App{}, Notes: s.Notes}
	if s.Nodes != nil {
		st.Nodes = nodes(s.Nodes, s.NodeUsage)
	}
	for _, n := range st.Nodes {
		st.Ready = st.Ready || n.Ready && n.Schedulable
	}
	if !s.Silent.IsZero() {
		st.Ready, st.Silent = false, &s.Silent
	}
	type key struct{ namespace, name string }
	apps := map[key]*App{}
	all := workloads(s)
	for _, w := range all {
		if w.meta.Namespace == metav1.NamespaceSystem && !system {
			continue
		}
		k := key{w.meta.Namespace, appOf(w.meta.Labels)}
		a := apps[k]
		if a == nil {
			a = &App{Name: k.name, Namespace: k.namespace, Ready: true}
			apps[k] = a
		}
		svc := w.service(s, address(st.Nodes))
		a.Ready = a.Ready && svc.OK
		a.Services = append(a.Services, svc)
	}
	for _, k := range slices.SortedFunc(maps.Keys(apps), func(a, b key) int {
		return cmp.Or(strings.Compare(a.namespace, b.namespace), strings.Compare(a.name, b.name))
	}) {
		a := apps[k]
		slices.SortFunc(a.Services, func(a, b Service) int {
			return cmp.Or(strings.Compare(a.Name, b.Name), strings.Compare(a.Kind, b.Kind))
		})
		st.Apps = append(st.Apps, *a)
	}
	if s.Flows != nil {
		st.Connections = connections(s, all, system)
	}
	return st
}

// appOf is the application that an object's labels name, "" for none.
func appOf(l map[string]string) string {
	return cmp.Or(l[api.LabelApp], l[api.LabelPartOf], l[api.LabelInstance])
}

func nodes(all []*corev1.Node, usage map[string]Usage) []Node {
	out := []Node{}
	for _, n := range all {
		node := Node{Name: n.Name, Schedulable: !n.Spec.Unschedulable, Version: n.Status.NodeInfo.KubeletVersion}
		node.Capacity.add(n.Status.Capacity)
		if u, ok := usage[n.Name]; ok {
			node.Usage = &u
		}
		for _, a := range n.Status.Addresses {
			if a.Type == corev1.NodeInternalIP && node.Address == "" {
				node.Address = a.Address
			}
		}
		for _, c := range n.Status.Conditions {
			switch {
			case c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue:
				node.Ready = true
			case c.Type == corev1.NodeReady, c.Status == corev1.ConditionTrue:
				node.Problems = append(node.Problems, Problem{Reason: cmp.Or(c.Reason, string(c.Type)), Message: oneLine(c.Message)}.String())
			}
		}
		for _, t := range n.Spec.Taints {
			if t.Effect != corev1.TaintEffectPreferNoSchedule {
				node.Schedulable = false
			}
		}
		out = append(out, node)
	}
	slices.SortFunc(out, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// address is where the cluster's published ports can be reached.
func address(nodes []Node) string {
	for _, n := range nodes {
		if n.Ready && n.Address != "" {
			return n.Address
		}
	}
	return "localhost"
}

// workload is a service in the making.
type workload struct {
	meta     metav1.ObjectMeta
	kind     string
	template corev1.PodTemplateSpec
	pods     []*corev1.Pod
	ready    int32
	desired  int32
	verdict
}

func workloads(s Snapshot) []workload {
	of := map[types.UID][]*corev1.Pod{}
	owner := map[types.UID]types.UID{} // of ReplicaSets and Jobs
	known := map[types.UID]bool{}
	for _, r := range s.ReplicaSets {
		known[r.UID] = true
		if c := metav1.GetControllerOf(r); c != nil {
			owner[r.UID] = c.UID
		}
	}
	for _, j := range s.Jobs {
		known[j.UID] = true
		if c := metav1.GetControllerOf(j); c != nil {
			owner[j.UID] = c.UID
		}
	}
	for _, d := range s.StatefulSets {
		known[d.UID] = true
	}
	for _, d := range s.DaemonSets {
		known[d.UID] = true
	}
	var all []workload
	for _, p := range s.Pods {
		c := metav1.GetControllerOf(p)
		if c == nil || !known[c.UID] {
			v := podReady(p)
			all = append(all, workload{p.ObjectMeta, "Pod", corev1.PodTemplateSpec{ObjectMeta: p.ObjectMeta, Spec: p.Spec}, []*corev1.Pod{p}, count(v.Done), 1, v})
			continue
		}
		uid := c.UID
		if up, ok := owner[uid]; ok {
			uid = up
		}
		of[uid] = append(of[uid], p)
	}
	for _, d := range s.Deployments {
		all = append(all, workload{d.ObjectMeta, "Deployment", d.Spec.Template, of[d.UID], d.Status.ReadyReplicas, ptr.Deref(d.Spec.Replicas, 1), deploymentReady(d)})
	}
	for _, d := range s.StatefulSets {
		all = append(all, workload{d.ObjectMeta, "StatefulSet", d.Spec.Template, of[d.UID], d.Status.ReadyReplicas, ptr.Deref(d.Spec.Replicas, 1), statefulSetReady(d)})
	}
	for _, d := range s.DaemonSets {
		all = append(all, workload{d.ObjectMeta, "DaemonSet", d.Spec.Template, of[d.UID], d.Status.NumberReady, d.Status.DesiredNumberScheduled, daemonSetReady(d)})
	}
	for _, d := range s.ReplicaSets {
		if metav1.GetControllerOf(d) == nil {
			all = append(all, workload{d.ObjectMeta, "ReplicaSet", d.Spec.Template, of[d.UID], d.Status.ReadyReplicas, ptr.Deref(d.Spec.Replicas, 1), replicaSetReady(d)})
		}
	}
	for _, d := range s.Jobs {
		if metav1.GetControllerOf(d) == nil {
			all = append(all, workload{d.ObjectMeta, "Job", d.Spec.Template, of[d.UID], d.Status.Succeeded, ptr.Deref(d.Spec.Completions, 1), jobReady(d)})
		}
	}
	for _, d := range s.CronJobs {
		v := done("runs at %s", d.Spec.Schedule)
		if ptr.Deref(d.Spec.Suspend, false) {
			v = done("suspended")
		}
		all = append(all, workload{d.ObjectMeta, "CronJob", d.Spec.JobTemplate.Spec.Template, of[d.UID], 0, 0, v})
	}
	return all
}

func count(b bool) int32 {
	if b {
		return 1
	}
	return 0
}

func (w workload) service(s Snapshot, address string) Service {
	svc := Service{
		Name: w.meta.Name, Kind: w.kind, Ready: int(w.ready), Desired: int(w.desired), Created: w.meta.CreationTimestamp.Time,
		Images: images(w.template.Spec), State: w.Message, OK: w.Done,
	}
	svc.Version = version(w.template.ObjectMeta, w.template.Spec, w.meta.Labels)
	for _, p := range w.pods {
		for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
			svc.Restarts += int(c.RestartCount)
			if t := c.LastTerminationState.Terminated; t != nil && c.RestartCount > 0 && !t.FinishedAt.IsZero() &&
				(svc.LastRestart == nil || t.FinishedAt.After(*svc.LastRestart)) {
				svc.LastRestart = &t.FinishedAt.Time
			}
		}
		if u, ok := s.PodUsage[types.NamespacedName{Namespace: p.Namespace, Name: p.Name}]; ok {
			if svc.Usage == nil {
				svc.Usage = &Usage{}
			}
			svc.Usage.CPU, svc.Usage.Memory = svc.Usage.CPU+u.CPU, svc.Usage.Memory+u.Memory
		}
		ended := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
		if v := version(p.ObjectMeta, p.Spec, w.meta.Labels); v != svc.Version && !ended && !slices.Contains(svc.Replaces, v) {
			svc.Replaces = append(svc.Replaces, v)
		}
	}
	slices.Sort(svc.Replaces)
	for _, p := range w.telling() {
		for _, pr := range Problems(p) {
			text := pr.String()
			if pr.Container != "" && len(p.Spec.Containers)+len(p.Spec.InitContainers) > 1 {
				text = pr.Container + ": " + text
			}
			if !slices.Contains(svc.Problems, text) {
				svc.Problems = append(svc.Problems, text)
			}
		}
	}
	if w.Failed && len(svc.Problems) == 0 {
		svc.Problems = []string{w.Message}
	}
	slices.Sort(svc.Problems)
	svc.URLs, svc.Addresses = w.published(s.Services, address)
	return svc
}

// telling are the pods whose problems are told: those that are to stay, and
// of the tries of a Job and the runs of a CronJob the newest.
func (w workload) telling() []*corev1.Pod {
	pods := slices.DeleteFunc(slices.Clone(w.pods), func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	if (w.kind == "Job" || w.kind == "CronJob") && len(pods) > 1 {
		pods = []*corev1.Pod{slices.MaxFunc(pods, func(a, b *corev1.Pod) int { return a.CreationTimestamp.Compare(b.CreationTimestamp.Time) })}
	}
	return pods
}

// version is what a pod's labels or those of its workload say, or else the
// tag of its first image.
func version(pod metav1.ObjectMeta, spec corev1.PodSpec, workload map[string]string) string {
	if v := cmp.Or(pod.Labels[api.LabelVersion], workload[api.LabelVersion]); v != "" || len(spec.Containers) == 0 {
		return v
	}
	name, digest, _ := strings.Cut(spec.Containers[0].Image, "@")
	if i := strings.LastIndex(name, ":"); i > strings.LastIndex(name, "/") {
		return name[i+1:]
	}
	if _, hex, ok := strings.Cut(digest, ":"); ok {
		return hex[:min(len(hex), 12)]
	}
	return "latest"
}

// images are those of the containers, each once, as they were written.
func images(p corev1.PodSpec) []string {
	out := []string{}
	for _, c := range p.Containers {
		if !slices.Contains(out, c.Image) {
			out = append(out, c.Image)
		}
	}
	return out
}

// published finds where a workload can be reached, through Services and by
// ports of the machine.
func (w workload) published(services []*corev1.Service, address string) (urls, inside []string) {
	for _, s := range services {
		if s.Namespace != w.meta.Namespace || len(s.Spec.Selector) == 0 || !w.selected(s.Spec.Selector) {
			continue
		}
		for _, p := range s.Spec.Ports {
			inside = append(inside, fmt.Sprintf("%s.%s:%d", s.Name, s.Namespace, p.Port))
			for _, i := range s.Status.LoadBalancer.Ingress {
				urls = append(urls, url(p.Protocol, p.Name, cmp.Or(i.Hostname, i.IP), p.Port))
			}
			if p.NodePort != 0 {
				urls = append(urls, url(p.Protocol, p.Name, address, p.NodePort))
			}
		}
	}
	for _, c := range w.template.Spec.Containers {
		for _, p := range c.Ports {
			if p.HostPort != 0 {
				urls = append(urls, url(p.Protocol, p.Name, cmp.Or(p.HostIP, address), p.HostPort))
			}
		}
	}
	slices.Sort(urls)
	slices.Sort(inside)
	return slices.Compact(urls), slices.Compact(inside)
}

// selected asks the pods, since it is them that a Service selects.
func (w workload) selected(selector map[string]string) bool {
	return slices.ContainsFunc(w.pods, func(p *corev1.Pod) bool {
		return labels.SelectorFromSet(selector).Matches(labels.Set(p.Labels))
	})
}

// url is http unless the port is known not to be.
func url(proto corev1.Protocol, name, host string, port int32) string {
	scheme := "http"
	switch {
	case proto == corev1.ProtocolUDP, proto == corev1.ProtocolSCTP:
		scheme = strings.ToLower(string(proto))
	case strings.HasPrefix(name, "https"), port == 443:
		scheme = "https"
	case name != "" && !strings.HasPrefix(name, "http") && !strings.HasPrefix(name, "web"):
		scheme = "tcp"
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(int(port)))
}
