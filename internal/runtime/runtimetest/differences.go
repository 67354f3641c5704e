package runtimetest

// Differences are the parts of the suite, by name, that a class of runtime
// does not pass, each with the reason. What they try it refuses.
type Differences map[string]string

// Declared are the differences that there are, by class. docs/pod.md has the
// same table.
var Declared = map[string]Differences{}
