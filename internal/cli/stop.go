package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"strings"
	"syscall"
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
without asking. An installed service stays installed, and the next boot starts
it again.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(cmd); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if err := c.runStop(ctx, purge); err != nil {
				return err
			}
			if c.isService() {
				fmt.Fprintln(c.out, "The next boot starts the service again; `tutti uninstall` removes it.")
			}
			return nil
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
		if err := c.stopService(ctx); err != nil {
			return err
		}
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
	err = c.endServer(ctx, true, d)
	// Nor does the service manager try another start, however that went.
	if serr := c.stopService(ctx); err == nil {
		err = serr
	}
	if err != nil {
		return err
	}
	unlock, err := c.serverGone(ctx)
	if err != nil {
		return err
	}
	defer unlock()
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

// endServer asks a server that runs to end, with its pods or without, and
// shows how it does.
func (c *command) endServer(ctx context.Context, pods bool, d *progress.Display) error {
	steps, err := c.control().ask(ctx, http.MethodPost, fmt.Sprintf("%s?pods=%t", api.PathStop, pods))
	if errors.Is(err, errNotRunning) || errors.Is(err, syscall.ECONNRESET) {
		return nil // or is about to be gone: its lock says when
	}
	if err != nil {
		return err
	}
	defer steps.Close()
	// It ends the stream by ending itself.
	if err := follow(steps, d, "", nil); err != nil && !errors.Is(err, errEnded) {
		return err
	}
	return nil
}

// serverGone returns when no server runs, and sees to it that none starts
// until it is called.
func (c *command) serverGone(ctx context.Context) (unlock func(), err error) {
	unlock, err = hold(ctx, c.dir().Lock())
	if errors.Is(err, fs.ErrNotExist) {
		return func() {}, nil
	}
	if err != nil {
		pid, _ := os.ReadFile(c.dir().Lock())
		return nil, fmt.Errorf("the server (pid %s) does not end; wait with --timeout, or `kill -9 %[1]s` and run this again", strings.TrimSpace(string(pid)))
	}
	return unlock, nil
}
