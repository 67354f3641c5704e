//go:build cgo

package server

import (
	"bytes"
	"fmt"
	"log/slog"
	"os"
	"time"
)

const (
	// longest line of a log; longer ones are written in parts.
	maxLine = 16 << 10
	// size and number of the files that a log is kept in.
	maxLogSize  = 10 << 20
	maxLogFiles = 5
)

// cri writes the container log format of the Kubernetes CRI: one record per
// line, "<RFC 3339 time> <stream> <F|P> <text>", where P marks text whose line
// goes on in the next record. It is not safe for concurrent use.
type cri struct {
	path   string
	file   *os.File
	size   int64
	record []byte
	log    *slog.Logger
	failed bool // the last write failed; said once
	// rotates is false for what is no regular file, like /dev/null.
	rotates bool
}

func openCRI(path string, log *slog.Logger) (*cri, error) {
	c := &cri{path: path, log: log}
	return c, c.open()
}

func (c *cri) open() error {
	file, err := os.OpenFile(c.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o640)
	if err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		file.Close()
		return err
	}
	c.file, c.size, c.rotates = file, info.Size(), info.Mode().IsRegular()
	return nil
}

// write appends the records of what one stream produced. partial is the
// unfinished line before data; what is unfinished after it is returned.
func (c *cri) write(stream string, partial, data []byte) []byte {
	stamp := time.Now().UTC().Format(time.RFC3339Nano)
	c.record = c.record[:0]
	for len(data) > 0 {
		text, rest, whole := bytes.Cut(data, []byte("\n"))
		for room := maxLine - len(partial); len(text) > room; room = maxLine {
			c.add(stamp, stream, "P", partial, text[:room])
			partial, text = partial[:0], text[room:]
		}
		if !whole {
			partial = append(partial, text...)
			break
		}
		c.add(stamp, stream, "F", partial, text)
		partial, data = partial[:0], rest
	}
	c.flush()
	return partial
}

// end writes what is left of a line that will not be finished.
func (c *cri) end(stream string, partial []byte) {
	if len(partial) == 0 {
		return
	}
	c.record = c.record[:0]
	c.add(time.Now().UTC().Format(time.RFC3339Nano), stream, "P", partial, nil)
	c.flush()
}

func (c *cri) add(stamp, stream, tag string, text ...[]byte) {
	c.record = append(c.record, stamp...)
	c.record = append(c.record, ' ')
	c.record = append(c.record, stream...)
	c.record = append(c.record, ' ')
	c.record = append(c.record, tag...)
	c.record = append(c.record, ' ')
	for _, t := range text {
		c.record = append(c.record, t...)
	}
	c.record = append(c.record, '\n')
}

// flush never fails: a workload must not stand still because its log cannot
// be written.
func (c *cri) flush() {
	if c.rotates && c.size > 0 && c.size+int64(len(c.record)) > maxLogSize {
		c.rotate()
	}
	n, err := c.file.Write(c.record)
	c.size += int64(n)
	if err != nil && !c.failed {
		c.log.Warn("log is not written", "file", c.path, "err", err)
	}
	c.failed = err != nil
	if cap(c.record) > 4*maxLine {
		c.record = nil
	}
}

// rotate moves log to log.1, log.1 to log.2 and so on, and starts anew.
func (c *cri) rotate() {
	for i := maxLogFiles - 1; i > 0; i-- {
		from := c.path
		if i > 1 {
			from = fmt.Sprintf("%s.%d", c.path, i-1)
		}
		_ = os.Rename(from, fmt.Sprintf("%s.%d", c.path, i))
	}
	old := c.file
	if err := c.open(); err != nil {
		c.log.Warn("log is not rotated", "file", c.path, "err", err)
		return
	}
	old.Close()
}

func (c *cri) close() { c.file.Close() }
