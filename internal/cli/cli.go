// Package cli is what a person types: the commands of tutti. Commands are
// clients, of the Kubernetes API and of a server's control socket; what
// needs the machine itself is handed in by the program.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/go-logr/logr"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/klog/v2"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/systemd"
)

// Exit codes.
const (
	exitFailure = 1
	exitMisuse  = 2
)

// Machine is what the commands need of the machine they run on.
type Machine struct {
	// Serve runs the server until ctx ends, or until it is told to stop. It
	// writes its steps to progress, one JSON api.Step a line, when that is
	// not nil.
	Serve func(ctx context.Context, dir api.DataDir, s api.Settings, progress io.WriteCloser) error
	// Join is Serve as a node of the cluster that the kubeconfig is for.
	Join func(ctx context.Context, dir api.DataDir, s api.Settings, kubeconfig string) error
	// NodeCredentials makes the kubeconfig for another machine's Join.
	NodeCredentials func(dir api.DataDir, node, address string) ([]byte, error)
	// Cleanup removes what a server that is gone has left running, and with
	// purge the data too. It does nothing where there is nothing to do.
	Cleanup func(ctx context.Context, dir api.DataDir, purge bool) error
	// Configure keeps settings for the next start, and says whether any is new.
	Configure func(dir api.DataDir, s api.Settings) (changed bool, err error)
	// Services is the machine's service manager; nil is none.
	Services *systemd.Manager
}

// Main runs the command of the arguments (without the program's name) and
// returns the exit code.
func Main(ctx context.Context, m Machine, args []string, in io.Reader, out, errs io.Writer) int {
	// Kubernetes' packages put a flag of theirs, --version, among every
	// program's; cobra would take it for ours.
	pflag.CommandLine = pflag.NewFlagSet("tutti", pflag.ContinueOnError)
	c := &command{machine: m, in: in, out: out, errs: errs}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	var quiet silent
	if errors.As(err, &quiet) {
		return int(quiet)
	}
	code := exitFailure
	var bad misuse
	if errors.As(err, &bad) || !c.started { // it was refused before it began
		code = exitMisuse
	}
	fmt.Fprintf(errs, "tutti: %s\n", oneLine(err.Error()))
	return code
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// misuse is an error of whoever typed the command.
type misuse struct{ error }

func misusef(format string, args ...any) error { return misuse{fmt.Errorf(format, args...)} }

// silent is an exit code whose reason has been told already.
type silent int

func (s silent) Error() string { return fmt.Sprintf("exit status %d", int(s)) }

// command is what every command has at hand.
type command struct {
	machine   Machine
	in        io.Reader
	out, errs io.Writer

	dataDir string
	output  string
	started bool // the arguments were good and a command runs
}

func (c *command) dir() api.DataDir { return api.DataDir(c.dataDir) }

func (c *command) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "tutti",
		Short: "Runs whole applications: one machine or many, one program",
		Long: `tutti runs whole applications on this machine and keeps them running.
It is a complete Kubernetes in one program: kubectl, Helm and every other
client work with it as they are.`,
		Example: `  tutti up                     start this machine
  tutti up examples/shop       deploy an application and wait until it runs
  tutti status --watch         see what runs, as it changes
  tutti kubectl get pods       any kubectl command
  tutti down shop              remove the application
  tutti stop                   stop this machine and keep its data`,
		Version:       api.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noCommand,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			abs, err := filepath.Abs(c.dataDir)
			if err != nil {
				return err
			}
			c.dataDir = abs
			c.started = true
			if cmd.Name() != "kubectl" && cmd.Name() != "server" && cmd.Name() != "agent" { // they have their own ways
				interruptible(cmd)
				klog.SetLogger(logr.Discard()) // the client library's; errors reach us as errors
			}
			return nil
		},
	}
	def := os.Getenv(api.EnvDataDir)
	if def == "" {
		def = api.DefaultDataDir
	}
	root.PersistentFlags().StringVar(&c.dataDir, "data-dir", def, "where this machine keeps everything")
	// The default shown is the built-in one, whatever the environment says.
	root.PersistentFlags().Lookup("data-dir").DefValue = api.DefaultDataDir
	root.Flags().Bool("version", false, "print the version")
	root.SetVersionTemplate("tutti {{.Version}}\n")
	root.AddGroup(
		&cobra.Group{ID: "apps", Title: "Applications:"},
		&cobra.Group{ID: "machine", Title: "This machine:"},
		&cobra.Group{ID: "kube", Title: "Kubernetes:"},
	)
	root.SetHelpCommandGroupID("")
	add := func(group string, cmds ...*cobra.Command) {
		for _, cmd := range cmds {
			cmd.GroupID = group
			root.AddCommand(cmd)
		}
	}
	add("apps", c.up(), c.down(), c.status(), c.history(), c.diff(), c.rollback(), c.export(), c.image(), c.imports())
	add("machine", c.stop(), c.install(), c.uninstall(), c.server(), c.agent(), c.node())
	add("kube", c.kubectl(), c.kubeconfig())
	add("", c.version())
	setHelp(root)
	return root
}

// interruptible ends a command's context at the first Ctrl-C, so that it can
// leave things in order; the second kills it.
func interruptible(cmd *cobra.Command) {
	ctx, restore := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, restore)
	cmd.SetContext(ctx)
}

// noCommand refuses a word that is no command, and says which was meant.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.SuggestionsMinimumDistance <= 0 {
		cmd.SuggestionsMinimumDistance = 2
	}
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return misusef("%s has no command %q; did you mean `%s %s`?", cmd.CommandPath(), args[0], cmd.CommandPath(), near[0])
	}
	return misusef("%s has no command %q; `%s --help` lists them", cmd.CommandPath(), args[0], cmd.CommandPath())
}

// takes refuses a wrong number of arguments; usage says what is expected.
func takes(least, most int, usage string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) < least:
			return misusef("%s needs %s; see `%s --help`", cmd.CommandPath(), usage, cmd.CommandPath())
		case most >= 0 && len(args) > most && most == 0:
			return misusef("%s takes no arguments, but got %q; see `%s --help`", cmd.CommandPath(), args[0], cmd.CommandPath())
		case most >= 0 && len(args) > most:
			return misusef("%s takes %s, but also got %q; see `%s --help`", cmd.CommandPath(), usage, args[most], cmd.CommandPath())
		}
		return nil
	}
}

// withOutput gives a command that has something to read its -o.
func (c *command) withOutput(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVarP(&c.output, "output", "o", "", "json for programs; text when not given")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"json"}, cobra.ShellCompDirectiveNoFileComp))
	run := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if c.output != "" && c.output != "json" {
			return misusef("unknown output format %q; the choice is json, or nothing for text", c.output)
		}
		return run(cmd, args)
	}
	return cmd
}

func (c *command) json() bool { return c.output == "json" }

// needRoot is for what touches the machine.
func needRoot(cmd *cobra.Command) error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%s needs root, to make containers and networks; run `sudo %s`", cmd.CommandPath(), cmd.CommandPath())
	}
	return nil
}
