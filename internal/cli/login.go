package cli

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/distribution/reference"
	"github.com/spf13/pflag"

	"tutti.dev/tutti/internal/image"
)

// login is how to log in to a registry.
type login struct {
	username string
	stdin    bool
	password string // once it has been read
}

func (l *login) flags(f *pflag.FlagSet) {
	f.StringVarP(&l.username, "username", "u", "", "user at the registry; without it docker's config.json is asked")
	f.BoolVar(&l.stdin, "password-stdin", false, "read the password, or a token, from standard input")
}

// auths are the credentials for an image's registry: those of the flags, or
// else what docker has kept. There may be none.
func (c *command) auths(l *login, name string) ([]image.Auth, error) {
	if l.username != "" || l.stdin {
		if !l.stdin {
			return nil, misusef("--username needs a password; give it to standard input with --password-stdin")
		}
		if l.password == "" {
			text, err := io.ReadAll(io.LimitReader(c.in, 1<<20))
			if err != nil {
				return nil, fmt.Errorf("read the password: %w", err)
			}
			if l.password = strings.TrimRight(string(text), "\r\n"); l.password == "" {
				return nil, misusef("the password on standard input is empty; check what is piped in")
			}
		}
		user := l.username
		if user == "" {
			user = "token"
		}
		return []image.Auth{{Username: user, Password: l.password}}, nil
	}
	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return nil, nil // the server says what is wrong with it
	}
	return dockerAuths(reference.Domain(named))
}

// dockerAuths reads what `docker login` has written. Passwords that it has
// given to a helper program are not found.
func dockerAuths(registry string) ([]image.Auth, error) {
	dir := os.Getenv("DOCKER_CONFIG")
	if dir == "" {
		home, err := os.UserHomeDir()
		if err != nil {
			return nil, nil // nor has docker
		}
		dir = filepath.Join(home, ".docker")
	}
	path := filepath.Join(dir, "config.json")
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read passwords of registries: %w", err)
	}
	var config struct {
		Auths map[string]struct {
			Auth          string `json:"auth"`
			Username      string `json:"username"`
			Password      string `json:"password"`
			IdentityToken string `json:"identitytoken"`
			RegistryToken string `json:"registrytoken"`
		} `json:"auths"`
	}
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, fmt.Errorf("%s is not docker's: %w; repair or remove it", path, err)
	}
	keys := []string{registry, "https://" + registry, "http://" + registry}
	if registry == "docker.io" {
		keys = append(keys, "https://index.docker.io/v1/")
	}
	for _, key := range keys {
		found, ok := config.Auths[key]
		if !ok {
			continue
		}
		auth := image.Auth{Username: found.Username, Password: found.Password, IdentityToken: found.IdentityToken, RegistryToken: found.RegistryToken}
		if plain, err := base64.StdEncoding.DecodeString(found.Auth); err == nil && len(plain) > 0 {
			auth.Username, auth.Password, _ = strings.Cut(string(plain), ":")
		}
		if auth != (image.Auth{}) {
			return []image.Auth{auth}, nil
		}
	}
	return nil, nil
}
