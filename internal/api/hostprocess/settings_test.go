package hostprocess

import (
	"reflect"
	"testing"
)

func TestParseSettings(t *testing.T) {
	minus := -5
	got, err := ParseSettings(map[string]string{
		AnnotationRoot: "overlay", AnnotationNice: "-5", AnnotationIO: "best-effort:7",
		AnnotationLimits:   "nofile=1024:65536 core=unlimited",
		AnnotationLandlock: "ro=/usr:/etc rw=/data",
		"another.dev/key":  "value",
	})
	want := Settings{
		Root: RootOverlay, Nice: &minus, IOClass: "best-effort", IOLevel: 7,
		Limits:   []Limit{{"nofile", 1024, 65536}, {"core", Unlimited, Unlimited}},
		Landlock: true, ReadOnly: []string{"/usr", "/etc"}, Writable: []string{"/data"},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v %v, want %+v", got, err, want)
	}
	if got, err := ParseSettings(nil); err != nil || !reflect.DeepEqual(got, Settings{Root: RootReadOnly}) {
		t.Errorf("nothing said: %+v %v", got, err)
	}
	for _, c := range []struct{ key, value, want string }{
		{"root", "rw", `annotation process.tutti.dev/root: "rw" is no root; use shared, readonly or overlay`},
		{"nice", "20", `annotation process.tutti.dev/nice: "20" is no niceness; use a number from -20 to 19`},
		{"nice", "low", `annotation process.tutti.dev/nice: "low" is no niceness; use a number from -20 to 19`},
		{"io", "idle:3", `annotation process.tutti.dev/io: "idle:3" is no I/O priority; use idle, best-effort:0 to best-effort:7 or realtime:0 to realtime:7`},
		{"io", "best-effort:8", `annotation process.tutti.dev/io: "best-effort:8" is no I/O priority; use idle, best-effort:0 to best-effort:7 or realtime:0 to realtime:7`},
		{"limits", "files=1", `annotation process.tutti.dev/limits: "files" is no limit; use as, core, cpu, data, fsize, locks, memlock, msgqueue, nice, nofile, nproc, rss, rtprio, rttime, sigpending, stack`},
		{"limits", "nofile=2:1", `annotation process.tutti.dev/limits: "nofile=2:1" is no limit; write nofile=1024, nofile=1024:65536 or core=unlimited`},
		{"limits", "nofile", `annotation process.tutti.dev/limits: "nofile" is no limit; write nofile=1024, nofile=1024:65536 or core=unlimited`},
		{"limits", "core=0 core=1", `annotation process.tutti.dev/limits: core is there twice; leave one out`},
		{"landlock", "ro=usr", `annotation process.tutti.dev/landlock: "ro=usr" is no list of absolute paths; write ro=/usr:/etc rw=/data`},
		{"landlock", "wo=/usr", `annotation process.tutti.dev/landlock: "wo" is no access; write ro=/usr:/etc rw=/data`},
		{"cpu", "1", `annotation process.tutti.dev/cpu: there is no such setting; use process.tutti.dev/root, landlock, limits, nice or io`},
	} {
		if _, err := ParseSettings(map[string]string{AnnotationPrefix + c.key: c.value}); err == nil || err.Error() != c.want {
			t.Errorf("%s=%q: got %v, want %s", c.key, c.value, err, c.want)
		}
	}
}
