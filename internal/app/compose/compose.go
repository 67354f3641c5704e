// Package compose reads compose files and says in Kubernetes' words what they
// mean. The compose-go library parses them (interpolation, .env, profiles,
// extends, include, overrides); this package translates what comes out, purely.
//
// Every key of the specification is in one table (keys.go): it does what it
// does under Docker Compose, does it better, or is refused, with the line it
// stands on and what to do instead. docs/compose.md shows the table. No key is
// dropped in silence.
package compose

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// Project is a compose file with everything that it includes, extends and is
// overridden by.
type Project struct {
	project *types.Project
	source  source
}

// Options say what a person chose beside the file.
type Options struct {
	// Name of the project; "" is COMPOSE_PROJECT_NAME, the file's own name,
	// or the folder's.
	Name string
	// Profiles that are on, beside COMPOSE_PROFILES.
	Profiles []string
	// Environment is what variables are looked up in first, as NAME=value;
	// then comes the .env file.
	Environment []string
}

// Find is the compose file of a folder, "" when it has none.
func Find(dir string) string {
	for _, name := range cli.DefaultFileNames {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && !info.IsDir() {
			return path
		}
	}
	return ""
}

// Load reads the file and what belongs to it: the override file beside it, the
// .env file, and whatever the two name. Every key is checked.
func Load(ctx context.Context, file string, o Options) (*Project, error) {
	files := []string{file}
	if base := filepath.Base(file); slices.Contains(cli.DefaultFileNames, base) {
		for _, name := range cli.DefaultOverrideFileNames {
			if path := filepath.Join(filepath.Dir(file), name); exists(path) {
				files = append(files, path)
				break
			}
		}
	}
	options, err := cli.NewProjectOptions(files,
		cli.WithEnv(o.Environment), cli.WithEnvFiles(), cli.WithDotEnv,
		cli.WithName(o.Name), cli.WithDefaultProfiles(o.Profiles...))
	if err != nil {
		return nil, readable(file, err)
	}
	project, err := options.LoadProject(ctx)
	if err != nil {
		return nil, readable(file, err)
	}
	model, err := options.LoadModel(ctx)
	if err != nil {
		return nil, readable(file, err)
	}
	p := &Project{project: project, source: readSource(project.ComposeFiles)}
	return p, p.checkKeys(model)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// Name is the project's.
func (p *Project) Name() string { return p.project.Name }

// readable is an error of the library in one line that begins with the file.
func readable(file string, err error) error {
	text := strings.Join(strings.Fields(strings.TrimPrefix(err.Error(), file+": ")), " ")
	text = strings.TrimSuffix(text, ": invalid compose project")
	if key, unknown := strings.CutSuffix(text, " false schema"); unknown {
		_, key, _ = strings.Cut(key, ": ")
		text = key + " is no key of compose; take it out, or begin it with x-"
	}
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %s; check the path", file, text)
	}
	return fmt.Errorf("%s: %s", file, text)
}
