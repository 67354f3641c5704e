package translate

import (
	"strings"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/runtime"
)

// process says what a process of the machine has otherwise than a container.
func process(w runtime.Workload, in Input) (runtime.Workload, error) {
	set, err := hostprocess.ParseSettings(in.Pod.Annotations)
	if err != nil {
		return w, err
	}
	w.JoinPID = nil // it sees them anyway
	if in.OnMachine {
		w.Machine = runtime.MachineRoot(set.Root)
		if w.AppArmor == "" {
			// The machine has profiles of its own for its programs, which one
			// for containers would keep from being used.
			w.AppArmor = "unconfined"
		}
	}
	if set.Landlock {
		w.Landlock = &runtime.Landlock{ReadOnly: set.ReadOnly, ReadWrite: set.Writable}
	}
	for _, l := range set.Limits {
		w.Rlimits = append(w.Rlimits, runtime.Rlimit{Name: "RLIMIT_" + strings.ToUpper(l.Name), Soft: l.Soft, Hard: l.Hard})
	}
	w.Nice = set.Nice
	if set.IOClass != "" {
		w.IO = &runtime.IOPriority{Class: set.IOClass, Level: set.IOLevel}
	}
	return w, nil
}
