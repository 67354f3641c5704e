package unit

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"tutti.dev/tutti/internal/importer"
)

// start runs a container's command, of a program that is a script.
func start(t *testing.T, l launch, script string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(file, []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	command, args := l.command("unit", command{words: []word{{{text: file}}, {{text: "an argument"}}}, ignore: l.ignore})
	all := append(command, args...)
	for i := range all { // as Kubernetes does
		all[i] = strings.ReplaceAll(all[i], "$$", "$")
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(t.Context(), all[0], all[1:]...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, &out
}

func code(t *testing.T, cmd *exec.Cmd) int {
	t.Helper()
	ended := time.AfterFunc(time.Minute, func() { cmd.Process.Kill() })
	defer ended.Stop()
	cmd.Wait()
	return cmd.ProcessState.ExitCode()
}

// number waits for the number in a file.
func number(t *testing.T, file string) int {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		text, _ := os.ReadFile(file)
		if n, err := strconv.Atoi(strings.TrimSpace(string(text))); err == nil {
			return n
		}
		if time.Now().After(deadline) {
			t.Fatal(file, "never comes")
		}
	}
}

func TestForking(t *testing.T) {
	file := filepath.Join(t.TempDir(), "daemon.pid")
	daemon := `sleep 0.2; sh -c 'echo $$ >` + file + `.main; printf %s $$ >` + file + `.new; mv ` + file + `.new ` + file + `; exec sleep 1000' >/dev/null 2>&1 &`
	l := launch{signal: "TERM", forking: true, file: file, patience: 30}

	t.Run("ends with its daemon", func(t *testing.T) {
		os.WriteFile(file, []byte("1"), 0o644) // of another time
		cmd, out := start(t, l, daemon)
		main := number(t, file+".main")
		if err := syscall.Kill(main, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if c := code(t, cmd); c != 1 {
			t.Errorf("the daemon was killed, and the exit status is %d: %s", c, out)
		}
		os.Remove(file + ".main")
	})
	t.Run("passes the signal on", func(t *testing.T) {
		l := l
		l.signal = "USR1"
		cmd, out := start(t, l, strings.ReplaceAll(daemon, "exec sleep 1000", `sleep 1000 & trap "kill $!; exit" USR1; wait`))
		main := number(t, file+".main")
		// The shell is ready for the signal when it polls: it has read the file.
		for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			children, _ := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/task/" + strconv.Itoa(cmd.Process.Pid) + "/children")
			name, _ := os.ReadFile("/proc/" + strings.TrimSpace(string(children)) + "/cmdline")
			if string(name) == "sleep\x001\x00" {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("never polls")
			}
		}
		cmd.Process.Signal(syscall.SIGTERM)
		if c := code(t, cmd); c != 0 {
			t.Errorf("stopped, and the exit status is %d: %s", c, out)
		}
		if syscall.Kill(main, 0) == nil {
			t.Error("the daemon still runs")
		}
	})
	t.Run("fails to start", func(t *testing.T) {
		cmd, _ := start(t, l, "exit 3")
		if c := code(t, cmd); c != 3 {
			t.Errorf("exit status %d", c)
		}
	})
	t.Run("never says who it is", func(t *testing.T) {
		l := l
		l.patience, l.ignore = 0, true
		cmd, out := start(t, l, "exit 3")
		if c := code(t, cmd); c != 1 || out.String() != "no "+file+"\n" {
			t.Errorf("exit status %d: %s", c, out)
		}
	})
}

func TestUmask(t *testing.T) {
	cmd, out := start(t, launch{umask: "0027"}, `umask; echo "$1"`)
	if c := code(t, cmd); c != 0 || out.String() != "0027\nan argument\n" {
		t.Errorf("exit status %d: %s", c, out)
	}
}

func TestIgnored(t *testing.T) {
	cmd, _ := start(t, launch{ignore: true}, "exit 3")
	if c := code(t, cmd); c != 0 {
		t.Errorf("exit status %d", c)
	}
}

func TestLiteral(t *testing.T) {
	for text, want := range map[string]string{"a$b": "a$b", "$(a)": "$$(a)", "$$": "$$$$", "$$(a)": "$$$$(a)", "$": "$"} {
		if got := importer.Literal(text); got != want {
			t.Errorf("%s is %s", text, got)
		}
	}
}
