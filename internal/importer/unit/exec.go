package unit

import (
	"errors"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"tutti.dev/tutti/internal/api/hostprocess"
	"tutti.dev/tutti/internal/importer"
)

// command is one program that a unit runs.
type command struct {
	said   string // key and value
	words  []word // the program first
	ignore bool   // its failure is none
	root   bool   // it runs as root, whatever User says
}

// word is an argument: texts, and references to variables between them.
type word []part

type part struct{ text, variable string }

// mainPID is the variable that systemd gives what belongs to a service.
const mainPID = "MAINPID"

var plain = regexp.MustCompile(`^\$[A-Za-z_][A-Za-z0-9_]*$`)

// programs are the commands of a key, with their prefixes and everything that
// systemd expands expanded.
func (t *translation) programs(key string) ([]command, error) {
	var all []command
	for _, value := range t.values("Service", key) {
		tokens, closed := split(value)
		if !closed {
			return nil, openQuote(key, value)
		}
		for len(tokens) > 0 {
			end := slices.Index(tokens, ";")
			if end < 0 {
				end = len(tokens)
			}
			if end > 0 {
				c, err := t.program(key+"="+value, tokens[:end])
				if err != nil {
					return nil, err
				}
				all = append(all, c)
			}
			tokens = tokens[min(end+1, len(tokens)):]
		}
	}
	return all, nil
}

func (t *translation) program(said string, tokens []string) (command, error) {
	c := command{said: said}
	expand, named := true, false
	path := strings.TrimLeft(tokens[0], "-+!@:|")
	for _, prefix := range tokens[0][:len(tokens[0])-len(path)] {
		switch prefix {
		case '-':
			c.ignore = true
		case '+', '!':
			c.root = true
		case ':':
			expand = false
		case '@':
			named = true
		case '|':
			t.notes.Add(said, "runs without a shell; write `/bin/sh -c` before it")
		}
	}
	if path == "" {
		return c, fmt.Errorf("%s names no program; write its path after the prefix", said)
	}
	if strings.Contains(tokens[0][:len(tokens[0])-len(path)], "!!") {
		c.root = false // on every kernel that tutti runs on it has no effect
	}
	c.words = []word{{{text: t.text(path)}}}
	rest := tokens[1:]
	if named && len(rest) > 0 {
		t.notes.Add(said, "the program is called by its path, not %q", rest[0])
		rest = rest[1:]
	}
	for _, token := range rest {
		if token == `\;` {
			token = ";"
		}
		c.words = append(c.words, t.expand(token, expand)...)
	}
	return c, nil
}

// expand expands an argument: to one, or, where it is a variable, to as many
// as that has words.
func (t *translation) expand(token string, variables bool) []word {
	if variables && plain.MatchString(token) {
		name := token[1:]
		value, known := t.variables[name]
		words, closed := split(value)
		switch {
		case name == mainPID || known && len(words) == 1 && t.secret[name]:
			return []word{{{variable: name}}}
		case !known:
			t.notes.Add(token, "is not set here; with systemd nothing stands there then, and in the manifest neither")
			return nil
		case !closed:
			words = strings.Fields(value)
		}
		all := make([]word, len(words))
		for i, w := range words {
			all[i] = word{{text: w}}
		}
		return all
	}
	var (
		w    word
		text strings.Builder
	)
	for i := 0; i < len(token); i++ {
		rest := token[i:]
		switch {
		case rest[0] == '%' && len(rest) > 1:
			text.WriteString(t.text(rest[:2]))
			i++
		case variables && strings.HasPrefix(rest, "$$"):
			text.WriteByte('$')
			i++
		case variables && strings.HasPrefix(rest, "${") && strings.Contains(rest, "}"):
			name := rest[2:strings.IndexByte(rest, '}')]
			i += len(name) + 2
			if _, known := t.variables[name]; known || name == mainPID {
				w = append(w, part{text: text.String()}, part{variable: name})
				text.Reset()
			} else {
				t.notes.Add("${"+name+"}", "is not set here; with systemd nothing stands there then, and in the manifest neither")
			}
		default:
			text.WriteByte(rest[0])
		}
	}
	w = append(w, part{text: text.String()})
	return []word{slices.DeleteFunc(w, func(p part) bool { return p == part{} })}
}

