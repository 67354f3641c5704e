package unit

import (
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"tutti.dev/tutti/internal/importer"
)

// fleet says on which machines the program runs: what CoreOS's fleet, which
// started units on many machines, took from a section of its own.
func (t *translation) fleet() error {
	const section = "X-Fleet"
	t.global = yes(t.last(section, "Global"))
	metadata, err := t.words(section, "MachineMetadata")
	if err != nil {
		return err
	}
	places := map[string][]string{}
	for _, m := range metadata {
		key, value, _ := strings.Cut(m, "=")
		if len(validation.IsQualifiedName(key))+len(validation.IsValidLabelValue(value)) > 0 {
			t.notes.Add("MachineMetadata="+m, "cannot be the label of a node; label the machines otherwise and name the label in nodeSelector")
			continue
		}
		places[key] = append(places[key], value)
	}
	affinity := &corev1.Affinity{}
	for _, key := range slices.Sorted(maps.Keys(places)) {
		t.notes.Add("MachineMetadata="+key, "nodes have no such label of themselves; `tutti kubectl label node NODE %s=%s` gives it", key, places[key][0])
		if values := places[key]; len(values) > 1 {
			if affinity.NodeAffinity == nil {
				affinity.NodeAffinity = &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: make([]corev1.NodeSelectorTerm, 1)}}
			}
			term := &affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms[0]
			term.MatchExpressions = append(term.MatchExpressions, corev1.NodeSelectorRequirement{Key: key, Operator: corev1.NodeSelectorOpIn, Values: values})
			continue
		}
		if t.pod.Spec.NodeSelector == nil {
			t.pod.Spec.NodeSelector = map[string]string{}
		}
		t.pod.Spec.NodeSelector[key] = places[key][0]
	}
	beside, err := t.words(section, "MachineOf")
	if err != nil {
		return err
	}
	for _, b := range beside {
		if affinity.PodAffinity == nil {
			affinity.PodAffinity = &corev1.PodAffinity{}
		}
		affinity.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution = append(affinity.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution,
			near(map[string]string{importer.LabelInstance: importer.Name(strings.TrimSuffix(b, suffix))}))
	}
	apart, err := t.words(section, "Conflicts")
	if err != nil {
		return err
	}
	for _, a := range apart {
		labels, ok := matching(a)
		if !ok {
			t.notes.Add("Conflicts="+a, "has no equivalent as a pattern; name the units, or label their pods and name the label in podAntiAffinity")
			continue
		}
		if affinity.PodAntiAffinity == nil {
			affinity.PodAntiAffinity = &corev1.PodAntiAffinity{}
		}
		affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution = append(affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution, near(labels))
	}
	if affinity.NodeAffinity != nil || affinity.PodAffinity != nil || affinity.PodAntiAffinity != nil {
		t.pod.Spec.Affinity = affinity
	}
	return nil
}

func near(labels map[string]string) corev1.PodAffinityTerm {
	return corev1.PodAffinityTerm{TopologyKey: corev1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: labels}}
}

// matching are the labels of the pods of the units that a pattern matches: a
// unit, or every one of a template.
func matching(pattern string) (map[string]string, bool) {
	base := strings.TrimSuffix(pattern, suffix)
	prefix, instance, isTemplate := strings.Cut(base, "@")
	switch {
	case isTemplate && instance == "*" && !strings.ContainsAny(prefix, "*?["):
		return map[string]string{importer.LabelName: importer.Name(prefix)}, true
	case strings.ContainsAny(base, "*?["):
		return nil, false
	}
	return map[string]string{importer.LabelInstance: importer.Name(base)}, true
}

// settled are targets that every machine has reached when its pods start.
var settled = []string{
	"basic.target", "cloud-final.service", "default.target", "graphical.target", "local-fs.target", "multi-user.target", "network.target",
	"network-online.target", "network-pre.target", "nss-lookup.target", "nss-user-lookup.target", "paths.target", "remote-fs.target", "rpcbind.target",
	"sockets.target", "sysinit.target", "syslog.target", "systemd-tmpfiles-setup.service", "systemd-user-sessions.service", "time-set.target", "time-sync.target", "timers.target",
}

// order is what a unit has to do with others. A machine is up when its pods
// start; among pods there is no order.
func (t *translation) order() {
	for _, key := range []string{"After", "Before", "Wants", "Requires", "Requisite", "BindsTo", "PartOf", "Upholds", "WantedBy", "RequiredBy"} {
		section := "Unit"
		if key == "WantedBy" || key == "RequiredBy" {
			section = "Install"
		}
		var others []string
		for _, v := range t.values(section, key) {
			for _, name := range strings.Fields(t.text(v)) {
				if !slices.Contains(settled, name) {
					others = append(others, name)
				}
			}
		}
		if len(others) > 0 {
			t.notes.Add(key+"="+strings.Join(others, " "), "pods have no order and do not depend on each other; have the program, or an init container, wait for what it needs")
		}
	}
	policy := t.last("Service", "Restart")
	if policy == "" {
		policy = "no"
	}
	if policy != "always" && !t.oneshot {
		t.notes.Add("Restart="+policy, "what runs in a Deployment or DaemonSet is always started again, however it ended; a Job is for what may end")
	}
}

// beside lists the units of other kinds that belong to this one by their name.
func (t *translation) beside() {
	file := strings.TrimSuffix(t.unit.File, suffix)
	if exists(t.root, file+".socket") {
		t.notes.Add(path.Base(file)+".socket", saySocket)
	}
	if exists(t.root, file+".timer") {
		t.notes.Add(path.Base(file)+".timer", "a CronJob with this program does what a timer does")
	}
}

// rest lists what no step has taken.
func (t *translation) rest() {
	t.beside()
	listed := map[string]bool{}
	for _, s := range t.unit.settings {
		key := s.section + "." + s.key
		if t.taken[key] || listed[key] || s.value == "" && !slices.Contains(emptyMeansNothing, s.key) {
			continue
		}
		listed[key] = true
		values := t.values(s.section, s.key)
		if len(values) > 0 && no(values[len(values)-1]) && slices.Contains(switches, s.key) {
			continue // switched off: nothing is missing
		}
		said := s.key + "=" + strings.Join(values, " ")
		if s.section == "X-Fleet" {
			said = "[X-Fleet] " + said
		}
		t.notes.Add(said, "%s", reason(s.section, s.key, values))
	}
}

func reason(section, key string, values []string) string {
	switch {
	case strings.HasPrefix(key, "X-") || strings.HasPrefix(section, "X-") && section != "X-Fleet":
		return "is not systemd's, and means nothing to tutti"
	case slices.Contains(switches, key) || slices.Contains(confinement, key):
		return "a process of the host is confined by its user, capabilities, seccompProfile and the annotations of process.tutti.dev only"
	case strings.HasPrefix(key, "Condition") || strings.HasPrefix(key, "Assert"):
		return sayCondition
	case strings.HasPrefix(key, "StartLimit"):
		return "a program that ends again and again is started ever more rarely, up to 5 minutes apart"
	}
	if text := reasons[section+"."+key]; text != "" {
		return text
	}
	return fmt.Sprintf("tutti knows no equivalent of %s in [%s]", key, section)
}
