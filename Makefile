# What one types here. `make` alone lists it. Go is needed, and Python 3 with pip for Envoy and for generated code; all
# else is fetched by version and hash into .cache, and nothing is installed outside this folder.

SHELL := bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules
.DELETE_ON_ERROR:

GO ?= go
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
COMMANDS := $(sort $(dir $(wildcard cmd/*/main.go)))
TAGS := integration,envoy,cluster

# Envoy: empty lets the demo and the tests go on without it where it cannot be had; "required" makes that a failure.
ENVOY ?=
FUZZTIME ?= 20s
# What the race detector is run on: the packages in which goroutines meet.
RACE ?= ./agent/... ./attestor/... ./ca/... ./cmd/... ./internal/... ./sds/...
# What is tested once more with Go's FIPS 140-3 module, beside the real processes. It has no entropy inside a synctest
# bubble, so the packages whose tests live in one are left to those.
FIPS ?= ./attestor/... ./ca/...
# The database of govulncheck: empty asks its own, else a folder or a .tgz of one.
VULNDB ?=

STATICCHECK := $(GO) tool -modfile=tools/go.mod staticcheck

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

.PHONY: build
build: need-go ## the binaries, into bin/
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '-X main.version=$(VERSION)' -o bin/ $(COMMANDS:%=./%)

# When and from what the sources were made, for the images: the same values make the same bytes, on any machine.
SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null)
# What the images' names begin with.
REPOSITORY ?= localhost
# For their tests: -short leaves out the build with an empty cache, which takes two minutes and more.
IMAGESFLAGS ?=

.PHONY: images
images: .cache/images ## container images for amd64 and arm64 with SBOMs, as OCI archives, into bin/images/
	@nice .cache/images -go '$(GO)' -version '$(VERSION)' -revision '$(REVISION)' -created '$(SOURCE_DATE_EPOCH)' -repository '$(REPOSITORY)'

.PHONY: demo
demo: build envoy ## build, then the whole thing on this machine: a CA, agents, Envoys that speak mTLS
	@bin/signet demo $(DEMOFLAGS)

.PHONY: envoy
envoy: ## the pinned Envoy, into .cache/
	@if command -v python3 >/dev/null; then scripts/fetch.py envoy $(if $(ENVOY),--require) >/dev/null; else \
	  echo "no envoy: there is no 'python3' here; \`signet demo\` will use Go peers" >&2; $(if $(ENVOY),exit 1,:); fi

# ---- tests

.PHONY: test
test: build envoy .cache/testsum ## every test that needs no cluster, with the real Envoy
	@scripts/test.sh $(TESTFLAGS)

.PHONY: race
race: .cache/testsum ## the race detector over the packages in which goroutines meet
	@command -v gcc >/dev/null || command -v cc >/dev/null || { echo 'make race: the race detector needs a C compiler' >&2; exit 1; }
	@CGO_ENABLED=1 .cache/testsum -race -short -count=1 $(RACE)

.PHONY: fips
fips: build .cache/testsum ## what touches keys, and the real processes, with Go's FIPS 140-3 module on
	@GODEBUG=fips140=on SIGNET_BIN=$(CURDIR)/bin .cache/testsum -short -count=1 $(FIPS) -- -count=1 -tags=integration ./integration/endtoend

.PHONY: faults
faults: build .cache/testsum ## the CA killed and failed at every call that touches its files: all of them, where `make test` takes a part
	@SIGNET_FAULTS=all SIGNET_BIN=$(CURDIR)/bin .cache/testsum -count=1 -timeout 120m -tags=integration ./integration/faults

# For `make soak`: so many rotations, one after the other; SEED repeats what one run drew by chance. SOAKFLAGS: see integration/soak.
ROTATIONS ?= 20
SEED ?=
SOAKFLAGS ?=

.PHONY: soak
soak: build envoy .cache/soak ## root rotations under traffic of real Envoys and Go peers, with kills; ends with 1 if a handshake failed
	@.cache/soak --bin bin --envoy "$${SIGNET_ENVOY:-$$(ls -d "$(CURDIR)"/.cache/envoy/*/envoy 2>/dev/null | tail -n 1)}" --rotations $(ROTATIONS) $(SEED:%=--seed %) $(SOAKFLAGS)

# For an existing cluster instead: its kubeconfig, said on the command line (the environment's could be anybody's), and the
# registry in which it finds images, HOST[:PORT][/PATH]: ours and those of the tests are pushed there, as whom `docker login`
# says. NODES=skip leaves out what needs root, HELM=skip what needs Helm, which takes five minutes of a processor to build.
# For the tests of the cluster: -update writes golden files anew. E2E_LONG=1 adds what takes long. PREVIOUS is the commit from which
# is upgraded, where another one is meant than the one released last.
E2EFLAGS ?=
e2e_kubeconfig := $(if $(filter command,$(firstword $(origin KUBECONFIG))),$(abspath $(KUBECONFIG)))
e2e_helm := $(if $(filter skip,$(NODES) $(HELM)),,.cache/helm)

.PHONY: e2e
e2e: build images envoy .cache/testsum $(e2e_helm) $(if $(e2e_kubeconfig),.cache/push) ## tests on a real Kubernetes of two nodes (root); building that takes 15 to 20 minutes, once
	@cluster=$$(GO="$(GO)" scripts/cluster.sh $(if $(filter skip,$(NODES))$(e2e_kubeconfig),,nodes)) && previous=$$(GO="$(GO)" scripts/previous.sh) && \
	rm -f bin/e2e-figures.txt && trap 'cat bin/e2e-figures.txt 2>/dev/null' EXIT && \
	SIGNET_FIGURES="$(CURDIR)/bin/e2e-figures.txt" SIGNET_CLUSTER="$$cluster" SIGNET_PREVIOUS="$$previous" SIGNET_BIN="$(CURDIR)/bin" SIGNET_IMAGES="$(CURDIR)/bin/images" SIGNET_NODES="$(NODES)" \
	SIGNET_KUBECONFIG="$(e2e_kubeconfig)" SIGNET_REGISTRY="$(REGISTRY)" SIGNET_PUSH="$(CURDIR)/.cache/push" SIGNET_HELM="$(e2e_helm:%=$(CURDIR)/%)" SIGNET_ENVOY="$$(ls -d "$(CURDIR)"/.cache/envoy/*/envoy 2>/dev/null | tail -n 1)" \
	.cache/testsum -count=1 -tags=cluster -timeout 30m ./integration/controlplane -- \
	  -count=1 -tags=cluster -timeout 40m ./integration/nodes $(E2EFLAGS)

.PHONY: images-test
images-test: .cache/testsum ## the images built again elsewhere are the same, can be pushed, and run in a containerd (where there is one, as root)
	@nice .cache/testsum -C tools -count=1 -timeout 20m $(IMAGESFLAGS) ./images ./push

.PHONY: chart-test
chart-test: .cache/testsum ## the Helm chart yields what is on record, and what `signet install` prints
	@.cache/testsum -C tools/chart -count=1 .

.PHONY: fuzz
fuzz: need-go ## every fuzz target, FUZZTIME each (20s)
	@grep -rE --include='*_test.go' --exclude-dir=.cache -o '^func Fuzz[A-Za-z0-9_]+' . | sort | while IFS=: read -r file func; do \
	  echo "$${func#func } in $$(dirname "$$file")"; \
	  $(GO) test -run '^$$' -fuzz "^$${func#func }\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x "$$(dirname "$$file")" </dev/null || exit 1; \
	done

.PHONY: cover
cover: need-go ## which statements the tests reach, into coverage.out
	$(GO) test -short -coverprofile=coverage.out -coverpkg=./... ./...
	@$(GO) tool cover -func=coverage.out | tail -1

# ---- speed

# For `make bench`: OUT=FILE writes the figures as JSON, ONLY=NAME,... takes some benches, ROUNDS=N each figure so often. Its TokenReviews
# need a real API server (see e2e): REVIEW=required builds one where there is none, REVIEW=skip leaves them out; else they are refused then.
REVIEW ?=
OUT ?=
ONLY ?=
ROUNDS ?=
bench_flags = $(ONLY:%=--only %) $(ROUNDS:%=--rounds %)
bench_cluster = $(if $(filter skip,$(REVIEW)),,$$(GO="$(GO)" scripts/cluster.sh $(if $(filter required,$(REVIEW)),,built)))

.PHONY: bench
bench: build .cache/bench ## how fast it is, beside bare cryptography, in about 10 minutes; ends with 3 if it refused figures (noise)
	@SIGNET_CLUSTER="$(bench_cluster)" .cache/bench $(bench_flags) $(OUT:%=--out %)

.PHONY: benchmarks
benchmarks: build .cache/bench ## the same, and docs/benchmarks.md from it; to be committed together with docs/benchmarks.json
	@code=0; SIGNET_CLUSTER="$(bench_cluster)" .cache/bench $(bench_flags) --out docs/benchmarks.json || code=$$?; \
	case $$code in 0|3) .cache/bench --render docs/benchmarks.json --out docs/benchmarks.md;; esac; exit $$code

