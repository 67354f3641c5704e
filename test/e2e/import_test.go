package e2e

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// configure does what the packages' scripts do when they are installed, and
// what an administrator does to programs that others are to reach.
const configure = `set -e
mkdir -p /boot /home /root /run/user
for unit in prometheus redis-server; do # what a machine allows that may not raise its own limit
	mkdir -p /etc/systemd/system/$unit.service.d
	printf '[Service]\nLimitNOFILE=4096\n' >/etc/systemd/system/$unit.service.d/limit.conf
done
for user in postgresql:postgres redis:redis prometheus:prometheus; do
	id -u "${user#*:}" >/dev/null 2>&1 ||
		useradd --system --user-group --home-dir "/var/lib/${user%:*}" --shell /usr/sbin/nologin "${user#*:}"
done
ln -sf /etc/nginx/sites-available/default /etc/nginx/sites-enabled/default
mkdir -p /var/www/html
cp /usr/share/nginx/html/index.html /var/www/html/
install -d -o redis -g redis -m 750 /var/lib/redis /var/log/redis
chown -R redis:redis /etc/redis
chown -R prometheus:prometheus /var/lib/prometheus
sed -i 's/^bind .*/bind * -::*/; s/^protected-mode .*/protected-mode no/' /etc/redis/redis.conf
install -d -o postgres -g postgres /var/lib/postgresql /var/log/postgresql /etc/postgresql
install -d -o postgres -g postgres -m 2775 /run/postgresql
rm -rf /etc/postgresql/15/main /var/lib/postgresql/15/main # of a machine that has one
pg_createcluster --locale C.UTF-8 15 main >/dev/null
echo "listen_addresses = '*'" >/etc/postgresql/15/main/conf.d/all.conf
echo 'host all all all trust' >>/etc/postgresql/15/main/pg_hba.conf
`

// stubborn is a unit that tries what those of the packages leave out. It ends
// by SIGINT only.
const stubborn = `[Service]
User=prometheus
UMask=0077
StateDirectory=stubborn
StateDirectoryMode=0700
RuntimeDirectory=stubborn
ExecStartPre=+/bin/sh -c 'id -u >/run/stubborn/%n; chmod 644 /run/stubborn/%n'
ExecStart=/bin/sh -c 'trap "" TERM; trap "echo interrupted >>${STATE_DIRECTORY}/said; exit" INT; while :; do sleep 0.1; done'
ExecStartPost=/bin/sh -c 'cat /run/stubborn/%n >${STATE_DIRECTORY}/said'
KillSignal=SIGINT
LimitNOFILE=512
Nice=3
[X-Fleet]
Global=true
MachineMetadata=choir=bass
`

var update = flag.Bool("update", false, "write the golden files anew")

// numbers are users and groups, which each machine counts for itself.
var numbers = regexp.MustCompile(`(runAsUser: |runAsGroup: | -o | -g )[0-9]+`)

// settings are a manifest's, without what is there for people.
func settings(manifest string) string {
	var b strings.Builder
	for line := range strings.Lines(numbers.ReplaceAllString(manifest, "${1}N")) {
		if !strings.HasPrefix(line, "# ") && !strings.Contains(line, "kubernetes.io/description") {
			b.WriteString(line)
		}
	}
	return b.String()
}

