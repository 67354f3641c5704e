package process

import (
	"bytes"
	"flag"
	"net"
	"os"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestGolden(t *testing.T) {
	any4, any6, local := net.IPv4zero, net.IPv6zero, net.IPv4(127, 0, 0, 1)
	for name, s := range map[string]Snapshot{
		"plain": {PID: 10, Name: "sleep", Exe: "/usr/bin/sleep", Called: "/usr/bin/sleep", Args: []string{"sleep", "1000"}, Dir: "/", UID: 1000, GID: 1000, Umask: "0022"},
		"billing": {
			PID: 4711, Name: "billing", Exe: "/opt/billing/bin/billing", Called: "/opt/billing/bin/billing", Dir: "/var/lib/billing",
			Args: []string{"./billing", "--listen=:8080", "--price", "$(5)", "--password=hunter2"},
			Env:  []string{"PATH=/usr/bin:/bin", "DB_PASSWORD=hunter2", "DB=postgres://billing:hunter2@db/billing", "TERM=xterm", "PWD=/", "KEY_FILE=/etc/billing/key", "MOTTO=a$b"},
			UID:  120, GID: 130, Groups: []int64{130, 26}, User: "billing", Effective: []string{"NET_ADMIN"}, NoNewPrivileges: true, Seccomp: true, Umask: "0027",
			Nice: 5, IO: "best-effort:6", OOMScoreAdj: -100, Limits: []Limit{{"nofile", "65536", "65536"}, {"core", "0", "unlimited"}},
			Memory: 512 << 20, MilliCPU: 1500, Processes: 64,
			Sockets: []Socket{{corev1.ProtocolTCP, any6, 8080}, {corev1.ProtocolTCP, any4, 8080}, {corev1.ProtocolTCP, local, 9000}, {corev1.ProtocolUDP, any4, 514},
				{corev1.ProtocolUDP, any4, 40000}, {corev1.ProtocolTCP, net.IPv4(192, 0, 2, 10), 8443}},
			Unix:    []string{"/run/billing.sock"},
			Written: []string{"/tmp/billing.lock", "/var/lib/billing/2026/books.db", "/var/lib/billing/log", "/var/log/billing.log", "/srv/out/list"},
			Read:    []string{"/etc/billing/billing.conf"}, Mapped: []string{"/lib/x86_64-linux-gnu/libc.so.6"},
			Parent: Relative{1, "systemd"}, Children: []Relative{{4712, "billing"}, {4713, "printer"}}, Unit: "billing.service",
		},
		"titled": {
			PID: 20, Name: "nginx", Exe: "/usr/sbin/nginx", Args: []string{"nginx: master process /usr/sbin/nginx -g daemon on;"}, Dir: "/", Umask: "0022",
			Effective: []string{"CHOWN", "SYS_ADMIN"}, Parent: Relative{1, "init"}, Deleted: true, Sockets: []Socket{{corev1.ProtocolTCP, local, 80}},
		},
		"worker": {
			PID: 21, Name: "worker.py", Exe: "/usr/bin/python3.11", Called: "/usr/bin/python3", Args: []string{"python3", "worker.py"}, Dir: "/srv", Umask: "0022",
			Effective: []string{"CHOWN"}, Lacking: []string{"KILL"}, Parent: Relative{20, "worker.py"},
		},
		"renamed": {PID: 22, Name: "sh", Exe: "/bin/busybox", Args: []string{"httpd", "-f"}, Dir: "/", UID: 1, GID: 1, Umask: "0022"},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			if err := Translate(s).Write(&b); err != nil {
				t.Fatal(err)
			}
			file := filepath.Join("testdata", name+".yaml")
			if *update {
				if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("is not %s, which `go test -update` writes anew:\n%s", file, b.String())
			}
		})
	}
}
