package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"tutti.dev/tutti/internal/app"
	"tutti.dev/tutti/internal/cli/progress"
	"tutti.dev/tutti/internal/cli/view"
)

func (c *command) status() *cobra.Command {
	var watch, all bool
	cmd := &cobra.Command{
		Use:   "status [--watch] [-o json]",
		Short: "Show what runs, by application",
		Long: `status shows each application with its services, how many of their pods are
ready, and what is wrong with those that are not.
With --watch it stays and shows them as a tree, with what they use and who
talks to whom; q quits. These are measured only while somebody watches. Where
there is no terminal, it writes everything again after each change.
Who may not see everything is shown what they may, and told what is missing.
As JSON, .ready says whether a pod could be scheduled now, .apps has the
applications, .notes what could not be told and, with --watch, .connections
who talks to whom.`,
		Example: `  tutti status
  tutti status --watch
  tutti status -o json | jq .ready`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			kubeconfig, own := c.cluster()
			if own {
				st, err := c.control().status(ctx)
				if err == nil && !st.Ready {
					err = errors.New("this machine is starting; `tutti up` waits for it")
				}
				if err != nil {
					if c.json() && errors.Is(err, errNotRunning) {
						writeJSON(c.out, app.Status{Nodes: []app.Node{}, Apps: []app.App{}})
					}
					return err
				}
			}
			cluster, _, err := connect(ctx, kubeconfig)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			o, err := cluster.Observe(ctx, statusTimeout)
			if err != nil {
				return err
			}
			if watch {
				return c.watch(ctx, o, all)
			}
			return c.show(app.Summarize(o.Snapshot(), all))
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "stay, and show what changes, what is used and who talks to whom")
	cmd.Flags().BoolVarP(&all, "all", "A", false, "show what Kubernetes itself runs too")
	return c.withOutput(cmd)
}

// statusTimeout is how long a cluster may take to say what it runs.
const statusTimeout = 15 * time.Second

// see looks once.
func (c *command) see(ctx context.Context, cluster *app.Cluster) (app.Status, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o, err := cluster.Observe(ctx, statusTimeout)
	if err != nil {
		return app.Status{}, err
	}
	return app.Summarize(o.Snapshot(), false), nil
}

func (c *command) show(s app.Status) error {
	if c.json() {
		return writeJSON(c.out, s)
	}
	printStatus(c.out, s, time.Now())
	return nil
}

// watch shows every change until it is interrupted: a picture of it all on a
// terminal, one after the other elsewhere.
func (c *command) watch(ctx context.Context, o *app.Observer, all bool) error {
	first := o.Measure(ctx)
	var screen *progress.Screen
	if !c.json() {
		screen = progress.NewScreen(c.in, c.out)
	}
	if screen == nil {
		select {
		case <-ctx.Done():
			return nil
		case <-first: // so that the first is whole
		}
		return c.report(ctx, o, all)
	}
	defer screen.Close()
	hint := "q: quit"
	if !screen.Typed() {
		hint = "Ctrl-C: quit"
	}
	second := time.NewTicker(time.Second) // ages grow
	defer second.Stop()
	for {
		width, height := screen.Size()
		screen.Show(view.Draw(app.Summarize(o.Snapshot(), all), time.Now(), view.Options{
			Width: width, Height: height, Colour: os.Getenv("NO_COLOR") == "", Hint: hint,
		}))
		select { // not more often than an eye can follow
		case <-ctx.Done():
			return nil
		case <-time.After(100 * time.Millisecond):
		}
		select {
		case <-ctx.Done():
			return nil
		case <-o.Changed():
		case <-second.C:
		case news := <-screen.News():
			screen.Handle(news)
		case key := <-screen.Keys():
			switch key {
			case 'q', 'Q', ctrlD:
				return nil
			case ctrlL: // as ever: draw it anew
				screen.Handle(syscall.SIGWINCH)
			}
		}
	}
}

const (
	ctrlD = 'D' - '@'
	ctrlL = 'L' - '@'
)

