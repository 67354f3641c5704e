package e2e

import (
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"tutti.dev/tutti/test/e2e/machine"
)

// ticket is an invoice on the museum's page.
type ticket struct{ number, exhibition, cents, pricedBy, process string }

var invoiced = regexp.MustCompile(`<tr><td>(\d+)</td><td>(\w+)</td><td>(\d+) cents</td><td>priced by (\S+)</td><td>written by process (\d+)</td>`)

// The museum: containers and a program of the machine that find each other by
// name. Every hop of a sale is seen from both of its ends.
func TestMuseum(t *testing.T) {
	n := shared(t)
	// The machine has the museum's program where no other has it.
	n.ok(n.Run(patience, "sh", "-c", "mount -t tmpfs -o mode=755 museum /opt && make -s -C examples/museum install"))
	t.Cleanup(func() {
		n.Tutti("down", "museum")
		n.ok(n.Run(patience, "umount", "-l", "/opt"))
	})
	n.ok(n.Tutti("image", "load", filepath.Join(n.Repo, "dist/museum/web.tar")))
	if up := n.ok(n.Tutti("up", "examples/museum")); !strings.Contains(up, ":30081") {
		t.Errorf("tutti up does not say where to look: %s", up)
	}
	const museum = "http://" + machine.IP + ":30081"
	world := n.OutsideClient()
	world.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	tickets := func() (list []ticket) {
		t.Helper()
		n.until("the page", func() (bool, string) {
			code, page := get(world, museum)
			list = nil
			for _, m := range invoiced.FindAllStringSubmatch(page, -1) {
				list = append(list, ticket{m[1], m[2], m[3], m[4], m[5]})
			}
			return code == http.StatusOK, fmt.Sprint(code, " ", page)
		})
		return list
	}
	buy := func(exhibition, key string) {
		t.Helper()
		n.until("a ticket", func() (bool, string) {
			resp, err := world.PostForm(museum+"/buy", url.Values{"key": {key}, "exhibition": {exhibition}})
			if err != nil {
				return false, err.Error()
			}
			resp.Body.Close()
			return resp.StatusCode == http.StatusSeeOther, resp.Status
		})
	}

	buy("relay", "first")
	buy("relay", "first") // the second click of an impatient hand
	sold := tickets()
	if len(sold) != 1 || sold[0].number != "1" || sold[0].exhibition != "relay" || sold[0].cents != "1250" {
		t.Fatalf("the museum sold %+v", sold)
	}
	// Browser to web, web to billing: billing says who it is. Billing to web:
	// the price came with the name of the pod that gave it.
	webs := strings.Fields(n.kubectl("-n", "museum", "get", "pods", "-l", "app.kubernetes.io/name=web", "-o", "jsonpath={.items[*].metadata.name}"))
	if len(webs) != 2 || !strings.Contains(strings.Join(webs, " "), sold[0].pricedBy) {
		t.Errorf("the price came from %q, web is %q", sold[0].pricedBy, webs)
	}
	n.isProgramOfTheMachine(sold[0].process)
	first := sold[0]

	n.ok(n.Run(patience, "kill", "-9", first.process))
	buy("barrel", "second")
	sold = tickets()
	if len(sold) != 2 || sold[0] != first || sold[1].number != "2" || sold[1].process == first.process {
		t.Errorf("after a kill of billing the museum has sold %+v", sold)
	}

	was := n.field("museum", "pod/billing-0", "{.metadata.uid}")
	n.kubectl("-n", "museum", "rollout", "restart", "statefulset/billing")
	n.kubectl("-n", "museum", "rollout", "status", "statefulset/billing", fmt.Sprintf("--timeout=%v", patience))
	if is := n.field("museum", "pod/billing-0", "{.metadata.uid}"); is == was {
		t.Error("billing was not restarted")
	}
	buy("punched", "third")
	if sold = tickets(); len(sold) != 3 || sold[0] != first || sold[2].number != "3" {
		t.Errorf("after a restart of billing the museum has sold %+v", sold)
	}
	if said := n.kubectl("-n", "museum", "logs", "billing-0"); !strings.Contains(said, "billing: 2 invoices so far\n") {
		t.Errorf("billing says %s", said)
	}
	if r := n.Run(patience, "ls", "-A", "/var/lib/museum"); r.Err == nil {
		t.Errorf("billing's volume left a directory on the machine: %s", r)
	}
}

// isProgramOfTheMachine wants a process to be billing in the machine's
// namespaces, with a network of its own, and the web site's to be apart.
func (n node) isProgramOfTheMachine(pid string) {
	n.t.Helper()
	link := func(pid, name string) string {
		return strings.TrimSpace(n.ok(n.Run(patience, "readlink", "/proc/"+pid+"/"+name)))
	}
	if args := n.ok(n.Run(patience, "cat", "/proc/"+pid+"/cmdline")); !strings.Contains(args, "/opt/museum/billing") {
		n.t.Errorf("process %s is %q", pid, args)
	}
	web := ""
	n.until("the web site's process", func() (bool, string) {
		web = strings.TrimSpace(n.Run(patience, "sh", "-c", `for p in /proc/[0-9]*; do [ "$(tr '\0' ' ' <$p/cmdline)" = "/web " ] && basename $p && break; done`).Stdout)
		return web != "", "there is none"
	})
	for ns, its := range map[string]bool{"pid": false, "ipc": false, "uts": false, "user": false, "net": true, "mnt": true} {
		if own := link(pid, "ns/"+ns) != link("1", "ns/"+ns); own != its {
			n.t.Errorf("billing has a %s namespace of its own: %v, want %v", ns, own, its)
		}
		if own := link(web, "ns/"+ns) != link("1", "ns/"+ns); own != (ns != "user") {
			n.t.Errorf("the web site has a %s namespace of its own: %v", ns, own)
		}
	}
}
