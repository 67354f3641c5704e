# The words that people and scripts rely on: deps build up tools test test-long test-v2 test-boot chaos fuzz conformance bench notices vet linkproof clean.

# Every go command runs with the same flags, so that one cache serves them all.
export GOFLAGS     := -trimpath -buildvcs=false
export CGO_ENABLED := 0

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
COMMIT  ?= $(shell git rev-parse HEAD 2>/dev/null)
KUBE    := v1.36.3
LDFLAGS := -s -w \
  -X tutti.dev/tutti/internal/api.Version=$(VERSION) \
  -X tutti.dev/tutti/internal/api.Commit=$(COMMIT) \
  -X k8s.io/component-base/version.gitVersion=$(KUBE) \
  -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36 \
  -X k8s.io/client-go/pkg/version.gitVersion=$(KUBE)

KEEPER := internal/keeper/embedded/tutti-keeper

# What a bare Debian 12 lacks: gcc to git are for building, nftables
# carries Services, iproute2 and busybox-static are for the tests and images,
# python3-kubernetes is a client that the tests drive.
PACKAGES := gcc libc6-dev libseccomp-dev pkg-config git nftables iproute2 busybox-static python3-kubernetes

.NOTPARALLEL:

.PHONY: build
build: keeper
	go build -ldflags '$(LDFLAGS)' -o bin/tutti ./cmd/tutti

# The keeper is embedded in tutti: it must be there before anything of Go looks at the tree.
KEEPERTAGS := seccomp netgo osusergo
.PHONY: keeper
keeper:
	CGO_ENABLED=1 go build -tags '$(KEEPERTAGS)' -ldflags '-s -w -extldflags -static' -o $(KEEPER) ./cmd/tutti-keeper

.PHONY: deps
deps:
	@missing=$$(for p in $(PACKAGES); do \
		dpkg-query -W -f='$${db:Status-Status}' $$p 2>/dev/null | grep -qx installed || echo $$p; done); \
	[ -n "$$missing" ] || exit 0; \
	command -v apt-get >/dev/null || { echo "make deps knows Debian; install the like of:" $$missing >&2; exit 1; }; \
	[ "$$(id -u)" = 0 ] || { echo "make deps must run as root to install:" $$missing >&2; exit 1; }; \
	echo "installing" $$missing; \
	export DEBIAN_FRONTEND=noninteractive; \
	apt-get -qq install -y --no-install-recommends $$missing >/dev/null 2>&1 || \
		{ apt-get -qq update && apt-get -qq install -y --no-install-recommends $$missing; }