// report writes a status, and another whenever something is not as it was;
// figures that are never the same are no news.
func (c *command) report(ctx context.Context, o *app.Observer, all bool) error {
	last := ""
	for {
		s := app.Summarize(o.Snapshot(), all)
		var now bytes.Buffer
		if err := writeJSON(&now, s.Steady()); err != nil {
			return err
		}
		if now.String() != last {
			if c.json() {
				if err := writeJSON(c.out, s); err != nil {
					return err
				}
			} else {
				text := strings.Join(view.Draw(s, time.Now(), view.Options{}), "\n") + "\n"
				if last != "" {
					text = "\n" + text
				}
				if _, err := io.WriteString(c.out, text); err != nil {
					return fmt.Errorf("write the status: %w", err)
				}
			}
			last = now.String()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-o.Changed():
		}
	}
}

func printStatus(w io.Writer, s app.Status, now time.Time) {
	for _, a := range s.Apps {
		printApp(w, a, now)
		fmt.Fprintln(w)
	}
	if len(s.Apps) == 0 {
		fmt.Fprint(w, "No application runs; deploy one with `tutti up PATH`.\n\n")
	}
	for _, n := range s.Nodes {
		state := "ready"
		switch {
		case !n.Ready:
			state = "not ready"
		case !n.Schedulable:
			state = "ready, takes no new pods"
		}
		fmt.Fprintf(w, "node %s (%s): %s\n", n.Name, n.Address, state)
		for _, p := range n.Problems {
			fmt.Fprintf(w, "  ! %s\n", p)
		}
	}
	if s.Nodes != nil && len(s.Nodes) == 0 {
		fmt.Fprintln(w, "no node yet")
	}
	for _, n := range s.Notes {
		fmt.Fprintln(w, n)
	}
}

// printApp prints one application as a table, with its problems below it.
func printApp(w io.Writer, a app.App, now time.Time) {
	name := a.Name
	if name == "" {
		name = "(no application)"
	}
	state := "ready"
	if !a.Ready {
		state = "not ready"
	}
	fmt.Fprintf(w, "%s in %s: %s\n", name, a.Namespace, state)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "  SERVICE\tKIND\tREADY\tRESTARTS\tAGE\tIMAGE\tADDRESS")
	for _, s := range a.Services {
		ready := fmt.Sprintf("%d/%d", s.Ready, s.Desired)
		if s.Kind == "CronJob" {
			ready = "-"
		}
		address := first(append(s.URLs, s.Addresses...))
		fmt.Fprintf(t, "  %s\t%s\t%s\t%d\t%s\t%s\t%s\n", s.Name, s.Kind, ready, s.Restarts, duration.HumanDuration(now.Sub(s.Created)), first(s.Images), address)
	}
	t.Flush()
	for _, s := range a.Services {
		if !s.OK && len(s.Problems) == 0 {
			fmt.Fprintf(w, "  … %s: %s\n", s.Name, s.State)
		}
		for _, p := range s.Problems {
			fmt.Fprintf(w, "  ! %s: %s\n", s.Name, p)
		}
	}
}

// first is the first of several, and how many more there are.
func first(all []string) string {
	switch len(all) {
	case 0:
		return "-"
	case 1:
		return all[0]
	}
	return fmt.Sprintf("%s (+%d)", all[0], len(all)-1)
}

func printURLs(w io.Writer, a app.App) {
	var lines []string
	for _, s := range a.Services {
		for _, u := range s.URLs {
			lines = append(lines, fmt.Sprintf("  %s  (%s)", u, s.Name))
		}
	}
	if len(lines) > 0 {
		fmt.Fprintf(w, "\nOpen:\n%s\n", strings.Join(lines, "\n"))
	}
}

// aWorkload names something of an application whose logs can be read, as
// kubectl takes it.
func aWorkload(s app.Status, name, namespace string) string {
	for _, a := range s.Apps {
		if a.Name != name {
			continue
		}
		for _, w := range a.Services {
			if w.Kind == "CronJob" {
				continue
			}
			text := strings.ToLower(w.Kind) + "/" + w.Name
			if a.Namespace != namespace || namespace != "default" {
				text += " -n " + a.Namespace
			}
			return text
		}
	}
	return "POD"
}
