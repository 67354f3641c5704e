package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/distribution/reference"
	units "github.com/docker/go-units"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/duration"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli/progress"
	"tutti.dev/tutti/internal/image"
)

func (c *command) image() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "image",
		Short: "Bring images to this machine, list and remove them",
		Example: `  docker save shop-web:1 | tutti image load -
  tutti image import rootfs.tar debian:12
  tutti image pull docker.io/library/nginx:latest
  tutti image push web:1 shop/web:1
  tutti image ls`,
		Args: noCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.imageLoad(), c.imageImport(), c.imagePull(), c.imagePush(), c.imageList(), c.imageRemove(), c.imageCollect())
	return cmd
}

func (c *command) images() *image.Client {
	return &image.Client{HTTP: c.control().http, Base: controlBase}
}

// withImages makes sure that a server is there before a command needs it.
func (c *command) withImages(run func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := c.runs(cmd.Context()); err != nil {
			return err
		}
		return run(cmd, args)
	}
}

// shown is a context whose work on a subject is shown, and what to call with
// how it ended.
func (c *command) shown(ctx context.Context, subject string) (context.Context, func(error)) {
	d := progress.New(c.errs)
	if !d.Redraws() { // ten lines a second help nobody
		return ctx, func(error) {}
	}
	d.Update(subject, progress.Working, "")
	ctx = image.WithProgress(ctx, func(p image.Progress) {
		text := units.HumanSize(float64(p.Bytes))
		if p.TotalBytes > 0 {
			text += " of " + units.HumanSize(float64(p.TotalBytes))
		}
		if p.TotalLayers > 0 {
			text += fmt.Sprintf(", %d of %d layers unpacked", p.Layers, p.TotalLayers)
		}
		d.Update(subject, progress.Working, text)
	})
	return ctx, func(err error) {
		if err == nil {
			d.Update(subject, progress.Done, "done")
		}
		d.Close()
	}
}

// open opens an archive; "-" is standard input.
func (c *command) open(path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(c.in), nil
	}
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s does not exist; check the path", path)
	}
	return f, err
}

func (c *command) imageLoad() *cobra.Command {
	return &cobra.Command{
		Use:   "load FILE…",
		Short: "Take in the images of an archive made by docker save or of OCI layout",
		Example: `  tutti image load shop.tar
  docker save shop-web:1 | tutti image load -`,
		Args: takes(1, -1, "an archive's name, or - for standard input"),
		RunE: c.withImages(func(cmd *cobra.Command, args []string) error {
			for _, path := range args {
				f, err := c.open(path)
				if err != nil {
					return err
				}
				ctx, end := c.shown(cmd.Context(), "load "+path)
				all, err := c.images().Load(ctx, f)
				end(err)
				f.Close()
				if err != nil {
					return fmt.Errorf("load %s: %w", path, err)
				}
				for _, i := range all {
					fmt.Fprintln(c.out, i.Name)
				}
			}
			return nil
		}),
	}
}

func (c *command) imageImport() *cobra.Command {
	var cfg image.Config
	cmd := &cobra.Command{
		Use:   "import FILE NAME",
		Short: "Make an image of a root file system in a tar archive",
		Example: `  debootstrap --variant=minbase bookworm root && tar -C root -c . | tutti image import - debian:12
  tutti image import web.tar web:1 --entrypoint /web --user 1000`,
		Args: takes(2, 2, "an archive's name, or - for standard input, and the image's name"),
		RunE: c.withImages(func(cmd *cobra.Command, args []string) error {
			f, err := c.open(args[0])
			if err != nil {
				return err
			}
			defer f.Close()
			ctx, end := c.shown(cmd.Context(), "import "+args[1])
			i, err := c.images().Import(ctx, args[1], f, cfg)
			end(err)
			if err != nil {
				return fmt.Errorf("import %s: %w", args[0], err)
			}
			fmt.Fprintln(c.out, i.Name)
			return nil
		}),
	}
	cmd.Flags().StringArrayVar(&cfg.Entrypoint, "entrypoint", nil, "program to run; once for each argument")
	cmd.Flags().StringArrayVar(&cfg.Cmd, "cmd", nil, "arguments that a pod may replace; once for each")
	cmd.Flags().StringArrayVar(&cfg.Env, "env", nil, "NAME=value; may be repeated")
	cmd.Flags().StringVar(&cfg.User, "user", "", "user[:group] to run as")
	cmd.Flags().StringVar(&cfg.WorkingDir, "workdir", "", "directory to run in")
	return cmd
}

func (c *command) imagePull() *cobra.Command {
	var login login
	cmd := &cobra.Command{
		Use:     "pull NAME…",
		Short:   "Fetch images from their registries",
		Example: "  tutti image pull nginx",
		Args:    takes(1, -1, "an image's name"),
		RunE: c.withImages(func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				auths, err := c.auths(&login, name)
				if err != nil {
					return err
				}
				ctx, end := c.shown(cmd.Context(), "pull "+name)
				i, err := c.images().Pull(ctx, name, auths)
				end(err)
				if err != nil {
					return err
				}
				fmt.Fprintf(c.out, "%s@%s\n", i.Name, i.Digest)
			}
			return nil
		}),
	}
	login.flags(cmd.Flags())
	return cmd
}

