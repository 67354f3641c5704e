package controlplane

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"syscall"
	"testing"

	"github.com/go-logr/logr"
	"go.uber.org/zap"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/kubernetes/pkg/controller/util/consistency"
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
		"an own change not seen": {log: func() {
			kube.WithName("c").WithName(retried).Error(fmt.Errorf("sync: %w", &consistency.ConsistencyError{}), "cannot sync")
		}},
		"a conflict": {log: func() {
			kube.Error(apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, "p", cause), "cannot write")
		}},
		"a connection closed here": {log: func() { kube.Error(&net.OpError{Op: "read", Err: net.ErrClosed}, "cannot read") }},
		"a connection lost":        {log: func() { kube.Error(&net.OpError{Op: "read", Err: syscall.ECONNRESET}, "cannot read") }, want: "level=WARN"},
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

// TestForeignLogShowsNoBodies: at debug, Kubernetes' client would log what it sends and gets.
func TestForeignLogShowsNoBodies(t *testing.T) {
	var out bytes.Buffer
	h := foreignLog{slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug}), func() bool { return true }}
	kube := logr.FromSlogHandler(h)
	for v := range 11 {
		kube.V(v).Info("said", "v", v)
		if kube.V(v).Enabled() != (v <= 2) {
			t.Errorf("V(%d) is enabled: %v", v, !(v <= 2))
		}
	}
	if got := strings.Count(out.String(), "level=DEBUG msg=said"); got != 3 {
		t.Errorf("logged %d lines, want those of V(0) to V(2): %q", got, out.String())
	}
}