// argument is a word as a container's command has it.
func (w word) argument() string {
	var b strings.Builder
	for _, p := range w {
		if p.variable != "" {
			b.WriteString("$(" + p.variable + ")")
		} else {
			b.WriteString(importer.Literal(p.text))
		}
	}
	return b.String()
}

func (c command) arguments() []string {
	all := make([]string, len(c.words))
	for i, w := range c.words {
		all[i] = w.argument()
	}
	return all
}

func (c command) uses(variable string) bool {
	return slices.ContainsFunc(c.words, func(w word) bool {
		return slices.ContainsFunc(w, func(p part) bool { return p.variable == variable })
	})
}

var harmless = regexp.MustCompile(`^[A-Za-z0-9_@%+=:,./-]+$`)

// quote writes a text as one word of a shell.
func quote(text string) string {
	if harmless.MatchString(text) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// shell is the command as a shell has it. pidFile has the number that MAINPID
// stands for.
func (c command) shell(pidFile string) string {
	all := make([]string, len(c.words))
	for i, w := range c.words {
		var b strings.Builder
		for _, p := range w {
			switch p.variable {
			case "":
				b.WriteString(quote(p.text))
			case mainPID:
				b.WriteString(`"$(cat ` + quote(pidFile) + `)"`)
			default:
				b.WriteString(`"$` + p.variable + `"`)
			}
		}
		if len(w) == 0 {
			b.WriteString("''")
		}
		all[i] = b.String()
	}
	line := strings.Join(all, " ")
	if c.ignore {
		line = "{ " + line + " || :; }"
	}
	return line
}

// plainly says whether the command needs no shell where nothing is expanded.
func (c command) plainly() bool {
	return !c.ignore && !slices.ContainsFunc(c.words, func(w word) bool {
		return slices.ContainsFunc(w, func(p part) bool { return p.variable != "" })
	})
}

// hook runs commands one after the other; nothing expands references in it.
func (t *translation) hook(commands []command, pidFile string, more ...string) *corev1.LifecycleHandler {
	for _, c := range commands {
		if c.root && t.account.uid != 0 {
			t.notes.Add(c.said, "runs as the program's user: a hook has no other")
		}
	}
	if len(commands) == 1 && len(more) == 0 && commands[0].plainly() && t.umask == "" {
		var all []string
		for _, w := range commands[0].words {
			text := ""
			for _, p := range w {
				text += p.text
			}
			all = append(all, text)
		}
		return &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: all}}
	}
	var lines []string
	for _, c := range commands {
		lines = append(lines, c.shell(pidFile))
	}
	if len(lines) == 0 && len(more) == 0 {
		return nil
	}
	parts := append([]string{strings.Join(lines, " && ")}, more...)
	if t.umask != "" {
		parts = append([]string{"umask " + t.umask}, parts...)
	}
	script := strings.Join(slices.DeleteFunc(parts, func(p string) bool { return p == "" }), "; ")
	return &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/bin/sh", "-c", script}}}
}

// before adds a container that ends before the program starts.
func (t *translation) before(name string, c command) {
	main := t.pod.Main()
	init := corev1.Container{Name: name, Image: hostprocess.Image, Command: c.arguments(), WorkingDir: main.WorkingDir, SecurityContext: main.SecurityContext.DeepCopy()}
	var script string
	switch {
	case c.ignore:
		script = `"$@" || :`
	case t.umask != "":
		script = `exec "$@"`
	}
	if t.umask != "" {
		script = "umask " + t.umask + "\n" + script
	}
	if script != "" {
		init.Command = append([]string{"/bin/sh", "-c", script, name}, init.Command...)
	}
	if c.root {
		root := int64(0)
		init.SecurityContext = &corev1.SecurityContext{RunAsUser: &root, RunAsGroup: &root}
	}
	t.pod.Spec.InitContainers = append(t.pod.Spec.InitContainers, init)
}

// forever stands for a time without end, in seconds.
const forever = 3600

