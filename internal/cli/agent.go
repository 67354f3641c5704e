package cli

import (
	"context"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/api"
)

func (c *command) agent() *cobra.Command {
	var (
		s          api.Settings
		kubeconfig string
	)
	cmd := &cobra.Command{
		Use:   "agent --kubeconfig FILE",
		Short: "Run this machine as a node of another's cluster, in the foreground",
		Long: `agent runs the pods of a cluster whose control plane is on another machine, and
logs to standard error. FILE is made there, by "tutti node credentials".
SIGTERM or SIGINT ends it and leaves workloads running: the next agent takes
them over. "tutti stop" ends the workloads too.
Other flags are kept for the next start.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if kubeconfig == "" {
				return misusef("tutti agent needs the credentials of a node; make them on the server with `tutti node credentials` and name the file with --kubeconfig")
			}
			if err := needRoot(cmd); err != nil {
				return err
			}
			ctx, restore := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer restore()
			defer context.AfterFunc(ctx, restore)()
			return c.machine.Join(ctx, c.dir(), s, kubeconfig)
		},
	}
	agentFlags(cmd.Flags(), &s)
	cmd.Flags().StringVar(&kubeconfig, "kubeconfig", "", "credentials of this node")
	return cmd
}

func (c *command) node() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "node COMMAND",
		Short: "Let other machines join this machine's cluster",
		Args:  noCommand,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.nodeCredentials())
	return cmd
}

func (c *command) nodeCredentials() *cobra.Command {
	var address string
	cmd := &cobra.Command{
		Use:   "credentials NAME --address ADDRESS",
		Short: "Print the kubeconfig by which another machine joins as a node",
		Long: `credentials prints a kubeconfig for "tutti agent" on another machine. Its
certificate is that of the node NAME at ADDRESS, for a year, and whoever has it
is that node: keep it as a password is kept. The API must be open to the other
machine (tutti up --address).`,
		Example: `  (umask 77; tutti node credentials n2 --address 192.0.2.20 >n2.kubeconfig)
  scp n2.kubeconfig 192.0.2.20: && ssh 192.0.2.20 tutti agent --kubeconfig n2.kubeconfig`,
		Args:              takes(1, 1, "the node's name"),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if address == "" {
				return misusef("tutti node credentials needs the address of the node; give it with --address")
			}
			if err := needRoot(cmd); err != nil {
				return err
			}
			text, err := c.machine.NodeCredentials(c.dir(), args[0], address)
			if err != nil {
				return err
			}
			_, err = c.out.Write(text)
			return err
		},
	}
	cmd.Flags().StringVar(&address, "address", "", "address at which this machine reaches the node")
	return cmd
}
