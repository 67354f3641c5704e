package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/containerd/console"

	"tutti.dev/tutti/test/e2e/machine"
)

// A client that is killed takes what server and keeper held for it along,
// though its pod says nothing by which they would find out.
func TestCutOff(t *testing.T) {
	n := shared(t)
	ns := n.namespace("cutoff")
	n.ok(n.Apply(pod(ns, "silent", "terminationGracePeriodSeconds: 0\n"+
		"containers:\n- {name: main, image: \"busybox:1\", command: [sleep, \"100000\"], stdin: true}\n"+
		"- {name: terminal, image: \"busybox:1\", command: [sleep, \"100000\"], stdin: true, tty: true}\n"+
		"- {name: deaf, image: \"busybox:1\", command: [nc, -ll, -p, \"8000\", -e, sleep, \"100000\"]}\n")))
	n.wait(ns, "pod/silent", "condition=Ready")
	// Connections of other calls come and go.
	const some = 3
	held := func() (keeper, server int) {
		keeper, server = descriptors(t, n.find(n.Keeper)), descriptors(t, n.find(n.Server))
		return keeper, server
	}
	keeper, server := held()
	var clients []*session
	kubectl := func(args ...string) *session {
		s := talk(t, n.Command(background(t), n.Binary(), append([]string{"kubectl", "-n", ns}, args...)...), console.WinSize{})
		clients = append(clients, s)
		return s
	}
	const times = 3
	for range times {
		kubectl("attach", "-i", "silent")
		kubectl("attach", "silent")
		kubectl("attach", "-i", "-c", "terminal", "silent")
		forward := kubectl("port-forward", "silent", "0:8000")
		port := forward.await(`Forwarding from 127\.0\.0\.1:(\d+)`)
		conn, err := n.Dial(t.Context(), "tcp", "127.0.0.1:"+port)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
	}
	// An attachment is a connection and its pipes; so is a forwarded port to the
	// server, at both its ends.
	n.until("the clients to be connected", func() (bool, string) {
		k, s := held()
		return k >= keeper+2*3*times && s >= server+2*4*times, fmt.Sprintf("%d and %d descriptors, %d and %d without them", k, s, keeper, server)
	})
	for _, c := range clients {
		c.kill()
	}
	n.until("nothing to be held for clients that are gone", func() (bool, string) {
		k, s := held()
		return k <= keeper && s <= server+some, fmt.Sprintf("%d and %d descriptors, %d and %d before", k, s, keeper, server)
	})
}

// descriptors counts what a process has open.
func descriptors(t *testing.T, p machine.Process) int {
	t.Helper()
	open, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(p.PID), "fd"))
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

// find is a process that must be there.
func (n node) find(find func() (machine.Process, error)) machine.Process {
	n.t.Helper()
	p, err := find()
	if err != nil {
		n.t.Fatal(err)
	}
	return p
}
