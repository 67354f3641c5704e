package cli

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/app"
	"tutti.dev/tutti/internal/cli/progress"
)

func (c *command) up() *cobra.Command {
	var (
		s               api.Settings
		name, namespace string
		terms           app.Terms
	)
	cmd := &cobra.Command{
		Use:   "up [PATH…]",
		Short: "Start this machine if need be, and deploy what PATH holds",
		Long: `up starts this machine in the background if it is not running, and waits until
it is ready. Then it deploys each PATH (a file, a folder of YAML, or - for
standard input) as an application and waits until that is ready. A folder may
have a compose file; without PATH it is that of this folder. Every object is checked before the first is applied; what was in the application before and
is not now is removed. Each change is a release; when one fails, the release
before it comes back. Running it again is safe.
An application is called as its objects' label app.kubernetes.io/part-of says,
or else as its folder or file.
With KUBECONFIG set to another cluster, PATH is deployed there.`,
		Example: `  tutti up
  tutti up examples/shop
  tutti up web.yaml database/ --namespace shop
  helm template … | tutti up - --name blog`,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 && name != "" {
				return misusef("--name is for one PATH, but there are %d; deploy them one by one", len(args))
			}
			if len(args) == 0 && app.HasCompose(".") {
				args = []string{"."}
			}
			// What is wrong with the files is told before anything starts.
			var apps []app.Application
			for _, path := range args {
				a, err := app.Read(cmd.Context(), path, name, c.in)
				if err != nil {
					return err
				}
				apps = append(apps, a)
			}
			kubeconfig, own := c.cluster()
			if own || len(apps) == 0 {
				if err := needRoot(cmd); err != nil {
					return err
				}
				began := time.Now()
				started, err := c.start(cmd.Context(), s)
				if err != nil {
					return err
				}
				c.greet(started, time.Since(began), len(apps) == 0)
			} else {
				fmt.Fprintf(c.out, "deploying to the cluster of KUBECONFIG=%s\n", kubeconfig)
			}
			for _, a := range apps {
				if err := c.deploy(cmd.Context(), kubeconfig, a, namespace, terms); err != nil {
					return err
				}
			}
			return nil
		},
	}
	settingsFlags(cmd.Flags(), &s)
	cmd.Flags().StringVar(&name, "name", "", "what to call the application")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where objects go that name no namespace")
	cmd.Flags().DurationVar(&terms.Timeout, "timeout", 5*time.Minute, "how long to wait until an application is ready")
	cmd.Flags().BoolVar(&terms.Stay, "no-rollback", false, "leave a release that fails as it is")
	cmd.Flags().BoolVar(&terms.DryRun, "dry-run", false, "have the cluster check everything, and change nothing")
	return cmd
}

// greet says how the machine is, and without anything to deploy what to do
// with it.
func (c *command) greet(started bool, took time.Duration, next bool) {
	if started {
		fmt.Fprintf(c.out, "This machine is ready, after %s.\n", short(took))
	} else if next {
		fmt.Fprintln(c.out, "This machine is running.")
	}
	if next {
		c.next(
			"tutti up PATH", "deploy an application",
			"tutti status", "see what runs",
			"tutti kubectl get nodes", "any kubectl command",
		)
	}
}

// next prints commands to try and what each does.
func (c *command) next(pairs ...string) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		width = max(width, len(pairs[i]))
	}
	data := ""
	if c.dataDir != api.DefaultDataDir && os.Getenv(api.EnvDataDir) != c.dataDir {
		data = " --data-dir " + c.dataDir
		if strings.ContainsAny(c.dataDir, " \t'\"$") {
			data = fmt.Sprintf(" --data-dir %q", c.dataDir)
		}
	}
	fmt.Fprintln(c.out, "\nTry next:")
	for i := 0; i < len(pairs); i += 2 {
		text := c.typed() + strings.TrimPrefix(pairs[i], "tutti") + data
		fmt.Fprintf(c.out, "  %-*s   %s\n", width+len(c.typed())-len("tutti")+len(data), text, pairs[i+1])
	}
}

// typed is how a person calls this program: by the path they gave when a
// shell would not find it by its name.
func (c *command) typed() string {
	if _, err := exec.LookPath("tutti"); err != nil && strings.Contains(os.Args[0], "/") {
		return os.Args[0]
	}
	return "tutti"
}

// connect makes sure that the cluster of a kubeconfig answers.
func connect(ctx context.Context, kubeconfig string) (c *app.Cluster, namespace string, err error) {
	if c, namespace, err = app.Load(kubeconfig); err == nil {
		err = c.Reach(ctx)
	}
	return c, namespace, err
}

