// Package hook runs the lifecycle hooks of containers: what a pod wants done
// right after a container has started and before it is stopped.
package hook

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"

	"tutti.dev/tutti/internal/runtime"
)

// Exec runs a program in a container and returns its exit code and what it
// wrote. It must return soon after ctx ends.
type Exec func(ctx context.Context, id runtime.ID, argv []string) (code int, output []byte, err error)

const maxOutput = 10 << 10

// Run runs one handler and returns when it is done or ctx ends; the caller
// puts the grace period into ctx. podIP is the address for handlers that name
// no host. The text of an error is meant for the pod's owner.
func Run(ctx context.Context, h *v1.LifecycleHandler, c *v1.Container, id runtime.ID, podIP string, exec Exec) error {
	switch {
	case h.Exec != nil:
		return run(ctx, h.Exec.Command, c, id, exec)
	case h.HTTPGet != nil:
		return get(ctx, h.HTTPGet, c, podIP)
	case h.TCPSocket != nil:
		return dial(ctx, h.TCPSocket, c, podIP)
	case h.Sleep != nil:
		timer := time.NewTimer(time.Duration(h.Sleep.Seconds) * time.Second)
		defer timer.Stop()
		select {
		case <-timer.C:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("sleep hook of container %s ended early: %w", c.Name, ctx.Err())
		}
	}
	return fmt.Errorf("hook of container %s has no handler", c.Name)
}

func run(ctx context.Context, argv []string, c *v1.Container, id runtime.ID, exec Exec) error {
	code, out, err := exec(ctx, id, argv)
	if len(out) > maxOutput {
		out = out[:maxOutput]
	}
	switch {
	case err != nil:
		return fmt.Errorf("exec hook %q of container %s: %w, message: %q", argv, c.Name, err, out)
	case code != 0:
		return fmt.Errorf("exec hook %q of container %s exited with %d, message: %q", argv, c.Name, code, out)
	}
	return nil
}

// client asks once per hook: nothing is kept. Certificates of a container's
// own server cannot be verified.
var client = &http.Client{Transport: &http.Transport{
	TLSClientConfig:   &tls.Config{InsecureSkipVerify: true},
	DisableKeepAlives: true,
}}

// get succeeds with any answer, as in a kubelet: a hook tells, it does not ask.
func get(ctx context.Context, h *v1.HTTPGetAction, c *v1.Container, podIP string) error {
	req, err := httpprobe.NewRequestForHTTPGetAction(h, c, podIP, "lifecycle")
	if err != nil {
		return fmt.Errorf("HTTP hook %s of container %s: %w", h.Path, c.Name, err)
	}
	req = req.WithContext(ctx)
	resp, err := client.Do(req)
	if err != nil && strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
		// Pods written before hooks knew HTTPS rely on this.
		req = req.Clone(ctx)
		req.URL.Scheme = "http"
		req.Header.Del("Authorization")
		resp, err = client.Do(req)
	}
	if err != nil {
		return fmt.Errorf("HTTP hook %s of container %s: %w", h.Path, c.Name, err)
	}
	defer resp.Body.Close()
	// The server may write before it acts: hear it out.
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxOutput))
	return nil
}

func dial(ctx context.Context, h *v1.TCPSocketAction, c *v1.Container, podIP string) error {
	port, err := probe.ResolveContainerPort(h.Port, c)
	if err != nil {
		return fmt.Errorf("TCP hook of container %s: %w", c.Name, err)
	}
	host := h.Host
	if host == "" {
		host = podIP
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	if err != nil {
		return fmt.Errorf("TCP hook of container %s: %w", c.Name, err)
	}
	return conn.Close()
}
