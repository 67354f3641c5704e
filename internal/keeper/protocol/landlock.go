package protocol

// Confine is what the keeper's program is given, before Landlock in JSON and a
// program with its arguments, to become that program with no more of the file
// system than listed.
const Confine = "landlock"

// Landlock are paths that a program may read and execute, and those that it
// may write to as well.
type Landlock struct{ ReadOnly, ReadWrite []string }
