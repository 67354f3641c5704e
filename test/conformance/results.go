package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

const (
	passed  = "passed"
	failed  = "failed"
	skipped = "skipped" // by the case itself: it wants what is not there
)

// result is what one case said.
type result struct {
	Case    string    `json:"case"`
	State   string    `json:"state"`
	Time    time.Time `json:"time"`
	Seconds float64   `json:"seconds,omitempty"`
	Message string    `json:"message,omitempty"`
}

// results are kept as one line each, written as they come: of a run that is
// killed only the running cases are lost. The last line about a case counts.
type results struct {
	mu   sync.Mutex
	last map[string]result
	file *os.File
}

func openResults(file string) (*results, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	r := &results{last: map[string]result{}, file: f}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var one result
		if json.Unmarshal(lines.Bytes(), &one) == nil { // else a line that a kill cut off
			r.last[one.Case] = one
		}
	}
	return r, lines.Err()
}

func (r *results) close() error { return r.file.Close() }

func (r *results) add(one result) error {
	line, err := json.Marshal(one)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last[one.Case] = one
	_, err = r.file.Write(append(line, '\n'))
	return err
}

func (r *results) notPassed(cases []string) (open []string) {
	for _, c := range cases {
		if r.last[c].State != passed {
			open = append(open, c)
		}
	}
	return open
}

// silent counts the cases that have said nothing: they were not run, or cut
// short.
func (r *results) silent(cases []string) (n int) {
	for _, c := range cases {
		if r.last[c].State == "" {
			n++
		}
	}
	return n
}

// forget makes as if the cases had never been run. The file keeps what they
// said until they say more.
func (r *results) forget(cases []string) {
	for _, c := range cases {
		delete(r.last, c)
	}
}

// leaveOut notes of cases why they are not run.
func (r *results) leaveOut(cases []string, why string) {
	for _, c := range cases {
		r.last[c] = result{Case: c, State: skipped, Message: why}
	}
}

// progress reads ginkgo's report as it is written, notes at once what has
// ended, and shows it. It is a writer that never fails: the report matters
// more. The line after "• [3.1 seconds]" or "• [FAILED] [3.1 seconds]" is the
// case with its labels; where it failed, the word [It] is put in.
type progress struct {
	results *results
	cases   []string
	begun   time.Time
	state   string
	rest    []byte
}

func (p *progress) Write(data []byte) (int, error) {
	p.rest = append(p.rest, data...)
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			return len(data), nil
		}
		p.line(string(line))
		p.rest = rest
	}
}

func (p *progress) line(line string) {
	state := p.state
	p.state = ""
	switch {
	case strings.HasPrefix(line, "• [FAILED]"):
		p.state = failed
	case strings.HasPrefix(line, "• ["):
		p.state = passed
	case state != "":
		text := strings.Replace(line, "[It] ", "", 1)
		found := ""
		for _, c := range p.cases {
			if strings.HasPrefix(text, c) && len(c) > len(found) {
				found = c
			}
		}
		if found == "" {
			return
		}
		if err := p.results.add(result{Case: found, State: state, Time: time.Now().UTC()}); err != nil {
			fmt.Fprintln(os.Stderr, "conformance: keep a result:", err)
		}
		fmt.Printf("%6s  %s %s\n", time.Since(p.begun).Truncate(time.Second), state, found)
	}
}

// readJUnit adds what progress reports leave out: how long a case took and
// why it failed or skipped itself.
func (r *results) readJUnit(file string) error {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("the suite was ended before it could report")
	}
	if err != nil {
		return err
	}
	type note struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
	var report struct {
		Suites []struct {
			Cases []struct {
				Name    string  `xml:"name,attr"`
				Status  string  `xml:"status,attr"`
				Time    float64 `xml:"time,attr"`
				Failure *note   `xml:"failure"`
				Error   *note   `xml:"error"`
				Skipped *note   `xml:"skipped"`
			} `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(data, &report); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	now := time.Now().UTC()
	for _, s := range report.Suites {
		for _, c := range s.Cases {
			name, isCase := strings.CutPrefix(c.Name, "[It] ")
			if !isCase {
				continue
			}
			one := result{Case: name, Time: now, Seconds: c.Time}
			switch {
			case c.Status == passed:
				one.State = passed
			case c.Status == skipped:
				if c.Skipped == nil || c.Skipped.Message == "" || c.Skipped.Message == skipped {
					continue // nobody asked for it
				}
				one.State, one.Message = skipped, c.Skipped.Message
			case c.Failure != nil:
				one.State, one.Message = failed, strings.TrimSpace(c.Failure.Message+"\n"+c.Failure.Text)
			case c.Error != nil:
				one.State, one.Message = failed, strings.TrimSpace(c.Error.Message+"\n"+c.Error.Text)
			}
			// What the end of the run cut short has said nothing.
			if one.State == "" || c.Status == "interrupted" {
				continue
			}
			if err := r.add(one); err != nil {
				return err
			}
		}
	}
	return nil
}
