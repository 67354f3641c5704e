//go:build cgo

package server

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/process"
)

// reapPatience is how long a process that is no child of this keeper may stay
// a zombie before its exit counts as unknown.
const reapPatience = 5 * time.Second

// attend waits until the workload's first process has ended and settles what
// is left of it. It is the one goroutine that a running workload has besides
// those that read its output.
func (s *Server) attend(w *workload) {
	if err := process.Wait(w.pidfd); err != nil {
		if isClosed(err) {
			return // this keeper gives up its workloads
		}
		s.log.Error("cannot wait for workload", "workload", w.rec.ID, "err", err)
	}
	s.ending.RLock()
	defer s.ending.RUnlock()
	status, known := s.children.reap(w.rec.PID)
	if !known {
		status, known = process.ExitStatus(w.pidfd, reapPatience)
	}
	s.finish(w, status, known)
}

// finish records the end of a workload and removes its groups.
func (s *Server) finish(w *workload, status unix.WaitStatus, known bool) {
	finished := time.Now().UTC()
	groups, err := w.groups()
	if err != nil {
		s.log.Error("cannot find groups of workload", "workload", w.rec.ID, "err", err)
	}
	oom := false
	if groups != nil {
		kills, err := groups.OOMKillCount()
		oom = err == nil && kills > 0 && (!known || status != 0)
	}
	if !w.rec.OwnPIDs {
		if err := w.killAll(); err != nil {
			s.log.Error("processes are left", "workload", w.rec.ID, "err", err)
		}
	}
	if w.out != nil {
		w.out.finish()
	}

	w.mu.Lock()
	w.rec.Phase, w.rec.Finished = exited, finished
	w.rec.Status, w.rec.Unknown, w.rec.OOMKilled = status, !known, oom
	if err := w.save(); err != nil {
		s.log.Error("record of workload not written", "workload", w.rec.ID, "err", err)
	}
	if w.input != nil {
		w.input.Close()
		w.input = nil
	}
	if w.pidfd != nil {
		w.pidfd.Close()
		w.pidfd = nil
	}
	w.out = nil
	w.mu.Unlock()
	close(w.ended)
	s.watchers.tell(w)

	if err := s.clear(w); err != nil {
		s.log.Error("workload left something behind", "workload", w.rec.ID, "err", err)
	}
	close(w.cleared)
}

// clear removes what an ended workload has outside its directory.
func (s *Server) clear(w *workload) error {
	var errs []error
	if groups, err := w.groups(); err != nil {
		errs = append(errs, err)
	} else if groups != nil {
		errs = append(errs, groups.Destroy())
	}
	s.children.begin()
	errs = append(errs, s.engineOf(w.rec.Envelope).remove(w))
	s.children.end(0)
	for _, name := range []string{stdinFIFO, stdoutFIFO, stderrFIFO, processFile} {
		if err := os.Remove(filepath.Join(w.dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func isClosed(err error) bool {
	return errors.Is(err, os.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded)
}
