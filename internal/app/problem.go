package app

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"

	corev1 "k8s.io/api/core/v1"
)

// Problem is why a pod does not do what it should.
type Problem struct {
	Container string // "" when it is the pod itself
	Reason    string // one word, as Kubernetes has it: CrashLoopBackOff
	Message   string
}

// String is "Reason: message".
func (p Problem) String() string {
	if p.Message == "" {
		return p.Reason
	}
	return p.Reason + ": " + p.Message
}

// hopeless are reasons that rarely go away by themselves.
func (p Problem) hopeless() bool {
	return slices.Contains([]string{"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull",
		"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError"}, p.Reason)
}

// quiet are the reasons of a pod that is on its way.
var quiet = []string{"", "ContainerCreating", "PodInitializing"}

// Problems lists what is wrong with a pod, by its containers; none when it is
// well or on its way.
func Problems(p *corev1.Pod) []Problem {
	var found []Problem
	s := p.Status
	if s.Phase == corev1.PodFailed && s.Reason != "" {
		found = append(found, Problem{Reason: s.Reason, Message: oneLine(s.Message)})
	}
	for _, c := range s.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable {
			found = append(found, Problem{Reason: c.Reason, Message: oneLine(c.Message)})
		}
	}
	for _, cs := range slices.Concat(s.InitContainerStatuses, s.ContainerStatuses) {
		if pr, ok := containerProblem(p, cs); ok {
			found = append(found, pr)
		}
	}
	return found
}

func containerProblem(p *corev1.Pod, cs corev1.ContainerStatus) (Problem, bool) {
	pr := Problem{Container: cs.Name}
	switch w, t, last := cs.State.Waiting, cs.State.Terminated, cs.LastTerminationState.Terminated; {
	case w != nil && slices.Contains(quiet, w.Reason) && w.Message != "":
		// On its way, but held up: the message begins with the reason.
		reason, message, ok := strings.Cut(oneLine(w.Message), ": ")
		if !ok {
			reason, message = w.Reason, reason
		}
		pr.Reason, pr.Message = reason, message
	case w != nil && !slices.Contains(quiet, w.Reason):
		pr.Reason, pr.Message = w.Reason, oneLine(w.Message)
		// The two take turns as long as the cause stays: one is told.
		if _, cause, ok := strings.Cut(pr.Message, "ErrImagePull: "); ok && w.Reason == "ImagePullBackOff" {
			pr.Reason, pr.Message = "ErrImagePull", cause
		}
		if w.Reason == "CrashLoopBackOff" && last != nil {
			pr.Message = ended(last)
		}
	case t != nil && t.ExitCode != 0 && (p.Spec.RestartPolicy == corev1.RestartPolicyNever || p.Status.Phase == corev1.PodFailed):
		pr.Reason = cmp.Or(t.Reason, "Error")
		pr.Message = strings.TrimPrefix(ended(t), pr.Reason+", ")
	default:
		return pr, false
	}
	return pr, true
}

func ended(t *corev1.ContainerStateTerminated) string {
	text := fmt.Sprintf("exit code %d", t.ExitCode)
	if t.Reason != "" && t.Reason != "Error" && t.Reason != "Completed" {
		text = t.Reason + ", " + text
	}
	if m := oneLine(t.Message); m != "" {
		text += ": " + m
	}
	return text
}

// podProblem is the first problem as text, "" when there is none.
func podProblem(p *corev1.Pod) string {
	if all := Problems(p); len(all) > 0 {
		return all[0].String()
	}
	return ""
}

// oneLine takes from a message what would move a terminal's cursor: some of
// them are written by whoever wrote the program.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return -1
	}, strings.Join(strings.Fields(s), " "))
}
