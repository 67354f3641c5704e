package cli

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"tutti.dev/tutti/internal/image"
)

func TestAuths(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("DOCKER_CONFIG", dir)
	kept := `{"auths": {"example.com": {"auth": "bWU6cGE6c3M="}, "https://index.docker.io/v1/": {"username": "hub", "password": "p"}, "helped.example.com": {}, "10.41.0.1:5000": {"identitytoken": "t"}}}`
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(kept), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		login login
		in    string
		want  []image.Auth
		fails string
	}{
		{"example.com/a/b:1", login{}, "", []image.Auth{{Username: "me", Password: "pa:ss"}}, ""},
		{"nginx", login{}, "", []image.Auth{{Username: "hub", Password: "p"}}, ""},
		{"10.41.0.1:5000/a/b", login{}, "", []image.Auth{{IdentityToken: "t"}}, ""},
		{"helped.example.com/a", login{}, "", nil, ""},
		{"other.example.com/a", login{}, "", nil, ""},
		{"", login{}, "", nil, ""},
		{"example.com/a/b:1", login{username: "u", stdin: true}, "secret\n", []image.Auth{{Username: "u", Password: "secret"}}, ""},
		{"example.com/a/b:1", login{stdin: true}, "secret", []image.Auth{{Username: "token", Password: "secret"}}, ""},
		{"example.com/a/b:1", login{stdin: true}, "\n", nil, "the password on standard input is empty; check what is piped in"},
		{"example.com/a/b:1", login{username: "u"}, "", nil, "--username needs a password; give it to standard input with --password-stdin"},
	} {
		cmd := &command{in: strings.NewReader(c.in)}
		got, err := cmd.auths(&c.login, c.name)
		if c.fails != "" {
			if err == nil || !strings.Contains(err.Error(), c.fails) {
				t.Errorf("%s %+v: %v, %v", c.name, c.login, got, err)
			}
			continue
		}
		if err != nil || len(got) != len(c.want) || len(got) == 1 && got[0] != c.want[0] {
			t.Errorf("%s: %+v, want %+v: %v", c.name, got, c.want, err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "config.json"), bytes.Repeat([]byte("x"), 9), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (&command{}).auths(&login{}, "example.com/a"); err == nil || err.Error() != filepath.Join(dir, "config.json")+" is not docker's: invalid character 'x' looking for beginning of value; repair or remove it" {
		t.Errorf("of a broken file: %v", err)
	}
}
