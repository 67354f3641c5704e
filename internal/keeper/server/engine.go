//go:build cgo

package server

import (
	"os"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// engine makes containers and starts processes in them. A process that it has
// started is a child of this one that nobody has reaped. Waiting for it, its
// signals, output, limits and what it uses are the same for every engine:
// they are the kernel's.
type engine interface {
	// start makes the workload's container and starts its first process p.
	// What a failure leaves is taken away by remove.
	start(w *workload, spec *specs.Spec, config *configs.Config, p *proc) (pid int, err error)
	// started tells whether a start that the last keeper did not finish got as
	// far as the workload's own program, and if so fills in its process.
	started(w *workload) bool
	// exec starts p in a container, beside its first process.
	exec(w *workload, p *proc) (pid int, err error)
	// remove forgets a container, none of whose processes are left.
	remove(w *workload) error
}

// proc is a process to be started and its streams, nil ones for none.
type proc struct {
	*specs.Process
	stdin, stdout, stderr *os.File
	// console is a socket to which the other end of the process's terminal is
	// sent, if it has one.
	console *os.File
}

// engineOf is the one that an envelope names.
func (s *Server) engineOf(e *protocol.Envelope) engine {
	if path := e.GetProgram(); path != "" {
		return program{path}
	}
	return inProcess{dir: s.runcDir()}
}
