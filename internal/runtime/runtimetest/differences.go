package runtimetest

// Differences are the parts of the suite, by name, that a class of runtime
// does not pass, each with the reason. What they try it refuses.
type Differences map[string]string

// Declared are the differences that there are, by class. docs/pod.md has the
// same table.
var Declared = map[string]Differences{
	"process": {
		"own host name":                    "it has the machine's; HOSTNAME, /etc/hostname and names in the network are the pod's",
		"own shared memory and semaphores": "they are the machine's, /dev/shm too",
		"own processes":                    "it sees all of the machine, and they see it",
		"processes shared by the pod":      "it sees all of the machine",
		"join the processes of another":    "it sees all of the machine",
	},
}
