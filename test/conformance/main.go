// Command conformance judges tutti by the tests that judge any Kubernetes: it
// runs upstream's unmodified e2e.test against bin/tutti on a throwaway machine
// and keeps what each case said. `make conformance` builds what it needs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"tutti.dev/tutti/test/e2e/machine"
)

// judge is one run.
type judge struct {
	dir      string // where everything is kept
	kubectl  string
	upstream string // directory of the module k8s.io/kubernetes
	procs    int
	limit    time.Duration
	class    string // that all pods of the cases are forced into, "" for none
	results  *results
}

// choice is which cases to run.
type choice struct {
	focus, skip string // regular expressions
	shard       string // i/n
	each        int    // so many of each area; 0 is all
	again       bool
}

func (j *judge) program(name string) string { return filepath.Join(j.dir, "bin", name) }

func main() {
	var j judge
	flag.StringVar(&j.dir, "dir", "dist/conformance", "directory of programs, images, logs and results")
	flag.StringVar(&j.kubectl, "kubectl", "dist/tools/kubectl", "kubectl that cases run")
	flag.StringVar(&j.upstream, "upstream", "", "directory of the module k8s.io/kubernetes")
	flag.IntVar(&j.procs, "procs", 8, "cases at once; those that want to be alone are")
	flag.DurationVar(&j.limit, "limit", 24*time.Minute, "end after this time; a later run goes on")
	flag.StringVar(&j.class, "class", "", "RuntimeClass that all pods of the cases are forced into; results are kept apart")
	var c choice
	flag.StringVar(&c.focus, "focus", `\[Conformance\]`, "regular expression of cases")
	flag.StringVar(&c.skip, "skip", "", "regular expression of cases to leave out")
	flag.StringVar(&c.shard, "shard", "", "i/n: only the i-th of n equal parts")
	flag.IntVar(&c.each, "each", 0, "only so many cases of each area")
	flag.BoolVar(&c.again, "again", false, "run those too that have passed before")
	page := flag.String("page", "", "run nothing: write this page from all results so far")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := j.run(ctx, c, *page); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

func (j *judge) run(ctx context.Context, c choice, page string) (err error) {
	for _, p := range []*string{&j.dir, &j.kubectl} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	file := "results.jsonl"
	if j.class != "" {
		file = "results-" + j.class + ".jsonl"
	}
	if j.results, err = openResults(filepath.Join(j.dir, file)); err != nil {
		return err
	}
	defer j.results.close()
	if page != "" && j.class != "" {
		return errors.New("the page is about pods as the cases make them; leave -class out")
	}
	if page != "" {
		all, err := j.cases(ctx, ".", "")
		if err != nil {
			return err
		}
		j.results.leaveOut(severalMachines, "needs several machines")
		return writePage(page, all, j.results)
	}
	cases, err := j.choose(ctx, c)
	if err != nil {
		return err
	}
	if c.again {
		j.results.forget(cases)
	}
	j.results.leaveOut(severalMachines, "needs several machines")
	open := slices.DeleteFunc(j.results.notPassed(cases), func(c string) bool { return slices.Contains(severalMachines, c) })
	if len(open) > 0 {
		if err := j.judge(ctx, open); err != nil {
			return err
		}
	}
	table(os.Stdout, cases, j.results)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	_, all := tallies(cases, j.results)
	if all.failed > 0 {
		return fmt.Errorf("%d of %d cases failed", all.failed, len(cases))
	}
	if silent := j.results.silent(cases); silent > 0 {
		return fmt.Errorf("%d of %d cases have said nothing yet; run it again to go on", silent, len(cases))
	}
	return nil
}

func (j *judge) choose(ctx context.Context, c choice) ([]string, error) {
	cases, err := j.cases(ctx, c.focus, c.skip)
	if err != nil {
		return nil, err
	}
	if c.each > 0 {
		cases = sample(cases, c.each)
	}
	if cases, err = part(cases, c.shard); err != nil {
		return nil, err
	}
	if len(cases) == 0 {
		return nil, errors.New("no case matches")
	}
	return cases, nil
}

// judge makes a machine, runs the cases on it and records what they say.
func (j *judge) judge(ctx context.Context, cases []string) (err error) {
	images, without, err := j.makeImages(ctx)
	if err != nil {
		return err
	}
	logs := filepath.Join(j.dir, "logs", time.Now().UTC().Format("20060102-150405"))
	if err := os.MkdirAll(logs, 0o755); err != nil {
		return err
	}
	m, err := machine.New()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, saveLogs(m, logs), m.Close()) }()
	shut, err := images.open(m)
	if err != nil {
		return err
	}
	defer shut()
	// Cases run a registry of their own on port 5000 of the node.
	if r := m.Tutti("up", "--registry-port=5001"); r.Err != nil {
		return errors.New(r.String())
	}
	if j.class != "" {
		if err := force(m, j.class); err != nil {
			return err
		}
	}
	fmt.Printf("running %d cases, %d at once, without %d of the suite's images; logs: %s\n", len(cases), j.procs, len(without), logs)
	if err := j.suite(ctx, m, cases, logs); err != nil {
		return err
	}
	return j.results.readJUnit(filepath.Join(logs, "junit_01.xml"))
}

// suite runs ginkgo to its end. That cases fail is no error here.
func (j *judge) suite(ctx context.Context, m *machine.Machine, cases []string, logs string) error {
	args := []string{"--procs=" + strconv.Itoa(j.procs), "--timeout=" + j.limit.String(), "--no-color", "-v"}
	for _, c := range cases {
		args = append(args, "--focus= "+regexp.QuoteMeta(c)+"$")
	}
	args = append(args, j.program("e2e.test"), "--",
		"--kubeconfig="+filepath.Join(m.Dir, "admin.kubeconfig"), "--kubectl-path="+j.kubectl, "--provider=local", "--num-nodes=1",
		"--report-dir="+logs, "--dump-logs-on-failure=false", "--disable-log-dump")
	log, err := os.Create(filepath.Join(logs, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	ctx, cancel := context.WithTimeout(ctx, j.limit+2*time.Minute)
	defer cancel()
	cmd := m.Command(ctx, j.program("ginkgo"), args...)
	out := io.MultiWriter(log, &progress{results: j.results, cases: cases, begun: time.Now()})
	cmd.Stdout, cmd.Stderr = out, out
	// ginkgo has go look up its own version, which would wait for a network.
	cmd.Env = append(cmd.Env, "GOPROXY=off")
	err = cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && ctx.Err() == nil {
		if _, err := os.Stat(filepath.Join(logs, "junit_01.xml")); err != nil {
			return fmt.Errorf("the suite did not run, see %s: %w", log.Name(), exit)
		}
		return nil
	}
	return err
}

// saveLogs keeps what tutti wrote: the machine's directory goes with it.
func saveLogs(m *machine.Machine, dir string) error {
	var errs []error
	for _, from := range []string{"log", "keeper"} {
		files, err := filepath.Glob(filepath.Join(m.Dir, from, "*.log"))
		errs = append(errs, err)
		for _, f := range files {
			data, err := os.ReadFile(f)
			errs = append(errs, err, os.WriteFile(filepath.Join(dir, strings.TrimSuffix(filepath.Base(f), ".log")+".tutti.log"), data, 0o644))
		}
	}
	return errors.Join(errs...)
}
