// Command operator is what the end-to-end tests run as other people's programs: an operator built with
// controller-runtime, and a program built on client-go's informers and leader election. It knows nothing of tutti.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	namespace := flag.String("namespace", "default", "where to follow and list")
	identity := flag.String("identity", "", "the follower's name")
	flag.Parse()
	switch flag.Arg(0) {
	case "manage":
		return manage(ctx)
	case "follow":
		return follow(ctx, *namespace, *identity)
	case "list":
		return list(ctx, *namespace, 20)
	default:
		return fmt.Errorf("usage: %s [flags] manage|follow|list", os.Args[0])
	}
}
