package cli

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"tutti.dev/tutti/internal/importer"
	"tutti.dev/tutti/internal/importer/process"
	"tutti.dev/tutti/internal/importer/unit"
)

func (c *command) imports() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import",
		Short: "Write manifests for what runs here without tutti",
		Long: `import writes Kubernetes manifests for what systemd runs, or for a process, as
pods that are processes of this machine (runtimeClassName: process). It starts
and stops nothing. What has no equivalent is listed, on standard error and in
the manifest's comments.`,
		Example: `  tutti import unit nginx.service --port 80 >nginx.yaml
  tutti import process 1234 >legacy.yaml`,
		Args: noCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.importUnit(), c.importProcess())
	return cmd
}

func (c *command) importUnit() *cobra.Command {
	var ports []string
	cmd := &cobra.Command{
		Use:   "unit UNIT…",
		Short: "Write manifests for services of systemd",
		Long: `unit reads services of systemd, each a file or the name of one that systemd
knows, with their drop-ins, and writes manifests: a Deployment, for oneshot a
Job, with Global of [X-Fleet] a DaemonSet, and a Service for the ports named.
Users, files of variables and directories are looked up on this machine.`,
		Example: `  tutti import unit nginx.service --port 80
  tutti import unit ./billing.service
  tutti import unit postgresql@15-main --port 5432 >postgresql.yaml
  tutti import unit redis-server nginx --port redis-server=6379 --port nginx=80`,
		Args: takes(1, -1, "a unit's file or name"),
		RunE: func(cmd *cobra.Command, args []string) error {
			listens, err := portsOf(args, ports)
			if err != nil {
				return err
			}
			dir, err := os.Getwd()
			if err != nil {
				return err
			}
			root := os.DirFS("/")
			var all []imported
			for _, arg := range args {
				u, err := unit.Load(root, dir, arg)
				if err != nil {
					return err
				}
				m, err := unit.Translate(root, u, listens[arg])
				if err != nil {
					return err
				}
				all = append(all, imported{u.Name, m})
			}
			return c.write(all)
		},
	}
	cmd.Flags().StringArrayVar(&ports, "port", nil, "port that the program listens on, as 80, 53/udp or UNIT=80; may be repeated")
	return cmd
}

// portsOf says which unit listens on what.
func portsOf(units, ports []string) (map[string][]importer.Port, error) {
	all := map[string][]importer.Port{}
	for _, text := range ports {
		unit, number, named := strings.Cut(text, "=")
		of := ""
		for _, u := range units {
			if !named && len(units) == 1 || named && (u == unit || strings.TrimSuffix(path.Base(u), ".service") == strings.TrimSuffix(unit, ".service")) {
				of = u
			}
		}
		switch {
		case !named && of == "":
			return nil, misusef("--port %s is of one of %d units; say of which, as in --port %s=%s", text, len(units), path.Base(units[0]), text)
		case of == "":
			return nil, misusef("--port %s is of a unit that is not imported; name one of those that are", text)
		case !named:
			number = text
		}
		p, err := importer.ParsePort(number)
		if err != nil {
			return nil, misuse{fmt.Errorf("--port: %w", err)}
		}
		if !slices.Contains(all[of], p) {
			all[of] = append(all[of], p)
		}
	}
	return all, nil
}

func (c *command) importProcess() *cobra.Command {
	return &cobra.Command{
		Use:   "process PID",
		Short: "Write a manifest for a process that runs",
		Long: `process looks at a process of this machine and writes a manifest that would start
the like of it: its command, user, environment, limits, the ports it listens on
and the files it writes to. What it uses besides is in the comments: the first
step on the way to a container.`,
		Example: `  tutti import process 1234 >legacy.yaml
  sudo tutti import process $(pgrep -o billing)`,
		Args: takes(1, 1, "the number of a process"),
		RunE: func(cmd *cobra.Command, args []string) error {
			pid, err := strconv.Atoi(args[0])
			if err != nil || pid < 1 {
				return misusef("%q is no number of a process; `pgrep NAME` finds it", args[0])
			}
			s, err := process.Look(pid)
			if err != nil {
				return err
			}
			m := process.Translate(s)
			return c.write([]imported{{"process " + args[0], m}})
		},
	}
}

type imported struct {
	from string
	importer.Manifest
}

// write writes manifests, and tells of what they do not say.
func (c *command) write(all []imported) error {
	var out bytes.Buffer
	for i, m := range all {
		if i > 0 {
			out.WriteString("---\n")
		}
		if err := m.Write(&out); err != nil {
			return fmt.Errorf("write the manifest of %s: %w", m.from, err)
		}
	}
	for _, m := range all {
		for _, n := range m.Notes {
			fmt.Fprintf(c.errs, "%s: %s\n", m.from, n)
		}
	}
	_, err := c.out.Write(out.Bytes())
	return err
}
