package controlplane

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/go-logr/logr"
	"go.uber.org/zap"
)

func TestForeignLog(t *testing.T) {
	running := true
	var out bytes.Buffer
	h := foreignLog{slog.NewTextHandler(&out, nil), func() bool { return running }}
	kube := logr.FromSlogHandler(h)
	var fatal error
	etcd := etcdLogger(h, func(err error) { fatal = err })
	cause := errors.New("disk full")
	ended := make(chan struct{})
	for name, tt := range map[string]struct {
		stopped bool
		log     func()
		want    string
	}{
		"an error":                 {log: func() { kube.Error(cause, "cannot write") }, want: `level=WARN msg="cannot write" err="disk full"`},
		"an error that is retried": {log: func() { kube.WithName(retried).Error(cause, "cannot write") }},
		"an error at the end":      {stopped: true, log: func() { kube.Error(cause, "cannot write") }},
		"news":                     {log: func() { kube.Info("hello") }},
		"etcd's error":             {log: func() { etcd.Error("cannot write", zap.Error(cause)) }, want: `level=WARN msg="cannot write" from=etcd error="disk full"`},
		"etcd's warning":           {log: func() { etcd.Warn("slow") }},
		"etcd's end": {log: func() {
			go func() { defer close(ended); etcd.Fatal("cannot go on", zap.Error(cause)) }()
			<-ended
		}, want: "cannot go on"},
	} {
		t.Run(name, func(t *testing.T) {
			out.Reset()
			running = !tt.stopped
			tt.log()
			if tt.want == "" && out.Len() > 0 {
				t.Errorf("logged %q", out.String())
			}
			if !strings.Contains(out.String(), tt.want) {
				t.Errorf("logged %q, want %q", out.String(), tt.want)
			}
		})
	}
	if !errors.Is(fatal, cause) || !strings.Contains(fatal.Error(), "cannot go on") {
		t.Errorf("fatal error %v", fatal)
	}
}
