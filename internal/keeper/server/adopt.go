//go:build cgo

package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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
	if w.rec.Phase == creating {
		if !s.executed(w) {
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
	} else if err := w.openFIFOs(); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Error("output cannot be read", "err", err)
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

// executed tells whether a start that the last keeper did not finish got as
// far as the workload's own program, and if so fills in its process.
func (s *Server) executed(w *workload) bool {
	var state struct {
		Pid   int    `json:"init_process_pid"`
		Start uint64 `json:"init_process_start"`
	}
	data, err := os.ReadFile(filepath.Join(s.runcDir(), w.rec.ID, "state.json"))
	if err != nil || json.Unmarshal(data, &state) != nil || w.rec.Boot != bootID() {
		return false
	}
	w.rec.PID, w.rec.StartTicks = state.Pid, state.Start
	if _, err := os.Stat(filepath.Join(s.runcDir(), w.rec.ID, "exec.fifo")); err != nil {
		return true
	}
	// The program is executed before the FIFO is removed.
	name, err := os.ReadFile("/proc/" + strconv.Itoa(state.Pid) + "/comm")
	return err == nil && !bytes.HasPrefix(name, []byte("runc:["))
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
