package main

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"strings"
)

// layer writes a root file system as a tar archive. Directories above a file
// are made with it; what is there already is not written twice.
type layer struct {
	t    *tar.Writer
	seen map[string]bool
}

// merged are Debian's directories that are links into /usr.
var merged = []string{"bin", "sbin", "lib", "lib64"}

func newLayer(w io.Writer) (*layer, error) {
	l := &layer{tar.NewWriter(w), map[string]bool{"": true, ".": true}}
	var errs []error
	for _, d := range merged {
		errs = append(errs, l.directory("usr/"+d, 0o755), l.link(d, "usr/"+d))
	}
	errs = append(errs, l.directory("tmp", 0o1777), l.directory("var/tmp", 0o1777), l.directory("root", 0o700),
		l.directory("run", 0o755), l.link("var/run", "../run"))
	return l, errors.Join(errs...)
}

// place is where a file is in the end, without a leading slash.
func place(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for _, d := range merged {
		if strings.HasPrefix(name, d+"/") {
			return "usr/" + name
		}
	}
	return name
}

func (l *layer) put(h *tar.Header, content io.Reader) error {
	h.Name = place(h.Name)
	if l.seen[h.Name] {
		return nil
	}
	if err := l.directory(path.Dir(h.Name), 0o755); err != nil {
		return err
	}
	l.seen[h.Name] = true
	if h.Typeflag == tar.TypeDir {
		h.Name += "/"
	}
	if err := l.t.WriteHeader(h); err != nil {
		return fmt.Errorf("write %s: %w", h.Name, err)
	}
	if h.Typeflag != tar.TypeReg {
		return nil
	}
	_, err := io.Copy(l.t, content)
	return err
}

func (l *layer) directory(name string, mode int64) error {
	if l.seen[name] {
		return nil
	}
	return l.put(&tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: mode}, nil)
}

func (l *layer) link(name, target string) error {
	return l.put(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

func (l *layer) text(name, content string) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(content))}
	return l.put(h, strings.NewReader(content))
}

func (l *layer) file(name, source string, mode int64) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	return l.put(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: info.Size()}, f)
}

// deb adds the files of a Debian package, without what only people read.
func (l *layer) deb(file string) error {
	cmd := exec.Command("dpkg-deb", "--fsys-tarfile", file)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	t := tar.NewReader(out)
	for {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err == nil && !forPeople(place(h.Name)) {
			if h.Typeflag == tar.TypeLink {
				h.Linkname = place(h.Linkname)
			}
			err = l.put(h, t)
		}
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			return fmt.Errorf("add %s: %w", file, err)
		}
	}
	// What pads the archive: the program would die of a closed pipe.
	io.Copy(io.Discard, out)
	return cmd.Wait()
}

func forPeople(name string) bool {
	for _, d := range []string{"doc", "man", "info", "locale", "lintian", "bug"} {
		if strings.HasPrefix(name, "usr/share/"+d+"/") && !strings.HasSuffix(name, "/copyright") {
			return true
		}
	}
	return false
}
