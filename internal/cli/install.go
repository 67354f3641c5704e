package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
	"tutti.dev/tutti/internal/systemd"
)

func (c *command) install() *cobra.Command {
	var s api.Settings
	cmd := &cobra.Command{
		Use:   "install [server]",
		Short: "Make the server a service that starts at boot",
		Long: `install copies this program to ` + systemd.Program + `, makes its server a service
of systemd, starts it and has it start at every boot. A server that "tutti up"
started becomes the service; no workload restarts.
Run again it changes what has changed, so a newer tutti upgrades itself with
it. Flags are kept in the data directory, as those of "tutti up" are.`,
		Example: `  tutti install
  tutti install --address 0.0.0.0`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 && args[0] == "agent" {
				return misusef("this version installs servers only; have a unit of your own run `tutti agent --kubeconfig FILE`")
			}
			if len(args) > 0 && args[0] != "server" {
				return misusef("tutti install knows no role %q; leave it out, or say server", args[0])
			}
			return takes(0, 1, "nothing, or server")(cmd, args)
		},
		ValidArgs: []string{"server"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := needRoot(cmd); err != nil {
				return err
			}
			if !c.machine.Services.Runs() {
				return errors.New("systemd does not run this machine; start it with `tutti up`, or have your init run `tutti server`")
			}
			return c.runInstall(cmd.Context(), s)
		},
	}
	settingsFlags(cmd.Flags(), &s)
	return cmd
}

// errElsewhere says that the one service is another directory's.
func errElsewhere(installed string) error {
	return fmt.Errorf("the service is installed for %s; say --data-dir %[1]s, or `tutti uninstall` first", installed)
}

