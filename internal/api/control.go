package api

import "time"

// Paths of the control socket (HTTP on a unix socket that only root can open).
const (
	// PathStatus answers GET with a ServerStatus.
	PathStatus = "/status"
	// PathProgress answers GET with the start so far and as it goes on, one
	// JSON Step a line, and ends when the server is ready or has failed.
	PathProgress = "/progress"
	// PathStop takes POST and answers with the steps of stopping, one JSON
	// Step a line, until the server is gone. With ?pods=true workloads and
	// network go too; otherwise workloads keep running.
	PathStop = "/stop"
	// PathImages is the root of the image store's own language.
	PathImages = "/images"
	// PathCollect takes POST and removes what no image needs from the
	// registry; with ?untagged=true images without a tag too, with
	// ?mirrors=true everything that was fetched from other registries. It
	// waits until nobody pushes, and answers with Collected or an error's text.
	PathCollect = "/registry/collect"
)

// ServerStatus is what a server says of itself.
type ServerStatus struct {
	Ready   bool   `json:"ready"`
	PID     int    `json:"pid"`
	Version string `json:"version"`
	Steps   []Step `json:"steps,omitempty"`
}

// Collected is what a collection of the registry's garbage did.
type Collected struct {
	Freed int64 `json:"freed"` // bytes
}

// StepState is where a step is.
type StepState string

const (
	StepStarted StepState = "started"
	StepDone    StepState = "done"
	StepFailed  StepState = "failed"
)

// Step is one step of starting or stopping, as it begins and as it ends.
type Step struct {
	Name    string        `json:"name"`
	State   StepState     `json:"state"`
	Took    time.Duration `json:"took,omitempty"`    // nanoseconds, when done
	Message string        `json:"message,omitempty"` // why it failed
}

// StepChecks is the name of a start's first step: with the next one the
// control socket is there.
const StepChecks = "checks"

// StepReady is the name of the step that ends a successful start.
const StepReady = "ready"