// The units of five packages of Debian's, as they are, become pods that
// answer.
func TestImportUnits(t *testing.T) {
	if testing.Short() {
		t.Skip("takes a minute")
	}
	services, err := filepath.Abs("../../dist/tools/services")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(services); err != nil {
		t.Fatalf("the packages are not there, run make dist/tools/services: %v", err)
	}
	m, err := machine.New(services)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Errorf("close the machine: %v", err)
		}
	})
	n := node{m, t}
	n.explainFailure()
	n.ok(n.Run(time.Minute, "sh", "-c", configure))
	if err := n.Up(); err != nil {
		t.Fatal(err)
	}
	ns := n.hostNamespace("units")

	ports := map[string]string{"nginx": "80", "redis-server": "6379", "postgresql@15-main": "5432", "prometheus": "9090", "prometheus-node-exporter": "9100"}
	for unit, port := range ports {
		r := n.Tutti("import", "unit", unit, "--port", port)
		manifest := n.ok(r)
		// What is told is also in the manifest.
		for line := range strings.Lines(r.Stderr) {
			if _, note, _ := strings.Cut(line, ": "); !strings.Contains(manifest, "# - "+strings.TrimSpace(note)) {
				t.Errorf("%s: not in the manifest: %s", unit, line)
			}
		}
		golden := filepath.Join("testdata", "units", unit+".yaml")
		if *update {
			if err := os.WriteFile(golden, []byte(settings(manifest)), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(golden); err != nil || settings(manifest) != string(want) {
			t.Errorf("is not %s, which `go test -update` writes anew (%v):\n%s", golden, err, manifest)
		}
		n.ok(n.RunInput(time.Minute, manifest, n.Binary(), "kubectl", "-n", ns, "apply", "-f", "-"))
	}
	n.ok(n.RunInput(10*time.Second, stubborn, "tee", "/etc/systemd/system/stubborn.service"))
	n.ok(n.RunInput(time.Minute, n.ok(n.Tutti("import", "unit", "stubborn")), n.Binary(), "kubectl", "-n", ns, "apply", "-f", "-"))
	n.kubectl("label", "node", "--all", "choir=bass")
	for unit, port := range ports {
		name := strings.ReplaceAll(unit, "@", "-")
		n.wait(ns, "deployment/"+name, "condition=Available")
		address := net.JoinHostPort(n.field(ns, "service/"+name, "{.spec.clusterIP}"), port)
		answer, err := n.ask(unit, address)
		if err != nil {
			t.Errorf("%s does not answer: %v\n%s", unit, err, n.Kubectl("-n", ns, "logs", "deployment/"+name, "--all-containers", "--tail=20"))
			continue
		}
		t.Logf("%s answers %q", unit, answer)
	}

	// The daemon that nginx leaves behind is its pod: when it dies, the pod's
	// container is started again.
	restarts := func() string {
		return n.field(ns, "pods", `{.items[?(@.metadata.labels.app\.kubernetes\.io/instance=="nginx")].status.containerStatuses[0].restartCount}`)
	}
	if got := restarts(); got != "0" {
		t.Errorf("nginx was started again %s times", got)
	}
	daemon := n.master(t)
	if err := daemon.Kill(); err != nil {
		t.Fatal(err)
	}
	n.until("nginx is started again", func() (bool, string) { got := restarts(); return got == "1", got })
	n.wait(ns, "deployment/nginx", "condition=Available")

	n.wait(ns, "daemonset/stubborn", "jsonpath={.status.numberReady}=1")

	// All end by what the units say ends them.
	n.kubectl("-n", ns, "delete", "deployment,daemonset", "--all", "--timeout=60s")
	n.kubectl("-n", ns, "wait", "--for=delete", "pod", "--all", "--timeout=60s")
	all, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if slices.Contains([]string{"nginx", "redis-server", "postgres", "prometheus", "prometheus-node-exporter"}, p.Name()) || strings.HasPrefix(p.Args[0], "nginx:") {
			t.Errorf("still runs: %q", p.Args)
		}
	}
	if r := n.Run(10*time.Second, "sh", "-c", "cat /var/lib/stubborn/said; stat -c '%a %U' /var/lib/stubborn /var/lib/stubborn/said; ls /run/stubborn"); r.Stdout != "0\ninterrupted\n700 prometheus\n600 prometheus\n" {
		t.Errorf("what the stubborn one leaves: %s", r)
	}
	if r := n.Run(10*time.Second, "/usr/lib/postgresql/15/bin/pg_controldata", "/var/lib/postgresql/15/main"); !strings.Contains(r.Stdout, "shut down") {
		t.Errorf("the database was not shut down: %s", r)
	}
}

// master finds nginx's first process.
func (n node) master(t *testing.T) machine.Process {
	t.Helper()
	all, err := n.Processes()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(p machine.Process) bool { return strings.HasPrefix(p.Args[0], "nginx: master") })
	if i < 0 {
		t.Fatal("nginx does not run")
	}
	return all[i]
}