// deploy deploys one application, waits for it and tells where it is.
func (c *command) deploy(ctx context.Context, kubeconfig string, a app.Application, namespace string, terms app.Terms) error {
	cluster, current, err := connect(ctx, kubeconfig)
	if err != nil {
		return err
	}
	if namespace == "" {
		namespace = a.Namespace
	}
	if namespace == "" {
		namespace = current
	}
	if terms.Author, err = cluster.Whoami(ctx); err != nil {
		return err
	}
	d := progress.New(c.out)
	defer d.Close()
	outcome, err := cluster.Up(ctx, a, namespace, terms, reportTo(d))
	d.Close()
	if err != nil {
		return deployed(a.Name, outcome, err)
	}
	if terms.DryRun {
		fmt.Fprintf(c.out, "%s can be deployed: the cluster takes all of its %d objects.\n", a.Name, len(a.Objects))
		return nil
	}
	status, err := c.see(ctx, cluster)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.out, "\n%s is ready: release %d.\n\n", a.Name, outcome.Release.Number)
	for _, running := range status.Apps {
		if running.Name == a.Name {
			printApp(c.out, running, time.Now())
			printURLs(c.out, running)
		}
	}
	c.next(
		"tutti status --watch", "see it run, as it changes",
		"tutti kubectl logs -f "+aWorkload(status, a.Name, namespace), "read what it writes",
		"tutti down "+a.Name, "remove it again",
	)
	return nil
}

// reportTo shows what app reports.
func reportTo(d *progress.Display) app.Report {
	states := map[app.State]progress.State{app.Working: progress.Working, app.Done: progress.Done, app.Failed: progress.Failed}
	return func(subject string, s app.State, message string) { d.Update(subject, states[s], message) }
}

func (c *command) down() *cobra.Command {
	var (
		name, namespace string
		volumes         bool
		timeout         time.Duration
	)
	cmd := &cobra.Command{
		Use:   "down APP|PATH",
		Short: "Remove an application; never the machine",
		Long: `down removes everything that "tutti up" deployed for an application and waits
until it is gone. Give its name, or the PATH it was deployed from. Volumes are
kept and named, unless --volumes is given.`,
		Example: `  tutti down shop
  tutti down examples/shop --volumes`,
		Args:              takes(1, 1, "an application's name or the path it came from"),
		ValidArgsFunction: c.completeApplication,
		RunE: func(cmd *cobra.Command, args []string) error {
			appName, err := c.nameOf(cmd.Context(), args[0], name)
			if err != nil {
				return err
			}
			kubeconfig, own := c.cluster()
			if own {
				if err := c.runs(cmd.Context()); err != nil {
					return err
				}
			}
			cluster, _, err := connect(cmd.Context(), kubeconfig)
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			in, err := cluster.Find(ctx, namespace, appName)
			if err != nil {
				return err
			}
			d := progress.New(c.out)
			defer d.Close()
			kept, err := cluster.Remove(ctx, in, appName, volumes, reportTo(d))
			if err != nil {
				return fmt.Errorf("remove %s: %w", appName, err)
			}
			d.Close()
			fmt.Fprintf(c.out, "%s is removed.\n", appName)
			for _, r := range kept {
				fmt.Fprintf(c.out, "Kept: %s", r)
				if r.Namespace != "" {
					fmt.Fprintf(c.out, " in %s", r.Namespace)
				}
				fmt.Fprintln(c.out)
			}
			if len(kept) > 0 {
				fmt.Fprintln(c.out, "`tutti up` finds them again; `tutti kubectl delete` deletes them with what is in them.")
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "what the application of PATH was called")
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "", "where the application is, when several have its name")
	cmd.Flags().BoolVar(&volumes, "volumes", false, "delete its volumes and what is in them too")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "how long to wait until it is gone")
	return cmd
}

// completeApplication offers the applications that are there, and files.
func (c *command) completeApplication(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	klog.SetLogger(logr.Discard())
	kubeconfig, _ := c.cluster()
	cluster, _, err := app.Load(kubeconfig)
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second) // a hand is waiting
	defer cancel()
	names, err := cluster.Names(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return names, cobra.ShellCompDirectiveDefault
}

// nameOf is the application that an argument means: what a path holds, or the
// argument itself.
func (c *command) nameOf(ctx context.Context, arg, name string) (string, error) {
	if name != "" {
		return app.CleanName(name), nil
	}
	if _, err := os.Stat(arg); err == nil || arg == "-" {
		a, err := app.Read(ctx, arg, "", c.in)
		return a.Name, err
	}
	if app.CleanName(arg) != arg {
		return "", misusef("%q is neither a path nor the name of an application; `tutti status` lists those that run", arg)
	}
	return arg, nil
}

// runs is an error when this machine's server does not answer.
func (c *command) runs(ctx context.Context) error {
	_, err := c.control().status(ctx)
	return err
}
