//go:build cgo

package server

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"tutti.dev/tutti/internal/keeper/protocol"
)

// FuzzCRI writes what a program says, in reads of any size, and puts the
// records together again: nothing may be lost, and each must be one line.
func FuzzCRI(f *testing.F) {
	f.Add([]byte("a\nb"), 1, true)
	f.Add([]byte("\n\n\r\n"), 2, false)
	f.Add(bytes.Repeat([]byte("x"), maxLine+1), maxLine, true)
	f.Add([]byte("2026-01-01T00:00:00Z stdout F forged\n"), 7, true)
	path := filepath.Join(f.TempDir(), "0.log")
	f.Fuzz(func(t *testing.T, said []byte, size int, ends bool) {
		_ = os.Remove(path)
		log, err := openCRI(path, slog.Default())
		if err != nil {
			t.Fatal(err)
		}
		size = max(1, min(size, 64<<10))
		var partial []byte
		for rest := said; len(rest) > 0; {
			n := min(size, len(rest))
			// What is read is overwritten by the next read.
			partial = log.write("stdout", partial, bytes.Clone(rest[:n]))
			rest = rest[n:]
		}
		log.end("stdout", partial)
		log.close()
		records, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var got []byte
		for line := range bytes.Lines(records) {
			stamp, rest, _ := bytes.Cut(line, []byte(" "))
			if _, err := time.Parse(time.RFC3339Nano, string(stamp)); err != nil {
				t.Fatalf("record %q: %v", line, err)
			}
			switch text := bytes.TrimSuffix(rest, []byte("\n")); {
			case bytes.HasPrefix(text, []byte("stdout F ")):
				got = append(append(got, text[len("stdout F "):]...), '\n')
			case bytes.HasPrefix(text, []byte("stdout P ")):
				got = append(got, text[len("stdout P "):]...)
			default:
				t.Fatalf("record %q", line)
			}
			if len(line) > maxLine+len("2006-01-02T15:04:05.999999999Z stdout P \n") {
				t.Fatalf("a record of %d bytes", len(line))
			}
		}
		if !bytes.Equal(got, said) {
			t.Fatalf("said %q, logged %q", said, got)
		}
	})
}

// FuzzMessages gives the keeper messages that nobody should send. None starts
// anything; none may reach outside the keeper's directory.
func FuzzMessages(f *testing.F) {
	message := func(m proto.Message) []byte {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		return b
	}
	for _, id := range []string{"", "a", "..", ".", "../beside", "/beside", "a/b", strings.Repeat("x", 300), "a\x00b"} {
		f.Add(byte(0), message(&protocol.StartRequest{Id: id, Envelope: &protocol.Envelope{Log: "/dev/null"}, Spec: []byte(`{"process":{},"linux":{}}`)}))
		f.Add(byte(1), message(&protocol.WorkloadRequest{Id: id}))
		f.Add(byte(2), message(&protocol.SignalRequest{Id: id, Signal: -1}))
		f.Add(byte(3), message(&protocol.UpdateRequest{Id: id, Resources: []byte(`{"cpu":{"shares":1}}`)}))
		f.Add(byte(4), message(&protocol.RemoveRequest{Id: id, Kill: true}))
		f.Add(byte(5), message(&protocol.SettleRequest{Id: id, WaitStatus: 9}))
	}
	dir := f.TempDir()
	s := &Server{dir: filepath.Join(dir, "keeper"), log: slog.New(slog.DiscardHandler), workloads: map[string]*workload{}}
	for _, d := range []string{s.workloadDir(""), s.runcDir(), filepath.Join(s.dir, "beside"), filepath.Join(dir, "beside")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			f.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, method byte, b []byte) {
		ctx := t.Context()
		parse := func(m proto.Message) bool { return proto.Unmarshal(b, m) == nil }
		var start protocol.StartRequest
		var of protocol.WorkloadRequest
		var signal protocol.SignalRequest
		var update protocol.UpdateRequest
		var remove protocol.RemoveRequest
		var settle protocol.SettleRequest
		switch {
		case method == 0 && parse(&start):
			var spec struct{ Process struct{ Args []string } }
			if json.Unmarshal(start.Spec, &spec) == nil && len(spec.Process.Args) > 0 {
				t.Skip("it would start something")
			}
			if _, err := s.Start(ctx, &start); err == nil {
				t.Error("something was started")
			}
		case method == 1 && parse(&of):
			_, _ = s.Get(ctx, &of)
			_, _ = s.Stats(ctx, &of)
		case method == 2 && parse(&signal):
			_, _ = s.Signal(ctx, &signal)
		case method == 3 && parse(&update):
			_, _ = s.Update(ctx, &update)
		case method == 4 && parse(&remove):
			_, _ = s.Remove(ctx, &remove)
		case method == 5 && parse(&settle):
			_, _ = s.Settle(ctx, &settle)
		}
		if all, _ := s.List(ctx, &protocol.ListRequest{}); len(all.Workloads) != 0 {
			t.Errorf("workloads %v", all.Workloads)
		}
		for _, d := range []string{s.workloadDir(""), filepath.Join(s.dir, "beside"), filepath.Join(dir, "beside")} {
			if left, err := os.ReadDir(d); err != nil || len(left) != 0 {
				t.Fatalf("%s: %v %v", d, left, err)
			}
		}
	})
}

// FuzzRecord reads what a machine that failed may have left of a record.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"ID":"a","Phase":"exited","Status":256,"Envelope":{"log":"/dev/null"}}`))
	f.Add([]byte(`{"ID":`))
	f.Add([]byte{0})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := os.WriteFile(filepath.Join(dir, recordFile), b, 0o600); err != nil {
			t.Fatal(err)
		}
		w := newWorkload(dir)
		if w.load() != nil {
			return
		}
		m := w.message()
		if m.Running != (w.rec.Phase == running) {
			t.Errorf("running %v in phase %s", m.Running, w.rec.Phase)
		}
		if _, err := proto.Marshal(m); err != nil && w.rec.ID == strings.ToValidUTF8(w.rec.ID, "") {
			t.Errorf("cannot be sent: %v", err)
		}
	})
}
