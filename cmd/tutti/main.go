// Tutti runs whole applications on one machine or many. What its commands do
// is in internal/cli, what runs a machine in internal/daemon.
package main

import (
	"context"
	"io"
	"os"

	"tutti.dev/tutti/internal/api"
	"tutti.dev/tutti/internal/cli"
	"tutti.dev/tutti/internal/daemon"
	"tutti.dev/tutti/internal/systemd"
)

func main() {
	machine := cli.Machine{
		Serve: func(ctx context.Context, dir api.DataDir, s api.Settings, progress io.WriteCloser) error {
			return daemon.Run(ctx, daemon.Options{Dir: dir, Settings: s, Progress: progress, Log: daemon.Log(os.Stderr)})
		},
		Join: func(ctx context.Context, dir api.DataDir, s api.Settings, kubeconfig string) error {
			return daemon.Run(ctx, daemon.Options{Dir: dir, Settings: s, Kubeconfig: kubeconfig, Log: daemon.Log(os.Stderr)})
		},
		NodeCredentials: daemon.NodeCredentials,
		Cleanup: func(ctx context.Context, dir api.DataDir, purge bool) error {
			return daemon.Cleanup(ctx, dir, purge, daemon.Log(os.Stderr))
		},
		Configure: daemon.Configure,
		Services:  systemd.Machine(),
	}
	os.Exit(cli.Main(context.Background(), machine, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}
