# Thin: each target is a line that calls a tool. State is in .lab/, which git ignores.
#
#   make up                             a real Kubernetes on this machine, and a model that answers (root)
#   make up MODE=control-plane          without root: control plane and simulated GPU nodes
#   make up KUBECONFIG=FILE [IMAGE_REGISTRY=HOST/PATH] [IMAGE_TAG=TAG]   on a cluster of your own
#   make down                           stop and remove all of it
#   make images                         build both images from their Dockerfiles
#   make tools                          kubelab, kubectl, coredns, kwok, helm and helm3 in .lab/bin
#   make test                           all tests; the end-to-end ones on a real node need root
#   make check                          format, lints as errors, generated files fresh
#   make bench-fleet                    measure the operator beside a bare client and rivals; docs/performance/fleet.json
#   make gen                            regenerate the CRD and its reference page
#   make bench-engine [LLAMA_CPP=no]    the CPU engine against this machine's limits and llama.cpp (built once, five minutes)
#   make gpu-bundle                     what a machine with a GPU needs for the check, in one archive under 40 MB
#   make gpu-check                      the check itself on this machine's GPU; FLAGS=--emulated tries it without one
#   make kernels                        rebuild the prebuilt CUDA images (installs a pinned nvcc from PyPI)

MODE ?= node
IMAGE_REGISTRY ?=
IMAGE_TAG ?= dev

UP_FLAGS = --root "$(CURDIR)" --mode "$(MODE)" --registry "$(IMAGE_REGISTRY)" --tag "$(IMAGE_TAG)"
# Only a KUBECONFIG given to make is meant; one of the environment may belong to another day's work.
ifeq ($(origin KUBECONFIG),command line)
UP_FLAGS += --kubeconfig "$(KUBECONFIG)"
endif

.PHONY: up down images tools

up down images tools: .lab/bin/up
	@.lab/bin/up $(UP_FLAGS) $@

.lab/bin/up: $(filter-out %_test.go,$(wildcard e2e/up/*.go)) e2e/up/go.mod
	@command -v go >/dev/null || { echo "cachalot: Go is not in PATH. Install Go 1.26 or newer (any from 1.21 on fetches it by itself); with sudo keep your PATH: sudo env \"PATH=\$$PATH\" make $(MAKECMDGOALS)" >&2; exit 1; }
	@mkdir -p .lab/bin
	@GOWORK=off CGO_ENABLED=0 go build -C e2e/up -buildvcs=false -o "$(CURDIR)/$@" .

.PHONY: test check gen kernels gpu-bundle gpu-check bench-engine bench-fleet

test:
	@e2e/test.sh

check:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features --locked -- -D warnings
	test -z "$$(gofmt -l e2e/kubelab e2e/up e2e/dashboards)"

# FLAGS="--plans-only" needs no tools; the rest needs those of `make tools`.
bench-fleet:
	cargo build --quiet --release --locked -p operator -p bench-fleet
	target/release/bench-fleet $(FLAGS)

gen:
	cargo run --quiet -p crds

kernels:
	python3 kernels/build.py

gpu-bundle:
	kernels/check/bundle.sh

gpu-check: gpu-bundle
	python3 .lab/gpu-check/gpu_check.py --out .lab/gpu-check-out $(FLAGS)

LLAMA_CPP ?= yes
LLAMA = .lab/llama

bench-engine:
ifeq ($(LLAMA_CPP),yes)
	python3 engine/bench/llama/build.py --config engine/bench/model/config.json --out $(LLAMA)
	cargo build --release --quiet --locked -p engine
	cargo run --release --quiet -p engine-bench -- --engine target/release/engine --llama-bench $(LLAMA)/build/bin/llama-bench --llama-models $(LLAMA)
else
	cargo build --release --quiet --locked -p engine
	cargo run --release --quiet -p engine-bench -- --engine target/release/engine
endif
