package network

import (
	"testing"

	"github.com/vishvananda/netlink"
	vnetns "github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/netns/netnstest"
)

// A link that is not up yet, as every new one on kernels before 6.13, is
// waited for.
func TestWaitUp(t *testing.T) {
	path := netnstest.New(t)
	ns, err := vnetns.GetFromPath(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Close()
	kernel, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "near"
	if err := kernel.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far"}); err != nil {
		t.Fatal(err)
	}
	near, err := kernel.LinkByName("near")
	if err != nil {
		t.Fatal(err)
	}
	far, err := kernel.LinkByName("far")
	if err != nil {
		t.Fatal(err)
	}
	if err := kernel.LinkSetUp(near); err != nil {
		t.Fatal(err)
	}
	// Nobody is at the other end.
	if err := waitUp(kernel, ns, near.Attrs().Index); err == nil {
		t.Fatal("a link with a dead end is up")
	}
	up := make(chan error, 1)
	go func() { up <- waitUp(kernel, ns, near.Attrs().Index) }()
	if err := kernel.LinkSetUp(far); err != nil {
		t.Fatal(err)
	}
	if err := <-up; err != nil {
		t.Error(err)
	}
}
