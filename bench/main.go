// Command bench measures tutti on a throwaway machine and, in the same run,
// what else is installed: docker and plain runc. It writes one JSON object a
// line to a file and a table to its output. Figures on different machines, or
// of different days, do not compare; those of one run do.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// figure is one result. What repeats has n, p50 and p99; the rest a value.
type figure struct {
	Subject string  `json:"subject"` // tutti, docker, runc
	Name    string  `json:"name"`
	Unit    string  `json:"unit,omitempty"`
	N       int     `json:"n,omitempty"`
	P50     float64 `json:"p50,omitempty"`
	P99     float64 `json:"p99,omitempty"`
	Value   float64 `json:"value,omitempty"`
	Skipped string  `json:"skipped,omitempty"` // why there is no figure
	Run     string  `json:"run"`
	CPUs    int     `json:"cpus"`
}

// report collects figures as they come.
type report struct {
	run     string
	out     io.Writer
	figures []figure
}

func (r *report) add(f figure) error {
	f.Run, f.CPUs = r.run, runtime.NumCPU()
	r.figures = append(r.figures, f)
	fmt.Fprintf(os.Stderr, "%s: %s\n", f.Subject, f.Name)
	return json.NewEncoder(r.out).Encode(f)
}

func (r *report) table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "subject\twhat\tp50\tp99\tvalue\tunit\tn")
	number := func(v float64) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprintf("%.1f", v)
	}
	for _, f := range r.figures {
		if f.Skipped != "" {
			fmt.Fprintf(t, "%s\t%s\tskipped: %s\n", f.Subject, f.Name, f.Skipped)
			continue
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", f.Subject, f.Name, number(f.P50), number(f.P99), number(f.Value), f.Unit, max(f.N, 1))
	}
	return t.Flush()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// repeated is the figure of something that was measured several times.
func repeated(subject, name string, took []time.Duration) figure {
	slices.Sort(took)
	at := func(p int) float64 { return ms(took[(len(took)-1)*p/100]) }
	return figure{Subject: subject, Name: name, Unit: "ms", N: len(took), P50: at(50), P99: at(99)}
}

type options struct {
	n, pods int
	settle  time.Duration
}

func main() {
	out := flag.String("o", "dist/bench.jsonl", "file to write, one JSON object a line")
	var o options
	flag.IntVar(&o.n, "n", 30, "how often to repeat what is repeated")
	flag.IntVar(&o.pods, "pods", 100, "how many pods to create at once")
	flag.DurationVar(&o.settle, "settle", 10*time.Second, "rest before memory is read")
	flag.Parse()
	if err := run(*out, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(out string, o options) error {
	f, err := os.Create(out)
	if err != nil {
		return err
	}
	defer f.Close()
	r := &report{run: time.Now().UTC().Format(time.RFC3339), out: f}
	m, err := machine.New()
	if err != nil {
		return err
	}
	defer m.Close()
	rootfs, err := busybox(filepath.Join(filepath.Dir(m.Dir), "busybox"))
	if err != nil {
		return err
	}
	// The peers go first, on a quiet machine.
	if err := benchRunc(r, m, rootfs, o); err != nil {
		return err
	}
	if err := benchDocker(r, rootfs, o); err != nil {
		return err
	}
	if err := benchTutti(r, m, rootfs, o); err != nil {
		return err
	}
	if err := benchBuild(r, m); err != nil {
		return err
	}
	if err := r.table(os.Stdout); err != nil {
		return err
	}
	return f.Close()
}

// busybox makes a root file system with one static program.
func busybox(dir string) (string, error) {
	program, err := exec.LookPath("busybox")
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile(program)
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Join(dir, "bin"), 0o755); err != nil {
		return "", err
	}
	for _, tool := range []string{"sleep", "true"} {
		if err := os.Symlink("busybox", filepath.Join(dir, "bin", tool)); err != nil {
			return "", err
		}
	}
	return dir, os.WriteFile(filepath.Join(dir, "bin", "busybox"), data, 0o755)
}

// archive writes a root file system as a tar beside it.
func archive(rootfs string) (string, error) {
	file := rootfs + ".tar"
	if out, err := exec.Command("tar", "-C", rootfs, "-cf", file, ".").CombinedOutput(); err != nil {
		return "", fmt.Errorf("archive %s: %s: %w", rootfs, bytes.TrimSpace(out), err)
	}
	return file, nil
}

// benchRunc times runc from start to the end of a program that does nothing.
func benchRunc(r *report, m *machine.Machine, rootfs string, o options) error {
	const name = "run /bin/true to its end"
	if _, err := exec.LookPath("runc"); err != nil {
		return r.add(figure{Subject: "runc", Name: name, Skipped: "runc is not installed"})
	}
	bundle := filepath.Join(filepath.Dir(rootfs), "bundle")
	if err := os.Mkdir(bundle, 0o755); err != nil {
		return err
	}
	spec := m.Run(time.Minute, "runc", "spec", "--bundle", bundle)
	if spec.Err != nil {
		return r.add(figure{Subject: "runc", Name: name, Skipped: strings.TrimSpace(spec.Stderr)})
	}
	file := filepath.Join(bundle, "config.json")
	var config map[string]any
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, &config); err != nil {
		return err
	}
	process := config["process"].(map[string]any)
	process["args"], process["terminal"] = []string{"/bin/true"}, false
	config["root"] = map[string]any{"path": rootfs, "readonly": true}
	if data, err = json.Marshal(config); err != nil {
		return err
	}
	if err := os.WriteFile(file, data, 0o644); err != nil {
		return err
	}
	var took []time.Duration
	for i := range o.n {
		run := m.Run(time.Minute, "runc", "--root", filepath.Join(bundle, "state"), "run", "--bundle", bundle, fmt.Sprintf("tutti-bench-%d-%d", os.Getpid(), i))
		if run.Err != nil {
			return r.add(figure{Subject: "runc", Name: name, Skipped: strings.TrimSpace(run.Stderr)})
		}
		took = append(took, run.Took)
	}
	return r.add(repeated("runc", name, took))
}

// benchDocker times docker run until its client returns; it uses the daemon
// that runs here, if one does.
func benchDocker(r *report, rootfs string, o options) error {
	const name = "docker run -d until it returns"
	docker := func(timeout time.Duration, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		defer cancel()
		out, err := exec.CommandContext(ctx, "docker", args...).CombinedOutput()
		return string(bytes.TrimSpace(out)), err
	}
	if _, err := exec.LookPath("docker"); err != nil {
		return r.add(figure{Subject: "docker", Name: name, Skipped: "docker is not installed"})
	}
	if _, err := docker(10*time.Second, "info"); err != nil {
		return r.add(figure{Subject: "docker", Name: name, Skipped: "no docker daemon answers"})
	}
	file, err := archive(rootfs)
	if err != nil {
		return err
	}
	image := fmt.Sprintf("tutti-bench:%d", os.Getpid())
	if out, err := docker(time.Minute, "import", file, image); err != nil {
		return fmt.Errorf("docker import: %s: %w", out, err)
	}
	defer docker(time.Minute, "rmi", "--force", image)
	var took []time.Duration
	for range o.n {
		begin := time.Now()
		id, err := docker(time.Minute, "run", "--detach", image, "/bin/sleep", "100000")
		if err != nil {
			return fmt.Errorf("docker run: %s: %w", id, err)
		}
		took = append(took, time.Since(begin))
		if out, err := docker(time.Minute, "rm", "--force", id); err != nil {
			return fmt.Errorf("docker rm: %s: %w", out, err)
		}
	}
	return r.add(repeated("docker", name, took))
}

// benchBuild times a build with an empty cache, when it is asked for.
func benchBuild(r *report, m *machine.Machine) error {
	const name = "cold build"
	if os.Getenv("BENCH_COLD") == "" {
		return r.add(figure{Subject: "tutti", Name: name, Skipped: "set BENCH_COLD=1; it takes many minutes"})
	}
	cache, err := os.MkdirTemp("", "tutti-bench-cache")
	if err != nil {
		return err
	}
	defer os.RemoveAll(cache)
	cmd := exec.Command("make", "-C", m.Repo, "build")
	cmd.Env = append(os.Environ(), "GOCACHE="+cache)
	begin := time.Now()
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %s: %w", out, err)
	}
	return r.add(figure{Subject: "tutti", Name: name, Unit: "s", Value: time.Since(begin).Seconds()})
}
