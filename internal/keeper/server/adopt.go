//go:build cgo

package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/host/process"
)

// adopt takes over the workloads that an earlier keeper has left.
func (s *Server) adopt(inherited handover) {
	dirs, err := os.ReadDir(s.workloadDir(""))
	if err != nil {
		s.log.Error("cannot list workloads", "err", err)
		return
	}
	for _, d := range dirs {
		w := newWorkload(s.workloadDir(d.Name()))
		close(w.launched)
		s.workloads[d.Name()] = w
		if err := w.load(); err != nil || w.rec.ID != d.Name() || w.rec.Envelope == nil {
			// Written half when the machine failed: nothing of it runs.
			s.log.Warn("record of workload is unreadable", "workload", d.Name(), "err", err)
			s.forget(w, d.Name())
			continue
		}
		s.resume(w, inherited)
	}
	// By now the FIFOs that these kept full are open again.
	for name, fd := range inherited {
		if strings.HasPrefix(name, "hold:") {
			unix.Close(fd)
		}
	}
}

func (s *Server) resume(w *workload, inherited handover) {
	log := s.log.With("workload", w.rec.ID)
	if w.rec.Phase == exited {
		close(w.ended)
		if err := s.clear(w); err != nil {
			log.Error("workload left something behind", "err", err)
		}
		close(w.cleared)
		return
	}
	if w.rec.Phase != running {
		if !s.engineOf(w.rec.Envelope).started(w) {
			log.Warn("start was interrupted, nothing had run")
			s.forget(w, w.rec.ID)
			return
		}
		w.rec.Phase, w.rec.Started = running, time.Now().UTC()
	}
	var err error
	if w.out, err = newOutput(w.rec.Envelope.Log, s.log); err != nil {
		log.Error("log cannot be opened, output is lost", "err", err)
		w.out, _ = newOutput(os.DevNull, s.log)
	}
	if w.rec.Envelope.Tty {
		if master := inherited.file(terminalName(w.rec.ID)); master != nil {
			w.useTerminal(master)
		}
	} else {
		read, err := w.openFIFOs()
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			log.Error("output cannot be read", "err", err)
		}
		w.pump(read)
	}
	if w.rec.Boot == bootID() {
		w.pidfd, err = process.Open(w.rec.PID, w.rec.StartTicks)
	} else {
		err = process.ErrGone
	}
	if err != nil {
		log.Warn("workload ended unseen", "pid", w.rec.PID, "err", err)
		w.rec.OwnPIDs = w.rec.OwnPIDs || w.rec.Boot != bootID()
		s.finish(w, 0, false)
		return
	}
	if err := w.save(); err != nil {
		log.Error("record of workload not written", "err", err)
	}
	// A child it is when the keeper has replaced its own program only.
	s.children.keep(w.rec.PID)
	log.Info("workload taken over", "pid", w.rec.PID)
	go s.attend(w)
}

// handover is what a keeper that replaced its own program left to it: open
// descriptors by name.
type handover map[string]int

const handoverEnv = "TUTTI_KEEPER_HANDOVER"

func terminalName(id string) string { return "tty:" + id }

func takeHandover() (handover, error) {
	text, ok := os.LookupEnv(handoverEnv)
	if !ok {
		return nil, nil
	}
	h := handover{}
	if err := errors.Join(os.Unsetenv(handoverEnv), json.Unmarshal([]byte(text), &h)); err != nil {
		return nil, fmt.Errorf("read handover: %w", err)
	}
	for _, fd := range h {
		unix.CloseOnExec(fd)
	}
	return h, nil
}

// file returns an inherited descriptor, nil if there is none of that name.
func (h handover) file(name string) *os.File {
	fd, ok := h[name]
	if !ok {
		return nil
	}
	return os.NewFile(uintptr(fd), name)
}
