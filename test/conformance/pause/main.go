// Command pause does nothing until it is told to end: the stand-in for the
// image of that name. It is small, as pods that only take room are.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM, syscall.SIGINT)
	<-end
}