// commands says what runs, before, meanwhile and when it ends.
func (t *translation) commands() error {
	start, err := t.programs("ExecStart")
	if err != nil {
		return err
	}
	switch {
	case len(start) == 0:
		return errors.New("it has no ExecStart, so there is nothing to run; import the service that does the work")
	case len(start) > 1 && !t.oneshot:
		return errors.New("it has more than one ExecStart, which only Type=oneshot may; systemd would not start it either")
	}
	pre, err := t.programs("ExecStartPre")
	if err != nil {
		return err
	}
	post, err := t.programs("ExecStartPost")
	if err != nil {
		return err
	}
	stop, err := t.programs("ExecStop")
	if err != nil {
		return err
	}
	if len(t.mkdir) > 0 {
		t.before("directories", command{root: true, words: []word{{{text: "/bin/sh"}}, {{text: "-c"}}, {{text: strings.Join(t.mkdir, " && ")}}}})
	}
	if t.umask, err = umask(t.last("Service", "UMask")); err != nil {
		return err
	}
	t.workingDirectory() // which may be one of them
	if t.oneshot {       // one after the other; the last one is the container
		start = append(start, post...)
		post = nil
	}
	for i, c := range pre {
		if !t.oneshot {
			t.notes.Add("ExecStartPre", "runs once for each pod, before its first start; systemd runs it before each start")
		}
		t.before(fmt.Sprintf("pre-%d", i+1), c)
	}
	for i, c := range start[:len(start)-1] {
		t.before(fmt.Sprintf("start-%d", i+1), c)
	}
	if t.oneshot {
		for _, c := range stop {
			t.notes.Add(c.said, "what ran to its end is not stopped; make it a Job of its own, or run it by hand")
		}
		stop = nil
	}
	return t.main(start[len(start)-1], post, stop)
}

func (t *translation) workingDirectory() {
	said := t.text(t.last("Service", "WorkingDirectory"))
	dir, optional := strings.CutPrefix(said, "-")
	switch {
	case dir == "":
	case dir == "~":
		t.pod.Main().WorkingDir = t.account.home
	case optional && !exists(t.root, dir):
		t.notes.Add("WorkingDirectory="+said, "is not on this machine, and was left out")
	default:
		t.pod.Main().WorkingDir = path.Clean(dir)
	}
}

// main makes the container of the program, with what runs beside it.
func (t *translation) main(program command, post, stop []command) error {
	main := t.pod.Main()
	if program.root && t.account.uid != 0 {
		root := int64(0)
		if main.SecurityContext == nil {
			main.SecurityContext = &corev1.SecurityContext{}
		}
		main.SecurityContext.RunAsUser, main.SecurityContext.RunAsGroup = &root, &root
	}
	l, err := t.launch(program)
	if err != nil {
		return err
	}
	pid := l.pidFile(t.pod.Name)
	var last []string
	if !l.forking && l.signal != "TERM" && !t.oneshot {
		last = []string{fmt.Sprintf(`main=$(cat %s) && { kill -s %s "$main"; while kill -0 "$main"; do sleep 0.1; done; } 2>/dev/null`, pid, l.signal)}
	}
	hooks := &corev1.Lifecycle{PostStart: t.hook(post, pid), PreStop: t.hook(stop, pid, last...)}
	if hooks.PostStart != nil || hooks.PreStop != nil {
		main.Lifecycle = hooks
	}
	// MAINPID and a signal of its own want the number written down.
	l.keep = len(last) > 0 || !l.forking && slices.ContainsFunc(append(stop, post...), func(c command) bool { return c.uses(mainPID) })
	if l.keep {
		t.pod.EmptyDir(path.Dir(pid), corev1.StorageMediumMemory)
	}
	main.Command, main.Args = l.command(t.pod.Name, program)
	t.stopping()
	t.pod.Ready()
	return nil
}

// launch is what stands between the container and the program: a few lines of
// shell where a container does not do what systemd does, else nothing.
type launch struct {
	umask    string // "" the usual
	signal   string // what ends the program, without SIG
	forking  bool   // the program leaves a process behind and ends
	file     string // PIDFile
	keep     bool   // write the program's number down
	ignore   bool   // its failure is none
	patience int64  // seconds until the file must be there
}

