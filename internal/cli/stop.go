package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
)

func (c *command) stop() *cobra.Command {
	var (
		purge   bool
		timeout time.Duration
	)
	cmd := &cobra.Command{
		Use:   "stop [--purge]",
		Short: "Stop this machine and its workloads, and keep the data",
		Long: `stop ends this machine's workloads in order, then its server, and takes its
network away. The data stays, and "tutti up" goes on where it was.
With --purge nothing stays: images, volumes and the cluster itself are deleted
without asking.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(cmd); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			return c.runStop(ctx, purge)
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "delete all data too; asks nothing")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait")
	return cmd
}

func (c *command) runStop(ctx context.Context, purge bool) error {
	dir := c.dir()
	switch _, err := os.Stat(string(dir)); {
	case errors.Is(err, fs.ErrNotExist):
		fmt.Fprintf(c.out, "Nothing to stop: %s does not exist.\n", dir)
		return nil
	case err != nil:
		return fmt.Errorf("look at the data directory: %w", err)
	}
	if _, err := dir.Check(); err != nil {
		return fmt.Errorf("nothing was touched: %w", err)
	}
	// No new server starts meanwhile.
	release, err := hold(ctx, string(dir))
	if err != nil {
		return err
	}
	defer release()
	d := progress.New(c.out)
	defer d.Close()
	steps, err := c.control().ask(ctx, http.MethodPost, api.PathStop+"?pods=true")
	switch {
	case errors.Is(err, errNotRunning):
	case err != nil:
		return err
	default:
		// It ends the stream by ending itself: the lock below tells the truth.
		err := follow(steps, d, "", nil)
		steps.Close()
		if err != nil && !errors.Is(err, errEnded) {
			return err
		}
	}
	locked, err := hold(ctx, dir.Lock())
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		pid, _ := os.ReadFile(dir.Lock())
		return fmt.Errorf("the server (pid %s) does not end; wait with --timeout, or `kill -9 %[1]s` and run this again", strings.TrimSpace(string(pid)))
	default:
		defer locked()
	}
	d.Update("cleanup", progress.Working, "")
	if err := c.machine.Cleanup(ctx, dir, purge); err != nil {
		return err
	}
	d.Update("cleanup", progress.Done, "")
	d.Close()
	if purge {
		fmt.Fprintf(c.out, "Stopped, and %s is gone.\n", dir)
	} else {
		fmt.Fprintf(c.out, "Stopped. The data is kept in %s; `tutti up` goes on with it.\n", dir)
	}
	return nil
}
