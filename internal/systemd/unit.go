package systemd

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
)

const (
	// Name of the service.
	Name = "tutti.service"
	// Program is what the service runs: a place that is never a home, never
	// mounted noexec, and whose labels SELinux knows.
	Program = "/usr/local/bin/tutti"
	// File is the unit.
	File = "/etc/systemd/system/" + Name

	// ours begins a unit file that Install wrote.
	ours = "# Written by `tutti install`"

	envDataDir = "TUTTI_DATA_DIR"
)

// unit is the unit file of a server of dir. The settings of the server are not
// in it: they are kept in the data directory.
func unit(dir string) (string, error) {
	d, err := quote(dir)
	if err != nil {
		return "", err
	}
	env, err := quote(envDataDir + "=" + dir)
	if err != nil {
		return "", err
	}
	return ours + `, which writes it anew; ` + "`systemctl edit tutti`" + ` is the place for changes.
[Unit]
Description=tutti, which runs this machine's applications
Wants=network-online.target
After=network-online.target remote-fs.target time-sync.target
RequiresMountsFor=` + d + `
# Whatever keeps it from starting, it is tried again for as long as that lasts.
StartLimitIntervalSec=0

[Service]
Type=notify
Environment=` + env + `
ExecStart=` + Program + ` server
Restart=on-failure
RestartSec=2
# Misuse, such as an unknown flag in a drop-in, does not pass.
RestartPreventExitStatus=2
# It bounds the steps of its start itself.
TimeoutStartSec=infinity
# A stop or restart ends the server, never a workload: those are in control
# groups of their own. When the machine shuts down the server ends them first,
# each with its grace, and asks for the time that takes.
KillMode=process
Delegate=yes
TimeoutStopSec=90
TasksMax=infinity
# The soft limit is what workloads begin with; the server raises its own.
LimitNOFILE=1024:1048576
OOMScoreAdjust=-900

[Install]
WantedBy=multi-user.target
`, nil
}

// quote writes a value as one word of a unit file.
func quote(s string) (string, error) {
	if strings.ContainsFunc(s, unicode.IsControl) {
		return "", fmt.Errorf("%q cannot stand in a unit file; choose another directory with --data-dir", s)
	}
	plain := !strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune(`"'\%`, r) })
	if plain {
		return s, nil
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`).Replace(s) + `"`, nil
}

func unquote(s string) string {
	inner, quoted := strings.CutPrefix(s, `"`)
	if !quoted {
		return s
	}
	return strings.NewReplacer(`\\`, `\`, `\"`, `"`, `%%`, `%`).Replace(strings.TrimSuffix(inner, `"`))
}

// errForeign says that a unit of the name is there and was not written by
// Install.
var errForeign = errors.New("was not written by `tutti install`; remove or rename it first")

// dataDir is the data directory that a unit file was written for.
func dataDir(text string) (string, error) {
	if !strings.HasPrefix(text, ours) {
		return "", errForeign
	}
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "Environment="); ok {
			if dir, ok := strings.CutPrefix(unquote(v), envDataDir+"="); ok {
				return dir, nil
			}
		}
	}
	return "", errors.New("names no data directory; `tutti install` writes it anew")
}
