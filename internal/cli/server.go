package cli

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/api"
)

// progressFlag names the descriptor that `up` listens on.
const progressFlag = "progress-fd"

func (c *command) server() *cobra.Command {
	var (
		s  api.Settings
		fd int
	)
	cmd := &cobra.Command{
		Use:   "server [flags]",
		Short: "Run this machine's server in the foreground, as a service manager does",
		Long: `server runs control plane and agent in the foreground and logs to standard
error. SIGTERM or SIGINT ends it and leaves workloads running: the next server
takes them over. "tutti stop" ends the workloads too.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(cmd); err != nil {
				return err
			}
			var steps io.WriteCloser
			if fd > 0 {
				syscall.CloseOnExec(fd)
				steps = os.NewFile(uintptr(fd), "progress")
			}
			// The first signal ends it in order; a second kills it.
			ctx, restore := signal.NotifyContext(cmd.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer restore()
			defer context.AfterFunc(ctx, restore)()
			return c.machine.Serve(ctx, c.dir(), s, steps)
		},
	}
	settingsFlags(cmd.Flags(), &s)
	cmd.Flags().IntVar(&fd, progressFlag, 0, "write the steps of the start to this file descriptor")
	_ = cmd.Flags().MarkHidden(progressFlag)
	return cmd
}
