# Every go command runs with the same flags, so that one cache serves them all.
export GOFLAGS     := -trimpath -buildvcs=false
export CGO_ENABLED := 0

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
KUBE    := v1.36.3
LDFLAGS := -s -w \
  -X tutti.dev/tutti/internal/api.Version=$(VERSION) \
  -X k8s.io/component-base/version.gitVersion=$(KUBE) \
  -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36 \
  -X k8s.io/client-go/pkg/version.gitVersion=$(KUBE)

KEEPER := internal/keeper/embedded/tutti-keeper

.PHONY: build keeper
build: keeper
	go build -ldflags '$(LDFLAGS)' -o bin/tutti ./cmd/tutti

keeper:
	CGO_ENABLED=1 go build -tags 'seccomp netgo osusergo' -ldflags '-s -w -extldflags -static' -o $(KEEPER) ./cmd/tutti-keeper
