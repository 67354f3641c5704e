package cli

import (
	"encoding/json"
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"
	"k8s.io/client-go/pkg/version"

	"tutti.dev/tutti/internal/api"
)

type versions struct {
	Tutti      string `json:"tutti"`
	Commit     string `json:"commit,omitempty"`
	Kubernetes string `json:"kubernetes"`
	Go         string `json:"go"`
	Platform   string `json:"platform"`
}

func (c *command) version() *cobra.Command {
	return c.withOutput(&cobra.Command{
		Use:   "version [-o json]",
		Short: "Print the versions of tutti and what it is made of",
		Args:  takes(0, 0, ""),
		RunE: func(*cobra.Command, []string) error {
			v := versions{api.Version, api.Commit, version.Get().GitVersion, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH}
			if c.json() {
				return writeJSON(c.out, v)
			}
			fmt.Fprintf(c.out, "tutti       %s\n", v.Tutti)
			if v.Commit != "" {
				fmt.Fprintf(c.out, "commit      %s\n", v.Commit)
			}
			fmt.Fprintf(c.out, "Kubernetes  %s\nGo          %s\nplatform    %s\n", v.Kubernetes, v.Go, v.Platform)
			return nil
		},
	})
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