func (c *command) imagePush() *cobra.Command {
	var (
		login     login
		namespace string
	)
	cmd := &cobra.Command{
		Use:   "push NAME [REGISTRY/][NAMESPACE/]NAME",
		Short: "Send an image of this machine to a registry",
		Long: `push sends an image of this machine to a registry, under its own name or another
one. A name without a registry is one of the cluster's own registry, to which
root needs no password. It prints the name by which pods can use the image.`,
		Example: `  tutti image push web:1                       for pods of the namespace default
  tutti image push web:1 shop/web:1            for pods of the namespace shop
  tutti image push web:1 registry.example.com/shop/web:1`,
		Args:              takes(1, 2, "an image's name, and what to call it if otherwise"),
		ValidArgsFunction: c.completeImages,
		RunE: c.withImages(func(cmd *cobra.Command, args []string) error {
			to := args[len(args)-1]
			registry := to
			if named, err := reference.ParseDockerRef(to); err == nil && reference.Domain(named) == "docker.io" && !strings.HasPrefix(to, "docker.io/") {
				registry = "" // the cluster's own, which asks root for nothing
			}
			auths, err := c.auths(&login, registry)
			if err != nil {
				return err
			}
			ctx, end := c.shown(cmd.Context(), "push "+args[0])
			where, digest, err := c.images().Push(ctx, args[0], to, namespace, auths)
			end(err)
			if err != nil {
				return err
			}
			fmt.Fprintf(c.out, "%s@%s\n", where, digest)
			return nil
		}),
	}
	login.flags(cmd.Flags())
	cmd.Flags().StringVarP(&namespace, "namespace", "n", "default", "for a name that has none, in the cluster's own registry")
	return cmd
}

func (c *command) imageCollect() *cobra.Command {
	var untagged, mirrors bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what no image needs, here and in the cluster's own registry",
		Long: `gc frees what was left behind on this machine by downloads that failed, and in
the cluster's own registry by images that were removed. It waits until nobody
has pushed to the registry for a minute.`,
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: c.withImages(func(cmd *cobra.Command, _ []string) error {
			if err := c.images().Collect(cmd.Context()); err != nil {
				return err
			}
			body, err := c.control().ask(cmd.Context(), http.MethodPost, fmt.Sprintf("%s?untagged=%t&mirrors=%t", api.PathCollect, untagged, mirrors))
			if err != nil {
				return err
			}
			defer body.Close()
			var done api.Collected
			if err := json.NewDecoder(body).Decode(&done); err != nil {
				return fmt.Errorf("read the server's answer: %w", err)
			}
			fmt.Fprintf(c.out, "the registry is smaller by %s\n", units.HumanSize(float64(done.Freed)))
			return nil
		}),
	}
	cmd.Flags().BoolVar(&untagged, "untagged", false, "also remove images from the registry that have no tag; who pulls by digest may miss them")
	cmd.Flags().BoolVar(&mirrors, "mirrors", false, "also remove everything that was fetched from other registries (see tutti up --mirrors)")
	return cmd
}

func (c *command) imageList() *cobra.Command {
	cmd := c.withOutput(&cobra.Command{
		Use:               "ls [-o json]",
		Aliases:           []string{"list"},
		Short:             "List the images of this machine",
		Args:              takes(0, 0, ""),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: c.withImages(func(cmd *cobra.Command, _ []string) error {
			all, err := c.images().List(cmd.Context())
			if err != nil {
				return err
			}
			if c.json() {
				if all == nil {
					all = []image.Image{}
				}
				return writeJSON(c.out, all)
			}
			t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tID\tSIZE\tAGE")
			for _, i := range all {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", i.Name, shortID(i.ID), units.HumanSize(float64(i.Size)), duration.HumanDuration(time.Since(i.Time)))
			}
			return t.Flush()
		}),
	})
	return cmd
}

// shortID is a digest as people compare them.
func shortID(id string) string {
	if len(id) > len("sha256:")+12 {
		return id[len("sha256:") : len("sha256:")+12]
	}
	return id
}

func (c *command) imageRemove() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:               "rm NAME…",
		Aliases:           []string{"remove"},
		Short:             "Remove images",
		Args:              takes(1, -1, "an image's name"),
		ValidArgsFunction: c.completeImages,
		RunE: c.withImages(func(cmd *cobra.Command, args []string) error {
			for _, name := range args {
				if err := c.images().Remove(cmd.Context(), name, force); err != nil {
					return err
				}
				fmt.Fprintf(c.out, "%s is removed\n", name)
			}
			return nil
		}),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "also when it is in use: what runs keeps its files until it ends")
	return cmd
}

func (c *command) completeImages(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	all, err := c.images().List(cmd.Context())
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, i := range all {
		names = append(names, i.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
