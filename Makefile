# Two commands matter: `make up` starts a cluster with a sample app, `make test` tests everything.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:

# Packages of Debian and Ubuntu that building or running needs.
BUILD_PACKAGES := build-essential pkg-config protobuf-compiler libseccomp-dev clang
RUN_PACKAGES := nftables iproute2 kmod curl
TEST_PACKAGES := busybox-static containerd

# How long the tests try fresh seeds of the simulator, and the seed that `make sim` replays.
SIM_SECONDS ?= 100
SEED ?= 1

KNARR := target/release/knarr
IMAGES := target/images

.PHONY: up down test check lint images packages test-packages release bench sim

up: packages release images ## Start the cluster and the sample app
	@$(KNARR) up --images $(CURDIR)/$(IMAGES)
	export KUBECONFIG=/var/lib/knarr/admin.kubeconfig
	$(KNARR) kubectl apply -f samples/hello.yaml
	$(KNARR) kubectl rollout status deployment/hello
	address=$$($(KNARR) kubectl get service hello -o jsonpath='{.spec.clusterIP}')
	echo
	echo "The sample app answers at http://$$address/ and on port 30080 of this machine:"
	curl -sS --max-time 5 "http://$$address/" | head -4
	echo
	echo "Type next:"
	echo "  $(KNARR) kubectl get pods -o wide"
	echo "  $(KNARR) kubectl scale deployment/hello --replicas=5"
	echo "  $(KNARR) down --purge --verify     to remove everything again"

down: ## Stop the cluster; its data stays
	$(KNARR) down

test: packages test-packages images ## Run everything that tests
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	# The simulator as the tests build it: another build would compile half the dependencies anew.
	cargo test --workspace --no-run
	target/debug/knarr-sim regressions
	target/debug/knarr-sim fresh --seconds $(SIM_SECONDS)
	cargo test --workspace --no-fail-fast

sim: ## Replay one seed of the simulator, with its trace: make sim SEED=1
	cargo run --quiet -p knarr-sim -- replay $(SEED)

lint: ## Formatting, clippy, licences
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	command -v cargo-deny >/dev/null && cargo deny check || echo "cargo-deny is not installed: licences were not checked"

release:
	cargo build --release -p knarr

images: packages ## Build the images of the sample and the tests
	cargo run --quiet -p xtask -- images --out $(IMAGES)

packages:
	@./scripts/packages $(BUILD_PACKAGES) $(RUN_PACKAGES)

test-packages:
	@./scripts/packages $(TEST_PACKAGES)

bench: release ## Measure the running cluster
	$(KNARR) bench
