// Package protocol is the language between a machine's agent and its keeper,
// generated from keeper.proto by protoc with protoc-gen-go (the version of
// google.golang.org/protobuf in go.mod) and protoc-gen-go-ttrpc (likewise,
// github.com/containerd/ttrpc).
package protocol

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative keeper.proto

const (
	// Socket and IOSocket are the names of the keeper's sockets in its
	// directory.
	Socket   = "keeper.sock"
	IOSocket = "keeper-io.sock"
)
