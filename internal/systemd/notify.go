package systemd

import (
	"context"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// Supervisor is whom a service of systemd tells how it is, as sd_notify(3) has
// it. The zero value is nobody.
type Supervisor struct{ socket string }

// Supervised returns who supervises this process. It can be asked once: the
// environment does not name them any longer, since the API server, which is
// meant to be a process of its own, would tell them that all is ready when it
// is.
func Supervised() Supervisor {
	const env = "NOTIFY_SOCKET"
	s := Supervisor{os.Getenv(env)}
	_ = os.Unsetenv(env)
	return s
}

// Present says whether there is somebody.
func (s Supervisor) Present() bool { return s.socket != "" }

// Ready tells that this process serves.
func (s Supervisor) Ready() { s.tell("READY=1\nSTATUS=ready") }

// Failed tells why this process is about to end.
func (s Supervisor) Failed(err error) {
	s.tell("STATUS=" + strings.Join(strings.Fields(err.Error()), " "))
}

// Stopping tells that this process ends, and that it may take so long.
func (s Supervisor) Stopping(most time.Duration) {
	s.tell(fmt.Sprintf("STOPPING=1\nSTATUS=stopping\nEXTEND_TIMEOUT_USEC=%d", most.Microseconds()))
}

// tell does its best: there is nobody to tell an error to.
func (s Supervisor) tell(state string) {
	if !s.Present() {
		return
	}
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: s.socket, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	_, _ = c.Write([]byte(state))
}

// GoingDown says whether the machine is being shut down, of which the end of
// a service is a part.
func (m *Manager) GoingDown(ctx context.Context) bool {
	state, _ := m.Control(ctx, "is-system-running") // its exit code says no more than its word
	return state == "stopping"
}
