package main

/*
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int sig) { _exit(0); }

// The first process of a shared PID namespace does nothing but reap. It runs
// before the Go runtime starts, which it would otherwise cost a few megabytes
// a pod.
__attribute__((constructor)) static void pause_init(int argc, char **argv) {
	if (argc < 2 || strcmp(argv[1], "pause") != 0)
		return;
	signal(SIGTERM, end);
	signal(SIGINT, end);
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	sigprocmask(SIG_BLOCK, &set, 0);
	for (;;) {
		int sig;
		while (waitpid(-1, 0, WNOHANG) > 0)
			;
		sigwait(&set, &sig);
	}
}
*/
import "C"
