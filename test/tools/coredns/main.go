// Command coredns is CoreDNS with the two plugins that the suite's case of a
// pod's own resolv.conf configures.
package main

import (
	"github.com/coredns/coredns/core/dnsserver"
	"github.com/coredns/coredns/coremain"
	_ "github.com/coredns/coredns/plugin/hosts"
	_ "github.com/coredns/coredns/plugin/log"
)

func main() {
	dnsserver.Directives = []string{"log", "hosts"} // in the order of their turns
	coremain.Run()
}