func (c *command) runInstall(ctx context.Context, s api.Settings) error {
	installed, err := c.machine.Services.Installed()
	if err != nil {
		return err
	}
	if installed != "" && installed != c.dataDir {
		return errElsewhere(installed)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	made, err := makeDataDir(c.dir())
	if err != nil {
		return err
	}
	release, err := hold(ctx, c.dataDir)
	if err != nil {
		return err
	}
	defer release()
	began := time.Now()
	d := progress.New(c.out)
	defer d.Close()
	services := c.machine.Services
	told, err := c.configure(s)
	if err == nil {
		d.Update("install", progress.Working, "")
		var changed bool
		changed, err = services.Install(ctx, self, c.dataDir)
		told = told || changed
	}
	if err != nil {
		if made {
			removeUnused(c.dir())
		}
		return err
	}
	d.Update("install", progress.Done, "")
	begin, renewed := services.Start, false
	if told || services.Outdated(ctx) {
		begin, renewed = services.Restart, true
	}
	// A server that was started otherwise hands its workloads over.
	if st, err := c.control().status(ctx); err == nil && st.PID != services.PID(ctx) {
		if err := c.endServer(ctx, false, d); err != nil {
			return err
		}
		unlock, err := c.serverGone(ctx)
		if err != nil {
			return err
		}
		unlock()
	}
	if err := c.await(ctx, d, begin); err != nil {
		return fmt.Errorf("start %s: %w", systemd.Name, err)
	}
	d.Close()
	switch {
	case installed == "":
		fmt.Fprintf(c.out, "Installed: %s, run by %s.\n", systemd.Program, systemd.Name)
		fmt.Fprintf(c.out, "This machine is ready, after %s, and starts at every boot.\n", short(time.Since(began)))
		c.next(
			"tutti up PATH", "deploy an application",
			"tutti status", "see what runs",
			"tutti uninstall", "remove the service, and what it made",
		)
	case renewed:
		fmt.Fprintf(c.out, "Updated: the server started again, after %s, and no workload did.\n", short(time.Since(began)))
	default:
		fmt.Fprintln(c.out, "Nothing to change: the service is installed and runs.")
	}
	return nil
}

func (c *command) uninstall() *cobra.Command {
	var (
		purge, keep bool
		timeout     time.Duration
	)
	cmd := &cobra.Command{
		Use:   "uninstall [--purge | --keep-data]",
		Short: "Remove the service, its program, and what they made",
		Long: `uninstall ends the workloads in order, then the server, and removes the service,
the changes to it by "systemctl edit", ` + systemd.Program + `, and the data
directory. While that has volumes with something in them, or images that were
pushed, you must say which it is: --purge deletes them, --keep-data keeps the
whole directory.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if purge && keep {
				return misusef("--purge deletes the data and --keep-data keeps it; say one of them")
			}
			if err := needRoot(cmd); err != nil {
				return err
			}
			installed, err := c.machine.Services.Installed()
			if err != nil {
				return err
			}
			if installed == "" {
				fmt.Fprintln(c.out, "Nothing to uninstall: tutti is no service of this machine. `tutti stop --purge` removes what `tutti up` made.")
				return nil
			}
			if !c.machine.Services.Runs() {
				return errors.New("systemd does not run this machine; boot it to uninstall its service")
			}
			if cmd.Flags().Changed("data-dir") && c.dataDir != installed {
				return errElsewhere(installed)
			}
			c.dataDir = installed
			if !purge && !keep {
				if held := precious(c.dataDir); held != "" {
					return fmt.Errorf("%s holds %s; `tutti uninstall --purge` deletes it, `tutti uninstall --keep-data` keeps it", c.dataDir, held)
				}
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			if err := c.runStop(ctx, !keep); err != nil {
				return err
			}
			if err := c.machine.Services.Uninstall(ctx); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "Uninstalled: %s and %s are gone.\n", systemd.Name, systemd.Program)
			return nil
		},
	}
	cmd.Flags().BoolVar(&purge, "purge", false, "delete all data too, volumes and pushed images among it")
	cmd.Flags().BoolVar(&keep, "keep-data", false, "keep the data directory")
	cmd.Flags().DurationVar(&timeout, "timeout", 2*time.Minute, "how long to wait")
	return cmd
}

// precious says what a data directory holds that nothing else can bring back,
// "" for nothing.
func precious(dir string) string {
	for _, p := range []struct{ pattern, what string }{
		{"volumes/*/*", "volumes with data"},
		{"registry/docker/registry/v2/repositories/*", "images that were pushed"},
	} {
		if found, _ := filepath.Glob(filepath.Join(dir, p.pattern)); len(found) > 0 {
			return p.what
		}
	}
	return ""
}

// isService says whether this data directory's server is the machine's service.
func (c *command) isService() bool {
	if !c.machine.Services.Runs() {
		return false
	}
	dir, err := c.machine.Services.Installed()
	return err == nil && dir == c.dataDir
}

// startService starts the service and waits until it is ready.
func (c *command) startService(ctx context.Context, s api.Settings, d *progress.Display) error {
	if _, err := c.configure(s); err != nil {
		return err
	}
	return c.await(ctx, d, c.machine.Services.Start)
}

func (c *command) stopService(ctx context.Context) error {
	if !c.isService() {
		return nil
	}
	return c.machine.Services.Stop(ctx)
}

// configure keeps what is asked for, if anything is.
func (c *command) configure(s api.Settings) (changed bool, err error) {
	if s == (api.Settings{}) {
		return false, nil
	}
	return c.machine.Configure(c.dir(), s)
}

// await shows the service's start.
func (c *command) await(ctx context.Context, d *progress.Display, begin func(context.Context) error) error {
	d.Update("service", progress.Working, "")
	began := time.Now()
	if err := begin(ctx); err != nil {
		d.Update("service", progress.Failed, "")
		if ctx.Err() != nil {
			return errors.New("interrupted; the server goes on starting, `tutti stop` ends it")
		}
		return err
	}
	d.Update("service", progress.Done, short(time.Since(began)))
	return nil
}