# Other people's programs, unmodified, as the end-to-end tests drive them: those
# of Go are each pinned by a go.mod of its own, kubectl by ours.
# What upstream's suite of conformance needs is not among them: see there.
TOOLS := $(filter-out e2e coredns,$(notdir $(patsubst %/,%,$(dir $(wildcard test/tools/*/go.mod)))))
.PHONY: tools
tools: $(addprefix dist/tools/,$(TOOLS) kubectl debian)

$(addprefix dist/tools/,$(TOOLS)): dist/tools/%: test/tools/%/go.mod
	cd test/tools/$* && go build -tags '$(TAGS_$*)' -o $(CURDIR)/$@ tool

dist/tools/operator: $(wildcard test/tools/operator/*.go)

dist/tools/csidriver: test/tools/csidriver/main.go

# Of what Prometheus can discover, only Kubernetes: its own tags leave out the clouds.
TAGS_prometheus := remove_all_sd enable_kubernetes_sd

# Those that need Debian's libraries, or a daemon, come from its packages and are not installed.
dist/tools/debian: test/tools/debian/fetch test/tools/debian/packages
	@mkdir -p dist/tools
	test/tools/debian/fetch $(CURDIR)/$@ packages

# What systemd would run: the end-to-end tests import their units.
dist/tools/services: test/tools/debian/fetch test/tools/debian/services
	@mkdir -p dist/tools
	test/tools/debian/fetch $(CURDIR)/$@ services

dist/tools/kubectl: go.mod
	go build -ldflags '$(LDFLAGS)' -o $@ k8s.io/kubernetes/cmd/kubectl

# The images of the examples are made again only when their sources changed.
SHOP := dist/shop
.PHONY: up images
images:
	@$(MAKE) --no-print-directory -C examples/shop DIST=$(CURDIR)/$(SHOP)
	@$(MAKE) --no-print-directory -C examples/museum DIST=$(CURDIR)/dist/museum

up: deps build images
	@echo starting this machine
	@bin/tutti up >/dev/null
	@bin/tutti image load $(SHOP)/*.tar >/dev/null
	@env -u KUBECONFIG bin/tutti up examples/shop

# What CI runs. Everything but the end-to-end tests may come from Go's cache of results.
.PHONY: vet test test-unit test-e2e test-long
test: deps build vet test-unit test-e2e

vet: keeper
	@bad=$$(gofmt -l cmd internal test bench examples); [ -z "$$bad" ] || { echo "gofmt these:" $$bad >&2; exit 1; }
	go vet ./...
	CGO_ENABLED=1 go vet -tags '$(KEEPERTAGS)' ./cmd/tutti-keeper ./internal/keeper/server
	cd examples/shop && go vet ./...
	cd examples/museum && go vet ./...
	cd test/tools/operator && go vet ./...

test-unit: keeper
	cd examples/shop && go test ./...
	cd examples/museum && go test ./...
	CGO_ENABLED=1 go test -tags '$(KEEPERTAGS)' -timeout 5m ./internal/keeper/server
	go test -short -timeout 20m $$(go list ./... | grep -v /test/e2e)

test-e2e: build images tools
	go test -short -v -p 1 -count=1 -timeout 30m ./test/e2e/...

test-long: deps build images tools dist/tools/services
	go test -count=1 -timeout 150m ./test/e2e/...

# Server and keeper are killed, held and replaced while pods come and go: KILLS blows,
# by the plan that SEED gives if it is set. A blow takes about five seconds.
KILLS ?= 200
.PHONY: chaos
chaos: deps build
	TUTTI_CHAOS_KILLS=$(KILLS) TUTTI_CHAOS_SEED=$(SEED) go test -count=1 -v -timeout 120m -run '^TestChaos$$' ./test/e2e

# A minute for each thing that reads foreign bytes; FUZZ_TIME says how long.
# What is found stays in the package's testdata, and is a test from then on.
FUZZ_TIME ?= 1m
# In memory, since nothing of it must survive; and what is found is made small
# in few steps, or the minute would go into that.
FUZZ := TMPDIR=/dev/shm go test -run '^$$' -fuzztime $(FUZZ_TIME) -fuzzminimizetime 20x
.PHONY: fuzz
fuzz: keeper
	$(FUZZ) -fuzz '^FuzzLayer$$' ./internal/image
	$(FUZZ) -fuzz '^FuzzArchive$$' ./internal/image
	$(FUZZ) -fuzz '^FuzzStream$$' ./internal/image
	$(FUZZ) -fuzz '^FuzzSubPath$$' ./internal/agent/podvolume
	$(FUZZ) -fuzz '^FuzzTerminationMessage$$' ./internal/agent/podvolume
	$(FUZZ) -fuzz '^FuzzLogs$$' ./internal/agent/serve
	$(FUZZ) -fuzz '^FuzzLookup$$' ./internal/dns
	CGO_ENABLED=1 $(FUZZ) -tags '$(KEEPERTAGS)' -fuzz '^FuzzCRI$$' ./internal/keeper/server
	CGO_ENABLED=1 $(FUZZ) -tags '$(KEEPERTAGS)' -fuzz '^FuzzMessages$$' ./internal/keeper/server
	CGO_ENABLED=1 $(FUZZ) -tags '$(KEEPERTAGS)' -fuzz '^FuzzRecord$$' ./internal/keeper/server

# Boots Debian's kernel in QEMU, with control groups of version 2 only, twice: for
# the tests of runtime and keeper, and with systemd and tutti agent, whose control
# plane is on this machine. Takes a quarter of an hour.
.PHONY: test-v2
test-v2: build
	test/vm/run
	test/vm/disk
	TUTTI_V2=$(CURDIR)/dist/v2 go test -count=1 -v -timeout 40m -run '^TestV2$$' ./test/e2e
	@echo 'v2: all passed'

# Boots Debian with systemd in QEMU, installs, reboots, uninstalls. Takes a quarter of an hour.
.PHONY: test-boot
test-boot: build
	test/boot/run

# Upstream's own tests of Kubernetes, unmodified, against bin/tutti on a throwaway
# machine. FOCUS and SKIP are regular expressions of cases, SHARD is i/n, EACH=n
# takes n of each area, CLASS forces all pods of the cases into a RuntimeClass. What
# has passed is not run again unless AGAIN=1. The first build takes minutes.
.PHONY: conformance conformance-ci conformance-page
SUITE := dist/conformance/bin
SUITE_ginkgo := github.com/onsi/ginkgo/v2/ginkgo
SUITE_agnhost := k8s.io/kubernetes/test/images/agnhost
SUITE_nonewprivs := k8s.io/kubernetes/test/images/nonewprivs
SUITE_sample-apiserver := k8s.io/sample-apiserver
SUITE_etcd := go.etcd.io/etcd/server/v3
SUITEPROGRAMS := $(addprefix $(SUITE)/,ginkgo agnhost nonewprivs sample-apiserver etcd)
JUDGE := $(SUITE)/conformance $(if $(CLASS),-class '$(CLASS)') $(if $(FOCUS),-focus '$(FOCUS)') $(if $(SKIP),-skip '$(SKIP)')
conformance: deps build dist/tools/kubectl $(SUITE)/e2e.test $(SUITEPROGRAMS) $(SUITE)/coredns
	go build -ldflags '-s -w' -o $(SUITE)/ ./test/conformance ./test/conformance/pause
	$(JUDGE) $(if $(SHARD),-shard '$(SHARD)') $(if $(EACH),-each '$(EACH)') $(if $(AGAIN),-again) $(if $(PROCS),-procs '$(PROCS)') $(if $(LIMIT),-limit '$(LIMIT)') \
		-upstream "$$(cd test/tools/e2e && go list -m -f '{{.Dir}}' k8s.io/kubernetes)"

# What CI runs of it: two cases of each area, so that no feature goes unjudged,
# without those that want the machine for themselves and those that mostly wait.
CISKIP := \[Serial\]|\[Slow\]|\[Disruptive\]|not\* be restarted|monotonically|CronJob|Pod Generation|phased rolling|resourcequota status|Definition Watch|untainted
conformance-ci:
	@$(MAKE) --no-print-directory conformance EACH=2 AGAIN=1 LIMIT=10m SKIP='$(CISKIP)'

# From all that has been run here: docs/conformance.md.
conformance-page: $(SUITE)/e2e.test
	go build -ldflags '-s -w' -o $(SUITE)/ ./test/conformance
	$(JUDGE) -page docs/conformance.md

$(SUITE)/e2e.test: test/tools/e2e/go.mod
	cd test/tools/e2e && go test -c -ldflags '$(LDFLAGS)' -o $(CURDIR)/$@ k8s.io/kubernetes/test/e2e

$(SUITEPROGRAMS): test/tools/e2e/go.mod
	cd test/tools/e2e && go build -ldflags '-s -w' -o $(CURDIR)/$@ $(SUITE_$(@F))

$(SUITE)/coredns: test/tools/coredns/go.mod test/tools/coredns/main.go
	cd test/tools/coredns && go build -ldflags '-s -w' -o $(CURDIR)/$@ .

# JSON lines in dist/bench.jsonl and a table here; BENCH_COLD=1 adds a build with an empty cache.
.PHONY: bench
bench: deps build
	@mkdir -p dist
	go run ./bench -o dist/bench.jsonl

# One go.mod serves everything that tutti means to link: this builds it all.
.PHONY: linkproof
linkproof:
	go build -tags linkproof -o /dev/null ./test/linkproof

.PHONY: notices
notices: keeper
	go run ./test/notices -o THIRD_PARTY_NOTICES

.PHONY: clean
clean:
	rm -rf bin dist $(KEEPER)