// ask asks a program something that only it can answer.
func (n node) ask(unit, address string) (string, error) {
	get := func(path, want string) (string, error) {
		r, err := n.Client().Get("http://" + address + path)
		if err != nil {
			return "", err
		}
		defer r.Body.Close()
		body, err := io.ReadAll(r.Body)
		if i := strings.Index(string(body), want); err == nil && i >= 0 {
			return string(body[i : i+len(want)]), nil
		}
		return "", fmt.Errorf("%s: no %q in %.200s (%v)", r.Status, want, body, err)
	}
	switch unit {
	case "nginx":
		return get("/", "Welcome to nginx!")
	case "prometheus":
		return get("/-/ready", "Prometheus Server is Ready.")
	case "prometheus-node-exporter":
		return get("/metrics", "node_boot_time_seconds")
	case "postgresql@15-main":
		host, port, _ := net.SplitHostPort(address)
		r := n.Run(20*time.Second, "psql", "-h", host, "-p", port, "-U", "postgres", "-Atc", "select 6*7 || ' by PostgreSQL'")
		return strings.TrimSpace(r.Stdout), r.Err
	}
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	c, err := n.Dial(ctx, "tcp", address)
	if err != nil {
		return "", err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(c, "SET key value\r\nGET key\r\n"); err != nil {
		return "", err
	}
	var lines []string
	for scan := bufio.NewScanner(c); len(lines) < 3 && scan.Scan(); {
		lines = append(lines, scan.Text())
	}
	if answer := strings.Join(lines, " "); answer != "+OK $5 value" {
		return "", fmt.Errorf("it says %q", answer)
	}
	return lines[2], nil
}

// A process that runs becomes a manifest whose pod does what it did.
func TestImportProcess(t *testing.T) {
	n := shared(t)
	ns := n.hostNamespace("import-process")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := n.Command(ctx, "busybox", "httpd", "-f", "-p", "18080", "-h", "/usr/share/common-licenses")
	cmd.Env = append(cmd.Env, "LEGACY_PASSWORD=hunter2", "TERM=dumb")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); cmd.Wait() }
	t.Cleanup(stop)
	var pid int
	n.until("the process listens", func() (bool, string) {
		all, err := n.Processes()
		for _, p := range all {
			if p.Name() == "busybox" && slices.Contains(p.Args, "18080") {
				pid = p.Inside
			}
		}
		c, dial := n.Dial(ctx, "tcp", "127.0.0.1:18080")
		if dial == nil {
			c.Close()
		}
		return pid != 0 && dial == nil, fmt.Sprint(pid, err, dial)
	})
	r := n.Tutti("import", "process", fmt.Sprint(pid))
	manifest := n.ok(r)
	if !strings.Contains(r.Stderr, "LEGACY_PASSWORD: looks like a secret") || strings.Count(manifest, "hunter2") != 1 || strings.Contains(manifest, "dumb") {
		t.Errorf("secrets and what belongs to a session: %s\n%s", r.Stderr, manifest)
	}
	stop()
	n.ok(n.RunInput(time.Minute, manifest, n.Binary(), "kubectl", "-n", ns, "apply", "-f", "-"))
	n.wait(ns, "deployment/busybox", "condition=Available")
	address := n.field(ns, "service/busybox", "{.spec.clusterIP}")
	response, err := n.Client().Get("http://" + net.JoinHostPort(address, "18080") + "/Apache-2.0")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if body, _ := io.ReadAll(response.Body); !strings.Contains(string(body), "Apache License") {
		t.Errorf("%s: %.100s", response.Status, body)
	}
}

// What cannot be imported is told in one line, and nothing is printed.
func TestImportRefuses(t *testing.T) {
	n := shared(t)
	for says, args := range map[string][]string{
		"tutti: there is no process 4194304; `ps ax` lists those that run\n":                                             {"process", "4194304"},
		"tutti: no unit none.service is here or where systemd looks; `systemctl list-unit-files` names those that are\n": {"unit", "none"},
		"tutti: " + n.Repo + "/go.mod is not named like a service; give a file whose name ends in .service\n":            {"unit", n.Repo + "/go.mod"},
		"tutti: /no/such.service does not exist; check the path\n":                                                       {"unit", "/no/such.service"},
	} {
		if r := n.Tutti(append([]string{"import"}, args...)...); r.Stdout != "" || r.Stderr != says || r.Code != 1 {
			t.Errorf("not %q: %s", says, r)
		}
	}
}
