package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"k8s.io/cli-runtime/pkg/genericclioptions"
	"k8s.io/cli-runtime/pkg/genericiooptions"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // for clusters elsewhere
	componentcli "k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	kubectl "k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"
)

const (
	envKubeconfig = "KUBECONFIG"
	envCache      = "KUBECACHEDIR"
)

func (c *command) kubectl() *cobra.Command {
	return &cobra.Command{
		Use:   "kubectl COMMAND…",
		Short: "Run any kubectl command against this cluster",
		Long: `kubectl is the whole of kubectl, built in. It works on this machine's cluster
unless KUBECONFIG or --kubeconfig says otherwise.`,
		Example: `  tutti kubectl get pods -A
  tutti kubectl logs -f deploy/web
  tutti kubectl exec -it deploy/web -- sh`,
		DisableFlagParsing: true, // they are kubectl's
		ValidArgsFunction:  c.completeKubectl,
		RunE: func(cmd *cobra.Command, args []string) error {
			args, dir, err := takeDataDir(args, c.dataDir)
			if err != nil {
				return err
			}
			c.dataDir = dir
			if err := c.chooseCluster(args); err != nil {
				return err
			}
			runKubectl(args)
			return nil
		},
	}
}

// takeDataDir takes our own flag from among kubectl's.
func takeDataDir(args []string, dir string) ([]string, string, error) {
	var rest []string
	for i := 0; i < len(args); i++ {
		value, assigned := strings.CutPrefix(args[i], "--data-dir=")
		switch {
		case args[i] == "--":
			return append(rest, args[i:]...), dir, nil
		case assigned:
			dir = value
		case args[i] == "--data-dir" && i+1 == len(args):
			return nil, "", misusef("--data-dir needs a directory; give one after it")
		case args[i] == "--data-dir":
			i++
			dir = args[i]
		default:
			rest = append(rest, args[i])
		}
	}
	return rest, dir, nil
}

// offline are kubectl's commands that need no cluster.
var offline = []string{"help", "completion", "__complete", "__completeNoDesc", "options", "kustomize", "plugin", "config"}

// chooseCluster points kubectl at this machine unless something else is asked
// for.
func (c *command) chooseCluster(args []string) error {
	if os.Getenv(envKubeconfig) != "" {
		return nil
	}
	for _, a := range args {
		if a == "--kubeconfig" || strings.HasPrefix(a, "--kubeconfig=") || a == "--server" || strings.HasPrefix(a, "--server=") || a == "-s" {
			return nil
		}
	}
	file := c.dir().Kubeconfig()
	needless := len(args) == 0 || slices.Contains(offline, args[0]) || slices.Contains(args, "--help") || slices.Contains(args, "-h") ||
		args[0] == "version" && slices.Contains(args, "--client")
	err := readable(file)
	if err != nil && !needless {
		return err
	}
	// What kubectl remembers of this machine goes with it.
	if err == nil && os.Getenv(envCache) == "" {
		if err := os.Setenv(envCache, filepath.Join(c.dataDir, "kubectl")); err != nil {
			return err
		}
	}
	return os.Setenv(envKubeconfig, file)
}

// readable says in a person's words why a kubeconfig of ours cannot be used.
func readable(file string) error {
	f, err := os.Open(file)
	switch {
	case err == nil:
		return f.Close()
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("this machine has no cluster yet (%s is not there); start it with `tutti up`", file)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%s is for root only; use sudo, or set KUBECONFIG to a file of yours", file)
	}
	return err
}

// runKubectl hands over to kubectl, which ends the process itself when it
// fails, with its own exit codes.
func runKubectl(args []string) {
	args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(kubectl.GetLogVerbosity(args)) // as kubectl's own main does
	cmd := newKubectl(args)
	if err := componentcli.RunNoErrOutput(cmd); err != nil {
		util.CheckErr(err)
	}
}

func newKubectl(args []string) *cobra.Command {
	streams := genericiooptions.IOStreams{In: os.Stdin, Out: os.Stdout, ErrOut: os.Stderr}
	cmd := kubectl.NewKubectlCommand(kubectl.KubectlOptions{
		Arguments: args,
		ConfigFlags: genericclioptions.NewConfigFlags(true).WithDeprecatedPasswordFlag().
			WithDiscoveryBurst(300).WithDiscoveryQPS(50).WithWarningPrinter(streams),
		IOStreams: streams,
	})
	if cmd.Annotations == nil {
		cmd.Annotations = map[string]string{}
	}
	cmd.Annotations[cobra.CommandDisplayNameAnnotation] = "tutti kubectl"
	cmd.SetArgs(args[1:])
	return cmd
}

func (c *command) kubeconfig() *cobra.Command {
	return &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print the path of the administrator's kubeconfig",
		Example: `  export KUBECONFIG=$(tutti kubeconfig)
  helm install …`,
		Args: takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error {
			file := c.dir().Kubeconfig()
			if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
				return readable(file)
			}
			fmt.Fprintln(c.out, file)
			return nil
		},
	}
}

// cluster is the kubeconfig to work with, and whether it is this machine's.
func (c *command) cluster() (kubeconfig string, own bool) {
	file := c.dir().Kubeconfig()
	if env := os.Getenv(envKubeconfig); env != "" && env != file {
		return env, false
	}
	return file, true
}

// completeKubectl asks kubectl itself.
func (c *command) completeKubectl(_ *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	args, dir, err := takeDataDir(args, c.dataDir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	c.dataDir = dir
	ask := append([]string{cobra.ShellCompRequestCmd}, append(args, toComplete)...)
	if err := c.chooseCluster(ask); err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	cmd := newKubectl(append([]string{"kubectl"}, ask...))
	var answer bytes.Buffer
	cmd.SetOut(&answer)
	cmd.SetErr(io.Discard)
	if cmd.Execute() != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	lines := strings.Split(strings.TrimSpace(answer.String()), "\n")
	last := len(lines) - 1
	directive, err := strconv.Atoi(strings.TrimPrefix(lines[last], ":"))
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return lines[:last], cobra.ShellCompDirective(directive)
}
