package cli

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/app"
	"tutti.dev/tutti/internal/cli/progress"
)

// released finds the application that a command is about.
func (c *command) released(cmd *cobra.Command, name, namespace string) (*app.Cluster, string, error) {
	kubeconfig, own := c.cluster()
	if own {
		if err := c.runs(cmd.Context()); err != nil {
			return nil, "", err
		}
	}
	cluster, _, err := connect(cmd.Context(), kubeconfig)
	if err != nil {
		return nil, "", err
	}
	namespace, err = cluster.Find(cmd.Context(), namespace, name)
	return cluster, namespace, err
}

// ofRelease is the run of a command of APP [N]; n is 0 when it is not given.
func (c *command) ofRelease(namespace *string, run func(ctx context.Context, cluster *app.Cluster, in, name string, n int) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		n := 0
		if len(args) > 1 {
			var err error
			if n, err = number(args[1]); err != nil {
				return err
			}
		}
		cluster, in, err := c.released(cmd, args[0], *namespace)
		if err != nil {
			return err
		}
		return run(cmd.Context(), cluster, in, args[0], n)
	}
}

// number reads the number of a release.
func number(text string) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		return 0, misusef("%q is no number of a release; `tutti history APP` lists them", text)
	}
	return n, nil
}

func (c *command) history() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:               "history APP",
		Short:             "List the releases of an application",
		Long:              `history lists what "tutti up" deployed as an application, when, by whom, from where, and what became of it.`,
		Example:           `  tutti history shop`,
		Args:              takes(1, 1, "an application's name"),
		ValidArgsFunction: c.completeApplication,
		RunE: func(cmd *cobra.Command, args []string) error {
			cluster, in, err := c.released(cmd, args[0], namespace)
			if err != nil {
				return err
			}
			releases, err := cluster.Releases(cmd.Context(), in, args[0])
			if err != nil {
				return err
			}
			if c.json() {
				return writeJSON(c.out, releases)
			}
			printHistory(c.out, releases, time.Now())
			return nil
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where the application is, when several have its name")
	return c.withOutput(cmd)
}

func printHistory(w io.Writer, releases []api.Release, now time.Time) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "RELEASE\tSTATE\tAGE\tBY\tFROM\t")
	for _, r := range releases {
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t\n", r.Number, r.State, short(now.Sub(r.Created)), r.Author, r.Source)
	}
	t.Flush()
	for _, r := range releases {
		if r.Message != "" {
			fmt.Fprintf(w, "! %d: %s\n", r.Number, oneLine(r.Message))
		}
	}
}

func (c *command) diff() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "diff APP [N [M]]",
		Short: "Show how two releases of an application differ",
		Long: `diff shows what release M changed since release N, object by object. M is what is deployed now unless given, and N the
release before M. What is in Secrets is told by its digest.`,
		Example:           "  tutti diff shop\n  tutti diff shop 3 5",
		Args:              takes(1, 3, "an application's name and up to two releases"),
		ValidArgsFunction: c.completeApplication,
		RunE: func(cmd *cobra.Command, args []string) error {
			numbers := [2]int{}
			for i, text := range args[1:] {
				var err error
				if numbers[i], err = number(text); err != nil {
					return err
				}
			}
			cluster, in, err := c.released(cmd, args[0], namespace)
			if err != nil {
				return err
			}
			text, err := cluster.Diff(cmd.Context(), in, args[0], numbers[0], numbers[1])
			if err != nil {
				return err
			}
			_, err = io.WriteString(c.out, text)
			return err
		},
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where the application is, when several have its name")
	return cmd
}

func (c *command) export() *cobra.Command {
	var namespace string
	cmd := &cobra.Command{
		Use:   "export APP [N]",
		Short: "Print an application as Kubernetes YAML that any cluster runs",
		Long: `export prints the objects of what is deployed, or of release N, with what is in their Secrets. Any Kubernetes takes
them: "tutti export shop | kubectl apply -f -".`,
		Example:           "  tutti export shop >shop.yaml",
		Args:              takes(1, 2, "an application's name and perhaps a release"),
		ValidArgsFunction: c.completeApplication,
		RunE: c.ofRelease(&namespace, func(ctx context.Context, cluster *app.Cluster, in, name string, n int) error {
			text, err := cluster.Export(ctx, in, name, n)
			if err != nil {
				return err
			}
			_, err = io.WriteString(c.out, text)
			return err
		}),
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where the application is, when several have its name")
	return cmd
}

func (c *command) rollback() *cobra.Command {
	var (
		namespace string
		timeout   time.Duration
	)
	cmd := &cobra.Command{
		Use:   "rollback APP [N]",
		Short: "Deploy an earlier release again",
		Long: `rollback makes the application what it was as release N, configuration and secrets too, as its next release. Without N it
is the release before the one that is deployed; of a deployment that was interrupted, the one that was deployed.`,
		Example:           "  tutti rollback shop\n  tutti rollback shop 3",
		Args:              takes(1, 2, "an application's name and perhaps a release"),
		ValidArgsFunction: c.completeApplication,
		RunE: c.ofRelease(&namespace, func(ctx context.Context, cluster *app.Cluster, in, name string, n int) error {
			author, err := cluster.Whoami(ctx)
			if err != nil {
				return err
			}
			d := progress.New(c.out)
			defer d.Close()
			outcome, err := cluster.Rollback(ctx, in, name, n, app.Terms{Author: author, Timeout: timeout}, reportTo(d))
			d.Close()
			if err != nil {
				return deployed(name, outcome, err)
			}
			fmt.Fprintf(c.out, "\n%s is ready: release %d.\n", name, outcome.Release.Number)
			return nil
		}),
	}
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where the application is, when several have its name")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait until it is ready")
	return cmd
}

// deployed says what a deployment that failed has left.
func deployed(name string, o app.Outcome, err error) error {
	switch {
	case o.Back != nil:
		return fmt.Errorf("release %d of %s failed, and release %d is back: %w", o.Release.Number, name, o.Back.Number, err)
	case o.Release.State == api.ReleaseFailed:
		return fmt.Errorf("release %d of %s is deployed but does not run: %w", o.Release.Number, name, err)
	}
	return err
}
