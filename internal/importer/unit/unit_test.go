package unit

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/importer"
)

var update = flag.Bool("update", false, "write the golden files anew")

var machine = os.DirFS("testdata/root")

func translate(t *testing.T, name string, ports ...string) (importer.Manifest, string) {
	t.Helper()
	u, err := Load(machine, "/", name)
	if err != nil {
		t.Fatal(err)
	}
	var all []importer.Port
	for _, text := range ports {
		p, err := importer.ParsePort(text)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	m, err := Translate(machine, u, all)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.Write(&b); err != nil {
		t.Fatal(err)
	}
	return m, b.String()
}

func TestGolden(t *testing.T) {
	for _, c := range []struct {
		unit  string
		ports []string
	}{
		{"simple", []string{"80", "53/udp"}},
		{"forking", nil},
		{"lost", nil},
		{"hooks", []string{"8080"}},
		{"ledger", nil},
		{"backup@", nil},
		{"backup@home-me", []string{"80"}},
		{"retry", nil},
		{"global", []string{"9100"}},
		{"fleet@1", nil},
		{"limits", nil},
		{"shares", nil},
		{"strict", nil},
		{"full", nil},
		{"dynamic", nil},
		{"capable", nil},
		{"rest", nil},
		{"dropped-in", nil},
	} {
		t.Run(c.unit, func(t *testing.T) {
			m, got := translate(t, c.unit, c.ports...)
			admitted(t, m)
			file := filepath.Join("testdata", "golden", c.unit+".yaml")
			if *update {
				if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("is not %s, which `go test -update` writes anew:\n%s", file, got)
			}
		})
	}
}

// admitted fails the test if a cluster would refuse a pod of the manifest.
func admitted(t *testing.T, m importer.Manifest) {
	t.Helper()
	var template *corev1.PodTemplateSpec
	for _, o := range m.Objects {
		switch o := o.(type) {
		case *appsv1.Deployment:
			template = &o.Spec.Template
		case *appsv1.DaemonSet:
			template = &o.Spec.Template
		case *batchv1.Job:
			template = &o.Spec.Template
		}
	}
	if template == nil {
		t.Fatal("nothing makes a pod")
	}
	if _, err := hostprocess.ParseSettings(template.Annotations); err != nil {
		t.Error(err)
	}
	if err := hostprocess.Check(&corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec}); err != nil {
		t.Error(err)
	}
}

// Whatever a unit says is in the objects or in a note: no setting of a unit
// with everything is left out.
func TestNothingIsDropped(t *testing.T) {
	for _, name := range []string{"simple", "hooks", "limits", "strict", "full", "rest", "capable", "fleet@1"} {
		u, err := Load(machine, "/", name)
		if err != nil {
			t.Fatal(err)
		}
		for i, s := range u.settings {
			// A value of its own is found again, wherever it goes.
			if slices.Contains([]string{"ExecStart", "ExecStartPre", "Type", "User", "KillSignal"}, s.key) {
				continue
			}
			without := u
			without.settings = slices.Delete(slices.Clone(u.settings), i, i+1)
			if a, b := text(t, u), text(t, without); a == b && !slices.Contains(nothing, s.key+"="+s.value) {
				t.Errorf("%s: %s=%s makes no difference", name, s.key, s.value)
			}
		}
	}
}

// nothing are settings that a pod has anyway.
var nothing = []string{
	"Wants=network-online.target", "WantedBy=multi-user.target", "Restart=always", // said once for all units, or as it is
	"ProtectClock=no", "ReadWritePaths=/var/run/strict", "IOSchedulingClass=best-effort",
}

