//go:build linkproof

// Command linkproof links everything tutti means to carry in one binary. It
// is the standing proof that one go.mod serves all of it: `make linkproof`
// builds it, nothing runs it.
package main

import (
	_ "github.com/compose-spec/compose-go/v2/loader"
	_ "github.com/containerd/containerd/v2/client"
	_ "github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	_ "github.com/containerd/ttrpc"
	_ "github.com/distribution/distribution/v3/registry/handlers"
	_ "github.com/miekg/dns"
	_ "github.com/moby/buildkit/client"
	_ "github.com/opencontainers/cgroups/devices"
	_ "github.com/opencontainers/runc/libcontainer"
	_ "github.com/vishvananda/netlink"
	_ "go.etcd.io/etcd/server/v3/embed"
	_ "k8s.io/kubectl/pkg/cmd"
	_ "k8s.io/kubernetes/cmd/kube-apiserver/app"
	_ "k8s.io/kubernetes/cmd/kube-controller-manager/app"
	_ "k8s.io/kubernetes/cmd/kube-scheduler/app"
	_ "k8s.io/kubernetes/pkg/proxy/nftables"
	_ "sigs.k8s.io/knftables"
)

func main() {}