func (t *translation) launch(program command) (launch, error) {
	l := launch{umask: t.umask, signal: strings.TrimPrefix(t.last("Service", "KillSignal"), "SIG"), file: t.text(t.last("Service", "PIDFile"))}
	switch {
	case l.signal == "":
		l.signal = "TERM"
	case !signals.MatchString(l.signal):
		return l, fmt.Errorf("KillSignal=%s is no signal; write it as SIGINT", l.signal)
	}
	if rest, ok := strings.CutPrefix(l.file, "/var/run/"); ok {
		l.file = "/run/" + rest
	}
	if l.file != "" && !path.IsAbs(l.file) {
		l.file = path.Join("/run", l.file)
	}
	switch kind := t.last("Service", "Type"); {
	case kind == "forking" && l.file == "":
		t.notes.Add("Type=forking", "without a PIDFile nothing tells which process to wait for, and the pod ends when ExecStart does; have the program stay in the foreground, or write a PIDFile")
	case kind == "forking":
		l.forking = true
		l.patience = t.patience()
		t.notes.Add("Type=forking", "a few lines of shell wait for the process of the PIDFile; if the program can stay in the foreground, have it do that and leave them out")
	case kind == "notify" || kind == "notify-reload":
		t.notes.Add("Type="+kind, "a pod is not told by sd_notify that the program is ready; a readinessProbe asks (--port makes one)")
	case kind == "dbus":
		t.notes.Add("Type="+kind, "a pod is not told by D-Bus that the program is ready; a readinessProbe asks (--port makes one)")
	}
	if l.file != "" && !l.forking {
		t.notes.Add("PIDFile="+l.file, "what a container starts is its main process")
	}
	l.ignore = program.ignore
	if l.ignore && !l.forking && !t.oneshot {
		t.notes.Add(program.said, "the prefix - has no effect: the program is started again whatever its exit status is")
	}
	return l, nil
}

// umask is "" for the one that every program starts with.
func umask(said string) (string, error) {
	switch {
	case strings.Trim(said, "01234567") != "":
		return "", fmt.Errorf("UMask=%s is no number of the base 8; write it as 0027", said)
	case said == "0022" || said == "022":
		return "", nil
	}
	return said, nil
}

// patience is how many seconds a program may take to start.
func (t *translation) patience() int64 {
	limit, ok := seconds(t.last("Service", "TimeoutStartSec", "TimeoutSec"))
	switch {
	case !ok:
		return 90 // systemd's default
	case limit == 0:
		return forever
	}
	return limit
}

var signals = regexp.MustCompile(`^[A-Z0-9+-]+$`)

// pidFile has the number of the program that a unit without one runs.
func (l launch) pidFile(name string) string {
	if l.forking {
		return l.file
	}
	return "/run/" + name + ".main/pid"
}

// command is the container's: the program, or the shell with the program.
func (l launch) command(name string, program command) (command, args []string) {
	words := program.arguments()
	var script []string
	if l.umask != "" {
		script = append(script, "umask "+l.umask)
	}
	switch {
	case l.forking:
		start := `"$@"`
		if l.ignore {
			start += " || :"
		}
		file := quote(l.file)
		script = append([]string{"set -e", "rm -f " + file}, append(script,
			start,
			"tries=0",
			"until { read -r main <"+file+` || [ "$main" ]; } 2>/dev/null; do`,
			fmt.Sprintf("  [ $((tries+=1)) -le %d ] || { echo no %s >&2; exit 1; }", l.patience*10, file),
			"  sleep 0.1",
			"done",
			"stopped=",
			fmt.Sprintf(`trap 'stopped=1; kill -s %s "$main" || :' TERM`, l.signal),
			`while kill -0 "$main" 2>/dev/null; do`,
			"  sleep 1 & wait $! || :",
			"done",
			`[ "$stopped" ]`,
		)...)
	case l.keep:
		script = append(script, "echo $$ >"+l.pidFile(name), `exec "$@"`)
	case l.umask != "":
		script = append(script, `exec "$@"`)
	case l.ignore:
		script = append(script, `"$@" || :`)
	default:
		return words[:1], words[1:]
	}
	return []string{"/bin/sh", "-c", importer.Literal(strings.Join(script, "\n")), name}, words
}

// stopping is how long the program may take to end.
func (t *translation) stopping() {
	said := t.last("Service", "TimeoutStopSec", "TimeoutSec")
	grace, ok := seconds(said)
	switch {
	case t.oneshot && !ok:
		return
	case !ok:
		grace = 90 // systemd's default
	case grace == 0:
		grace = forever
		t.notes.Add("TimeoutStopSec="+said, "no pod may take for ever to end; an hour stands for it")
	}
	t.pod.Spec.TerminationGracePeriodSeconds = &grace
	switch mode := t.last("Service", "KillMode"); mode {
	case "", "mixed":
	case "control-group":
		t.notes.Add("KillMode="+mode, "the signal goes to the program's first process only; SIGKILL, at the end of the grace, to all")
	default:
		t.notes.Add("KillMode="+mode, "what is left of a pod when its program has ended is killed")
	}
}