func text(t *testing.T, u Unit) string {
	t.Helper()
	m, err := Translate(machine, u, nil)
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRefused(t *testing.T) {
	for _, c := range []struct{ unit, says string }{
		{"/etc/systemd/system/none.service", "/etc/systemd/system/none.service does not exist; check the path"},
		{"none", "no unit none.service is here or where systemd looks; `systemctl list-unit-files` names those that are"},
		{"web.socket", "web.socket is a unit of another kind; only services (.service) can be imported"},
		{"/etc/passwd", "/etc/passwd is not named like a service; give a file whose name ends in .service"},
		{"masked", "/etc/systemd/system/masked.service is masked; `systemctl unmask masked.service` undoes that"},
		{"nosection", "/etc/systemd/system/nosection.service has no section [Service]; give a file of systemd's whose name ends in .service"},
		{"broken", "/etc/systemd/system/broken.service is not written as a unit of systemd (unexpected newline encountered while parsing option name); `systemd-analyze verify` tells more"},
		{"empty", "empty.service: it has no ExecStart, so there is nothing to run; import the service that does the work"},
		{"two", "two.service: it has more than one ExecStart, which only Type=oneshot may; systemd would not start it either"},
		{"quote", "quote.service: in ExecStart=/bin/a \"b a quote is not closed; close it"},
		{"envquote", "envquote.service: in /etc/default/open a quote is not closed; close it"},
		{"prefix", "prefix.service: ExecStart=- names no program; write its path after the prefix"},
		{"stranger", "stranger.service: user \"nobody-here\" is not on this machine; create it, or import the unit where it runs"},
		{"strangers", "strangers.service: group \"nobody-here\" is not on this machine; create it, or import the unit where it runs"},
		{"mask", "mask.service: UMask=rwx is no number of the base 8; write it as 0027"},
		{"signal", "signal.service: KillSignal=2; reboot is no signal; write it as SIGINT"},
		{"needs@", "needs@.service is a template; say of what, as in needs@INSTANCE.service"},
		{"_", "/etc/systemd/system/_.service has no letter or digit in its name; give the file another name"},
	} {
		t.Run(c.unit, func(t *testing.T) {
			u, err := Load(machine, "/", c.unit)
			if err == nil {
				_, err = Translate(machine, u, nil)
			}
			if err == nil || err.Error() != c.says {
				t.Errorf("says %v, not %q", err, c.says)
			}
		})
	}
}

func TestWhereUnitsAre(t *testing.T) {
	for _, c := range []struct{ dir, arg, name, file string }{
		{"/", "simple", "simple.service", "/etc/systemd/system/simple.service"},
		{"/", "alias.service", "simple.service", "/etc/systemd/system/alias.service"},
		{"/etc/systemd", "system/simple.service", "simple.service", "/etc/systemd/system/simple.service"},
		{"/", "/etc/systemd/system/backup@x.service", "backup@x.service", "/etc/systemd/system/backup@.service"},
		{"/", "backup@.service", "backup@all.service", "/etc/systemd/system/backup@.service"},
	} {
		u, err := Load(machine, c.dir, c.arg)
		if err != nil || u.Name != c.name || u.File != c.file {
			t.Errorf("%s in %s is %s from %s, %v", c.arg, c.dir, u.Name, u.File, err)
		}
	}
}

func TestSplit(t *testing.T) {
	for _, c := range []struct {
		value string
		words []string
	}{
		{``, nil},
		{` a  b	c `, []string{"a", "b", "c"}},
		{`"a b" 'c "d"' e"f g"h`, []string{"a b", `c "d"`, "ef gh"}},
		{`""`, []string{""}},
		{`a\x20b \t \101 \u00e9 \s \\ \q`, []string{"a b", "\t", "A", "é", " ", `\`, `\q`}},
		{`a ; b \;`, []string{"a", ";", "b", `\;`}},
		{`\x2`, []string{`\x2`}},
	} {
		if got, closed := split(c.value); !closed || !slices.Equal(got, c.words) {
			t.Errorf("%s is %q, %v", c.value, got, closed)
		}
	}
	if got, closed := split(`a 'b`); closed {
		t.Errorf("an open quote is closed: %q", got)
	}
}

func TestAssignments(t *testing.T) {
	all, closed := assignments("# no\n; no\nno\n A = b c \nB='x\ny $Z'\nC=\"a\\\"b\\$c\\d\"\nD=a\\\nb\nE=\n")
	want := [][2]string{{"A", "b c"}, {"B", "x\ny $Z"}, {"C", `a"b$c\d`}, {"D", "ab"}, {"E", ""}}
	if !closed || !slices.Equal(all, want) {
		t.Errorf("%q, %v", all, closed)
	}
}

func TestSeconds(t *testing.T) {
	for value, want := range map[string]int64{"5": 5, "1h 2min 3s": 3723, "500ms": 1, "infinity": 0, "0": 0, "1.5m": 90, "2 weeks": 1209600} {
		if got, ok := seconds(value); !ok || got != want {
			t.Errorf("%s is %d", value, got)
		}
	}
	for _, value := range []string{"", "soon", "5 parsecs", "min"} {
		if got, ok := seconds(value); ok {
			t.Errorf("%q is %d", value, got)
		}
	}
}

// Every reason is about a key that no step takes.
func TestReasons(t *testing.T) {
	for key, text := range reasons {
		if strings.Count(key, ".") != 1 || text == "" {
			t.Errorf("%s: %q", key, text)
		}
	}
}
