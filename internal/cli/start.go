package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"

	"github.com/spf13/pflag"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
)

// start starts the server in the background unless one runs already, and
// waits until it is ready. Two at once agree: the second waits for the first.
// A server that runs with other settings starts again with those that are
// asked for; its workloads go on. started says whether it was this call.
func (c *command) start(ctx context.Context, s api.Settings) (started bool, err error) {
	ctl := c.control()
	if st, err := ctl.status(ctx); err == nil && st.Ready {
		if changed, err := c.configure(s); err != nil || !changed {
			return false, err
		}
		if err := c.makeWay(ctx); err != nil {
			return false, err
		}
	}
	made, err := makeDataDir(c.dir())
	if err != nil {
		return false, err
	}
	// Whoever starts a server holds the directory's own lock until the server
	// answers on its socket, so that the next one finds it there.
	release, err := hold(ctx, string(c.dir()))
	if err != nil {
		return false, err
	}
	defer release()
	d := progress.New(c.out)
	defer d.Close()
	if _, err := ctl.status(ctx); err == nil {
		release()
		return false, c.join(ctx, ctl, d)
	} else if !errors.Is(err, errNotRunning) {
		return false, err
	}
	if c.isService() {
		return true, c.startService(ctx, s, d)
	}
	err = c.spawn(ctx, s, d, release)
	if err != nil && made {
		removeUnused(c.dir())
	}
	return true, err
}

// makeWay ends the server, not its workloads.
func (c *command) makeWay(ctx context.Context) error {
	d := progress.New(c.out)
	defer d.Close()
	if err := c.stopService(ctx); err != nil {
		return err
	}
	if err := c.endServer(ctx, false, d); err != nil {
		return err
	}
	unlock, err := c.serverGone(ctx)
	if err == nil {
		unlock()
	}
	return err
}

// join follows a start that someone else began.
func (c *command) join(ctx context.Context, ctl *control, d *progress.Display) error {
	steps, err := ctl.ask(ctx, http.MethodGet, api.PathProgress)
	if err != nil {
		return err
	}
	defer steps.Close()
	return c.why(follow(steps, d, api.StepReady, nil))
}

// why says where to look when a server ended without a word.
func (c *command) why(err error) error {
	if errors.Is(err, errEnded) {
		log := string(c.dir().Log())
		if c.isService() {
			log = "`journalctl -u tutti`"
		}
		return fmt.Errorf("the server ended before it was ready; %s says why", log)
	}
	return err
}

// makeDataDir makes the directory with its log folder; made says that the
// directory was not there before.
func makeDataDir(dir api.DataDir) (made bool, err error) {
	if _, err := dir.Check(); err != nil { // before anything is written into what is not ours
		return false, err
	}
	_, err = os.Stat(string(dir))
	made = errors.Is(err, fs.ErrNotExist)
	if err := os.MkdirAll(string(dir), 0o700); err != nil {
		return false, fmt.Errorf("make the data directory: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(dir.Log()), 0o700); err != nil {
		return made, fmt.Errorf("make the log's directory: %w", err)
	}
	return made, nil
}

// removeUnused takes away a directory that a failed start made: one that the
// server has not come to call its own.
func removeUnused(dir api.DataDir) {
	if _, err := os.Stat(dir.Config()); errors.Is(err, fs.ErrNotExist) {
		os.RemoveAll(string(dir))
	}
}

// spawn runs this program as a server in a session of its own and follows its
// start on a pipe. listening is called, again and again, once the server can be
// asked.
func (c *command) spawn(ctx context.Context, s api.Settings, d *progress.Display, listening func()) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	log, err := os.OpenFile(c.dir().Log(), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("open the server's log: %w", err)
	}
	defer log.Close()
	steps, child, err := os.Pipe()
	if err != nil {
		return err
	}
	defer steps.Close()
	cmd := exec.Command(self, append([]string{"server", "--data-dir", c.dataDir, "--" + progressFlag + "=3"}, arguments(s)...)...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{child} // becomes descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		child.Close()
		return fmt.Errorf("start the server: %w", err)
	}
	child.Close()
	go cmd.Wait() // it is a zombie otherwise when it ends before us

	stop := context.AfterFunc(ctx, func() { steps.Close() })
	defer stop()
	err = follow(steps, d, api.StepReady, func(s api.Step) {
		if s.Name != api.StepChecks { // the socket is there from then on
			listening()
		}
	})
	if ctx.Err() != nil {
		return fmt.Errorf("interrupted; the server goes on starting, `tutti stop` ends it")
	}
	return c.why(err)
}

// agentFlags are those of every machine that runs pods.
func agentFlags(f *pflag.FlagSet, s *api.Settings) {
	f.IntVar(&s.RegistryPort, "registry-port", 0, "port of the image registry, -1 for none (default 5000)")
	f.StringVar(&s.EvictionHard, "eviction-hard", "", "what to keep free before pods are evicted: SIGNAL<QUANTITY,… or none (default memory.available<100Mi,nodefs.available<10%,…)")
	f.StringVar(&s.SystemReserved, "system-reserved", "", "what all pods together leave to the machine: RESOURCE=QUANTITY,… of memory, cpu, pid, ephemeral-storage (default memory=512Mi,pid=1000)")
	f.StringVar(&s.ClusterCIDR, "cluster-cidr", "", "addresses of pods (default 10.42.0.0/16)")
	f.StringVar(&s.ServiceCIDR, "service-cidr", "", "addresses of Services (default 10.43.0.0/16)")
	f.StringVar(&s.UnsafeSysctls, "allowed-unsafe-sysctls", "", "kernel settings that pods may change for themselves beside the safe ones: net.core.somaxconn,kernel.msg*")
}

// settingsFlags are the flags of both `up` and `server`.
func settingsFlags(f *pflag.FlagSet, s *api.Settings) {
	agentFlags(f, s)
	f.StringVar(&s.Address, "address", "", "also let other machines reach the API, at this address of this machine")
	f.IntVar(&s.Port, "port", 0, "port of the API (default 6443)")
	f.StringVar(&s.Mirrors, "mirrors", "", "registries to fetch images of once for all, and keep: HOST[=URL],… such as docker.io, or none")
	f.StringVar(&s.NodeName, "node-name", "", "name of this machine in the cluster (default its host name)")
}

// arguments is settingsFlags the other way.
func arguments(s api.Settings) []string {
	var args []string
	add := func(name, value string) {
		if value != "" {
			args = append(args, "--"+name+"="+value)
		}
	}
	add("address", s.Address)
	if s.Port != 0 {
		add("port", strconv.Itoa(s.Port))
	}
	if s.RegistryPort != 0 {
		add("registry-port", strconv.Itoa(s.RegistryPort))
	}
	add("mirrors", s.Mirrors)
	add("eviction-hard", s.EvictionHard)
	add("system-reserved", s.SystemReserved)
	add("node-name", s.NodeName)
	add("cluster-cidr", s.ClusterCIDR)
	add("service-cidr", s.ServiceCIDR)
	add("allowed-unsafe-sysctls", s.UnsafeSysctls)
	return args
}
