package controlplane

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"sync"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"k8s.io/klog/v2"
)

var bridgeKlog sync.Once

// logKubernetesTo sends what Kubernetes' libraries log to log. Their "info" is a developer's and becomes debug; their
// "error" is mostly something that they retry, and becomes a warning. klog is process-wide: the first caller wins.
func logKubernetesTo(log *slog.Logger) {
	bridgeKlog.Do(func() {
		klog.SetSlogLogger(slog.New(demoting{log.Handler()}).With("from", "kubernetes"))
	})
}

// demoting lowers the level of every record by one step.
type demoting struct{ slog.Handler }

func demoted(l slog.Level) slog.Level {
	switch {
	case l >= slog.LevelError:
		return slog.LevelWarn
	case l >= slog.LevelWarn:
		return slog.LevelInfo
	default:
		return slog.LevelDebug
	}
}

func (h demoting) Enabled(ctx context.Context, l slog.Level) bool {
	return h.Handler.Enabled(ctx, demoted(l))
}

func (h demoting) Handle(ctx context.Context, r slog.Record) error {
	r.Level = demoted(r.Level)
	return h.Handler.Handle(ctx, r)
}

func (h demoting) WithAttrs(a []slog.Attr) slog.Handler { return demoting{h.Handler.WithAttrs(a)} }
func (h demoting) WithGroup(n string) slog.Handler      { return demoting{h.Handler.WithGroup(n)} }

// etcdLogger sends what etcd logs to log, one level lower. What etcd calls fatal does not end the process: it is handed
// to fatal, and the goroutine that hit it ends.
func etcdLogger(log *slog.Logger, fatal func(error)) *zap.Logger {
	return zap.New(zapToSlog{handler: demoting{log.Handler()}.WithAttrs([]slog.Attr{slog.String("from", "etcd")})},
		zap.WithFatalHook(fatalHook(fatal)))
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