.PHONY: bench-guard
bench-guard: build .cache/bench ## fails where a ratio has become worse by more than a fifth; KEEP=1 commits to those of now
	@.cache/bench --short $(ROUNDS:%=--rounds %) --guard integration/bench/testdata/ratios.json $(if $(KEEP),--keep)

# ---- checks

.PHONY: lint
lint: fmt vet fix tidy staticcheck warnings vuln ## every check of the sources, the vulnerability database included

.PHONY: fmt
fmt: need-go
	@bad=$$(git ls-files -z --cached --others --exclude-standard '*.go' | xargs -0 -r ls -d 2>/dev/null | xargs -r gofmt -l); \
	[ -z "$$bad" ] || { echo "gofmt: not formatted:" $$bad >&2; exit 1; }

.PHONY: vet
vet: need-go
	$(GO) vet ./...
	$(GO) vet -tags=$(TAGS) ./...
	$(GO) vet -C tools ./...
	$(GO) vet -C tools/chart ./...

.PHONY: fix
fix: need-go
	$(GO) fix -diff ./...
	$(GO) fix -diff -tags=$(TAGS) ./...
	$(GO) fix -C tools -diff ./...
	$(GO) fix -C tools/chart -diff ./...

.PHONY: tidy
tidy: need-go
	$(GO) mod tidy -diff
	$(GO) mod verify
	$(GO) mod tidy -C tools -diff
	$(GO) mod tidy -C tools/chart -diff

