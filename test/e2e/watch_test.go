package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// terminal is a real one (a pty) and what a person would see on it.
type terminal struct {
	t      *testing.T
	master *os.File
	slave  *os.File
	before unix.Termios

	mu    sync.Mutex
	rest  string // a sequence that is not whole yet
	lines []string
	row   int
	on    map[string]bool // modes: 1049 is the other screen, 25 the cursor
}

func newTerminal(t *testing.T, width, height uint16) *terminal {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal("open a terminal: ", err)
		}
	}
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	t.Cleanup(func() { master.Close() })
	must(unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	must(err)
	slave, err := os.OpenFile(fmt.Sprint("/dev/pts/", number), os.O_RDWR|unix.O_NOCTTY, 0)
	must(err)
	t.Cleanup(func() { slave.Close() })
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	must(err)
	x := &terminal{t: t, master: master, slave: slave, before: *before, on: map[string]bool{"25": true}}
	x.resize(width, height)
	go func() {
		for b := make([]byte, 4096); ; {
			n, err := master.Read(b)
			x.show(string(b[:n]))
			if err != nil {
				return
			}
		}
	}()
	return x
}

func (x *terminal) resize(width, height uint16) {
	if err := unix.IoctlSetWinsize(int(x.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: height, Col: width}); err != nil {
		x.t.Fatal("resize the terminal: ", err)
	}
}

func (x *terminal) press(keys string) {
	if _, err := x.master.WriteString(keys); err != nil {
		x.t.Fatal(err)
	}
}

var sequence = regexp.MustCompile(`^\x1b\[(\??)([0-9;]*)([A-Za-z])`)

// show does as much of what a terminal does as tutti asks of one.
func (x *terminal) show(text string) {
	x.mu.Lock()
	defer x.mu.Unlock()
	text = x.rest + text
	for text != "" {
		if text[0] != '\x1b' {
			r, n := utf8.DecodeRuneInString(text)
			if !utf8.FullRuneInString(text) {
				break
			}
			for len(x.lines) <= x.row {
				x.lines = append(x.lines, "")
			}
			x.lines[x.row] += string(r)
			text = text[n:]
			continue
		}
		m := sequence.FindStringSubmatch(text)
		if m == nil {
			break
		}
		text = text[len(m[0]):]
		switch m[3] {
		case "h", "l":
			x.on[m[2]] = m[3] == "h"
		case "H": // only ever to the beginning of a line, to write it anew
			x.row = 0
			if _, err := fmt.Sscan(m[2], &x.row); err == nil {
				x.row--
			}
			if x.row < len(x.lines) {
				x.lines[x.row] = ""
			}
		case "J":
			x.lines = x.lines[:min(x.row, len(x.lines))]
		}
	}
	x.rest = text
}

func (x *terminal) screen() string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return strings.Join(x.lines, "\n")
}

