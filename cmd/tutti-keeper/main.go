//go:build cgo

// Command tutti-keeper is the parent of every workload on its machine; see
// internal/keeper/server. It serves the directory given by --dir. Its other
// lives are not for people: "init" is libcontainer's first step inside a
// container, "pause" the first process of a shared PID namespace, "check"
// says that the program can run here, "landlock" confines a process of a
// workload before it becomes the workload's program.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	"tutti.dev/tutti/internal/keeper/protocol"
	"tutti.dev/tutti/internal/keeper/server"
)

func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init() // does not return
	}
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == "check" {
		return
	}
	if len(os.Args) > 3 && os.Args[1] == protocol.Confine {
		fmt.Fprintf(os.Stderr, "tutti: %v\n", confine(os.Args[2], os.Args[3:]))
		os.Exit(126) // as shells do
	}
	dir := flag.String("dir", "", "`directory` of the keeper's sockets and state")
	ready := flag.Int("ready-fd", -1, "descriptor to close once the keeper serves")
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		flag.Usage()
		os.Exit(2)
	}
	// A workload is idle most of its time, and so is its keeper.
	debug.SetGCPercent(50)
	logrus.SetLevel(logrus.WarnLevel) // libcontainer's

	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	// When memory runs out, what it keeps goes first: each workload has a
	// score of its own. Where that is not allowed it stands among the others.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-999"), 0); err != nil {
		log.Info("keeper is not spared when memory runs out", "err", err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	err := server.Run(ctx, *dir, log, func() {
		if *ready < 0 {
			return
		}
		_, _ = unix.Write(*ready, []byte("ready"))
		unix.Close(*ready)
		log.Info("keeper serves", "dir", *dir, "pid", os.Getpid())
	})
	if err != nil && ctx.Err() == nil {
		if *ready >= 0 {
			fmt.Fprint(os.NewFile(uintptr(*ready), "ready"), err)
		}
		log.Error("keeper failed", "err", err)
		os.Exit(1)
	}
}