.PHONY: staticcheck
staticcheck: need-go
	$(STATICCHECK) -tags=$(TAGS) ./...
	$(GO) tool -C tools staticcheck ./...
	cd tools/chart && $(GO) tool -modfile=../go.mod staticcheck ./...

.PHONY: warnings
warnings: need-go # sizes and reasons: alarms that do not fail
	@$(GO) test -count=1 -v -run '^TestWarn' ./internal/arch | grep -o 'warning: .*'; true

.PHONY: vuln
vuln: need-go
	@GO="$(GO)" scripts/vuln.sh "$(VULNDB)" -tags=$(TAGS) ./...

# ---- generated code and documents

.PHONY: generate
generate: need-go need-python ## the code of api/v1, the generated pages of docs/, the renderings of the Helm chart
	buf=$$(scripts/fetch.py buf --require) && BUF_CACHE_DIR=$(CURDIR)/.cache/buf-cache "$$buf" generate
	$(GO) test -count=1 -run 'TestConformance|TestReasons|TestThreats|TestConfig' ./internal/arch -update
	$(GO) test -count=1 -run TestAuthorization ./ca -update
	$(GO) test -C tools/chart -count=1 -run 'TestInstallRendering|TestGolden' . -update

# ---- the rest

.PHONY: clean
clean: ## remove what was built; .cache, with what was fetched, stays
	rm -rf bin coverage.out .cache/bench .cache/soak .cache/testsum .cache/images .cache/push .cache/helm

.PHONY: need-go need-python
need-go:
	@command -v $(GO) >/dev/null || { echo "make: there is no '$(GO)' here; install Go $$(awk '/^go /{print $$2}' go.mod) or later" >&2; exit 1; }

need-python:
	@command -v python3 >/dev/null || { echo "make: there is no 'python3' here; Envoy and buf come as its packages" >&2; exit 1; }

.cache/testsum: need-go $(wildcard scripts/testsum/*.go internal/canary/*.go)
	@mkdir -p .cache
	@$(GO) build -o $@ ./scripts/testsum

.PHONY: .cache/bench
.cache/bench: need-go # always: what it measures with are our own packages
	@mkdir -p .cache
	@$(GO) build -o $@ ./integration/bench

.PHONY: .cache/soak
.cache/soak: need-go # always: what it runs with are our own packages
	@mkdir -p .cache
	@$(GO) build -o $@ ./integration/soak

.cache/images: need-go $(wildcard tools/images/*.go) tools/go.mod
	@mkdir -p .cache
	@$(GO) build -C tools -o $(CURDIR)/$@ ./images

.cache/push: need-go $(wildcard tools/push/*.go) tools/go.mod
	@mkdir -p .cache
	@$(GO) build -C tools -o $(CURDIR)/$@ ./push

.cache/helm: need-go tools/chart/go.mod
	@mkdir -p .cache
	@CGO_ENABLED=0 nice $(GO) build -C tools/chart -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ helm.sh/helm/v4/cmd/helm