// givenBack says whether the terminal is as it was.
func (x *terminal) givenBack() (bool, string) {
	now, err := unix.IoctlGetTermios(int(x.slave.Fd()), unix.TCGETS)
	if err != nil {
		return false, err.Error()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return *now == x.before && !x.on["1049"] && x.on["25"] && !x.on["2026"], fmt.Sprintf("%+v, was %+v; modes %v", *now, x.before, x.on)
}

// run starts a program in the foreground of the terminal, as a shell does: it
// outlives the program, or the terminal would hang up. The program's exit
// status is received.
func (x *terminal) run(program *exec.Cmd) (shell *exec.Cmd, status <-chan string) {
	x.t.Helper()
	ended, tell, err := os.Pipe()
	if err != nil {
		x.t.Fatal(err)
	}
	shell = exec.Command("sh", append([]string{"-c", `trap : INT TERM; "$@"; echo $? >&3; exec 3>&-; exec sleep 100`, "sh"}, program.Args...)...)
	shell.Stdin, shell.Stdout, shell.Stderr, shell.ExtraFiles = x.slave, x.slave, x.slave, []*os.File{tell}
	shell.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	shell.Env = append(program.Env, "TERM=xterm", "NO_COLOR=1")
	if err := shell.Start(); err != nil {
		x.t.Fatal(err)
	}
	tell.Close()
	x.t.Cleanup(func() {
		_ = syscall.Kill(-shell.Process.Pid, syscall.SIGKILL)
		_ = shell.Wait()
		ended.Close()
	})
	said := make(chan string, 1)
	go func() {
		line, _ := bufio.NewReader(ended).ReadString('\n')
		said <- strings.TrimSpace(line)
	}()
	return shell, said
}

// part is the line of a service in a picture, and those that belong to it.
func part(picture, service string) string {
	return regexp.MustCompile(`(?m)^[├└] . ` + service + ` .*(\n[│ ]   .*)*`).FindString(picture)
}

// watch looks at the shop as a tired operator does. Somebody has just bought
// something from machine.OutsideIP.
func (n node) watch() {
	t := n.t
	edges := map[string][]string{
		"front":  {"← outside 192.0.2.1 :30080", "→ catalogue:80", "→ orders:80"},
		"orders": {"→ db:5432"},
		"worker": {"→ db:5432"},
	}
	used := regexp.MustCompile(` \d+m +[\d.]+[KMG]i +\d+`)
	whole := func(picture string) (bool, string) {
		for service, all := range edges {
			for _, e := range all {
				if !strings.Contains(part(picture, service), e) {
					return false, fmt.Sprintf("%s has no %q:\n%s", service, e, picture)
				}
			}
		}
		for _, service := range []string{"catalogue", "front", "orders", "db", "worker"} {
			if !used.MatchString(part(picture, service)) {
				return false, fmt.Sprintf("%s uses nothing:\n%s", service, picture)
			}
		}
		return strings.Contains(picture, "✓ shop"), picture
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()

	x := newTerminal(t, 100, 40)
	_, status := x.run(n.Command(ctx, n.Binary(), "status", "--watch"))
	n.until("the shop as a tree", func() (bool, string) { return whole(x.screen()) })
	t.Log("\n" + x.screen())
	x.resize(60, 14)
	n.until("a smaller picture", func() (bool, string) {
		lines := strings.Split(x.screen(), "\n")
		for _, l := range lines {
			if utf8.RuneCountInString(l) > 59 {
				return false, x.screen()
			}
		}
		return len(lines) <= 14 && strings.Contains(x.screen(), "✓ shop"), x.screen()
	})
	x.press("q")
	select {
	case code := <-status:
		if code != "0" {
			t.Errorf("after q it exits with %s", code)
		}
	case <-ctx.Done():
		t.Fatal("q does not quit")
	}
	if ok, state := x.givenBack(); !ok {
		t.Errorf("after q the terminal is %s", state)
	}

	for how, end := range map[string]func(shell int, x *terminal){
		"Ctrl-C":  func(_ int, x *terminal) { x.press("\x03") },
		"SIGTERM": func(shell int, _ *terminal) { _ = syscall.Kill(-shell, syscall.SIGTERM) },
	} {
		x := newTerminal(t, 80, 24)
		shell, _ := x.run(n.Command(ctx, n.Binary(), "status", "--watch"))
		n.until("the shop", func() (bool, string) { return strings.Contains(x.screen(), "✓ shop"), x.screen() })
		if ok, _ := x.givenBack(); ok {
			t.Error("the terminal was not taken")
		}
		end(shell.Process.Pid, x)
		n.until("the terminal after "+how, x.givenBack)
	}

	// Elsewhere it is text, and for programs JSON, of the same facts.
	first := func(args ...string) (*bufio.Reader, func()) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		cmd := n.Command(ctx, n.Binary(), append([]string{"status", "--watch"}, args...)...)
		out, err := cmd.StdoutPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		return bufio.NewReader(out), func() { cancel(); _ = cmd.Wait() }
	}
	text, end := first()
	defer end()
	picture := ""
	for ok := false; !ok; ok, _ = whole(picture) {
		line, err := text.ReadString('\n')
		if err != nil {
			t.Fatalf("%v after\n%s", err, picture)
		}
		picture += line
	}
	if strings.Contains(picture, "\x1b") {
		t.Errorf("a terminal's language where there is none: %q", picture)
	}
	objects, end := first("-o", "json")
	defer end()
	type peer struct{ Kind, App, Name string }
	var seen struct {
		Connections []struct {
			From, To peer
			Service  string
			Port     int
			Open     int
		}
		Apps []struct {
			Name     string
			Services []struct {
				Name, Version string
				Usage         struct{ Memory int64 }
			}
		}
	}
	if err := json.NewDecoder(objects).Decode(&seen); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	found := false
	for _, c := range seen.Connections {
		found = found || c.From == peer{"Deployment", "shop", "front"} && c.To == peer{"Deployment", "shop", "orders"} && c.Service == "orders" && c.Port == 80
	}
	if !found {
		t.Errorf("no connection from front to orders: %+v", seen.Connections)
	}
	for _, a := range seen.Apps {
		for _, s := range a.Services {
			if a.Name == "shop" && s.Name == "db" && (s.Usage.Memory < 1<<20 || s.Version != "1") {
				t.Errorf("db is %+v", s)
			}
		}
	}
}
