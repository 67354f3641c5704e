package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/util/consistency"
)

const (
	// retried is the name under which Kubernetes' controllers log what has failed and is tried again, conflicts above all.
	retried = "UnhandledError"
	// finest is the finest of Kubernetes' levels, which are negative here, that is ever logged: V(2). From V(8) on they
	// show whole requests and answers, and what is secret in them.
	finest = slog.Level(-2)
)

// foreignLog is where Kubernetes' libraries and etcd log to. They cry out at what they then retry: while parts come up or
// go down that is all the time, so until they run, and when they stop, everything is debug. In between, an error of
// theirs is a warning here, and the rest, which is for their developers, is debug.
type foreignLog struct {
	slog.Handler
	running func() bool
}

// LogLibraries has Kubernetes' libraries in this process log to h; running says whether what they say is news to anyone.
func LogLibraries(h slog.Handler, running func() bool) slog.Handler {
	foreign := foreignLog{h, running}
	klog.SetSlogLogger(slog.New(foreign).With("from", "kubernetes"))
	rest.SetDefaultWarningHandler(rest.NoWarnings{})
	return foreign
}

func (h foreignLog) level(l slog.Level) slog.Level {
	if l >= slog.LevelError && h.running() {
		return slog.LevelWarn
	}
	return slog.LevelDebug
}

// Enabled implements [slog.Handler].
func (h foreignLog) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= finest && h.Handler.Enabled(ctx, h.level(l))
}

// routine reports whether err is part of a day's work: a connection that this process itself has closed, a change that
// came second, or a controller that has not yet seen its own change. The controllers try again.
func routine(err error) bool {
	var stale *consistency.ConsistencyError
	return errors.Is(err, net.ErrClosed) || apierrors.IsConflict(err) || errors.As(err, &stale)
}

// Handle implements [slog.Handler].
func (h foreignLog) Handle(ctx context.Context, r slog.Record) error {
	r.Level = h.level(r.Level)
	r.Attrs(func(a slog.Attr) bool {
		err, failed := a.Value.Any().(error)
		if failed && routine(err) || a.Key == "logger" && a.Value.String() == retried {
			r.Level = slog.LevelDebug
		}
		return true
	})
	if !h.Handler.Enabled(ctx, r.Level) {
		return nil // logr does not ask before it reports an error
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs implements [slog.Handler].
func (h foreignLog) WithAttrs(a []slog.Attr) slog.Handler {
	return foreignLog{h.Handler.WithAttrs(a), h.running}
}

// WithGroup implements [slog.Handler].
func (h foreignLog) WithGroup(n string) slog.Handler {
	return foreignLog{h.Handler.WithGroup(n), h.running}
}

// etcdLogger sends what etcd logs to h. What etcd calls fatal, or a reason to panic, does not end the process: it is
// handed to fatal, and the goroutine that hit it ends.
func etcdLogger(h slog.Handler, fatal func(error)) *zap.Logger {
	return zap.New(zapToSlog{h.WithAttrs([]slog.Attr{slog.String("from", "etcd")})},
		zap.WithFatalHook(fatalHook(fatal)), zap.WithPanicHook(fatalHook(fatal)))
}

type fatalHook func(error)

// OnWrite implements [zapcore.CheckWriteHook].
func (h fatalHook) OnWrite(e *zapcore.CheckedEntry, fields []zapcore.Field) {
	err := fmt.Errorf("%s", e.Message)
	for _, f := range fields {
		if cause, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			err = fmt.Errorf("%s: %w", e.Message, cause)
		}
	}
	h(err)
	runtime.Goexit()
}

// zapToSlog is a zap core that writes to a slog handler.
type zapToSlog struct{ handler slog.Handler }

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l >= zapcore.ErrorLevel:
		return slog.LevelError
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	case l == zapcore.InfoLevel:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

// Enabled implements [zapcore.Core].
func (c zapToSlog) Enabled(l zapcore.Level) bool {
	return c.handler.Enabled(context.Background(), slogLevel(l))
}

// With implements [zapcore.Core].
func (c zapToSlog) With(fields []zapcore.Field) zapcore.Core {
	return zapToSlog{c.handler.WithAttrs(attributes(fields))}
}

// Check implements [zapcore.Core].
func (c zapToSlog) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) {
		return ce.AddCore(e, c)
	}
	return ce
}

// Write implements [zapcore.Core].
func (c zapToSlog) Write(e zapcore.Entry, fields []zapcore.Field) error {
	r := slog.NewRecord(e.Time, slogLevel(e.Level), e.Message, 0)
	r.AddAttrs(attributes(fields)...)
	return c.handler.Handle(context.Background(), r)
}

// Sync implements [zapcore.Core].
func (c zapToSlog) Sync() error { return nil }

func attributes(fields []zapcore.Field) []slog.Attr {
	enc := zapcore.NewMapObjectEncoder()
	attrs := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
	}
	for k, v := range enc.Fields {
		attrs = append(attrs, slog.Any(k, v))
	}
	return attrs
}
