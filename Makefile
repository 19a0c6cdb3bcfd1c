# The scenarios make network namespaces: demo, test and bench need root.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help build dist demo test soak coverage lint fmt man chart bench deps peers previous api-server cluster-programs kubernetes conformance

# Scenarios mostly wait, so more of them than cores run at once; many more would disturb each other.
TEST_THREADS ?= 6

help: ## List the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/    make \1\t\2/' | expand -t 20

# Release binaries name the commit that they were built at.
build demo bench: export MESHD_BUILD = $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)$(shell git rev-parse --short=12 HEAD 2>/dev/null | sed 's/.*/ (&)/')

build: ## Build the release binaries: meshd, meshctl, and meshd-cni in a profile of its own
	@scripts/install-deps --build
	cargo build --release --workspace --bins
	cargo build --profile cni -p cni

demo: deps ## Show a mesh of two sites at work, in network namespaces (KEEP=1 leaves it up)
	@cargo build --release --workspace --bins
	"$${CARGO_TARGET_DIR:-target}/release/demo"

test: deps lint peers previous api-server ## Everything that must pass: format, lints, documentation, unit, property and scenario tests
	@cargo build --workspace --bins --tests
	scripts/run-tests $(TEST_THREADS)

soak: ## Long seeded runs of the pure parts: first contacts of tunnels, histories of etcd, policies and meshes (hours; no root)
	@MESHD_CONTACTS="$${MESHD_CONTACTS:-100000}" cargo test -p tunnel --lib contacts
	MESHD_HISTORIES="$${MESHD_HISTORIES:-5000}" cargo test -p control-core --lib membership
	MESHD_HISTORIES="$${MESHD_HISTORIES:-5000}" cargo test -p enforcement --lib core
	MESHD_HISTORIES="$${MESHD_HISTORIES:-10000}" cargo test --release -p mesh-sim --lib
	scripts/planted-bugs
	echo "All runs passed."

coverage: ## Measure how much of the pure steps their unit tests reach (minutes; no root)
	@scripts/coverage

lint: deps ## Format, lints, documentation, scripts
	@cargo fmt --all --check
	cargo clippy --workspace --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS='-D warnings' cargo doc --workspace --no-deps --document-private-items
	scripts/unused-public
	scripts/language
	scripts/install-peers --lint
	PATH="$$(realpath "$${CARGO_TARGET_DIR:-target}")/tools/bin:$$PATH" cargo deny --log-level error check bans licenses sources
	scripts/chart --check
	for script in scripts/* .ci/run $$(git ls-files "integration/*.sh"); do bash -n "$$script"; done

fmt: ## Format the code
	@cargo fmt --all

dist: ## Make a release in target/dist: packages, static tarballs, SBOMs and checksums for amd64 and arm64 (half an hour)
	@scripts/dist

man: build ## Write manual pages and shell completions to target/man and target/completions
	@cd "$${CARGO_TARGET_DIR:-target}" && mkdir -p man completions
	for tool in meshd meshctl; do
		release/$$tool man man
		for shell in bash zsh fish; do release/$$tool completions $$shell >completions/$$tool.$$shell; done
	done

chart: ## Render deploy/kubernetes from the Helm chart and check both (builds helm once: minutes)
	@scripts/chart

kubernetes: cluster-programs ## Scenarios on a whole cluster in network namespaces (builds its programs once: minutes; NAME=… runs one)
	@cargo test -p integration --test cluster -- --test-threads=1 --nocapture $(NAME)

conformance: cluster-programs ## Suites of Kubernetes, network-policy-api and cyclonus on that cluster, into target/conformance (hours; NAME=… runs one)
	@scripts/install-kubernetes suites
	cargo test -p integration --test cluster -- --test-threads=1 --nocapture --ignored suites::$(NAME)

bench: deps ## Benchmarks of tunnel, policy and control plane, next to others (an hour; BENCH_QUICK=1 tries them out)
	@scripts/install-peers --bench
	@cargo build --release --workspace --bins
	PATH="$$(realpath "$${CARGO_TARGET_DIR:-target}")/tools/bin:$$PATH" cargo bench --workspace --all-features --bench '*'

deps:
	@scripts/install-deps

peers: deps
	@scripts/install-peers

previous: deps
	@scripts/install-previous

cluster-programs: deps api-server
	@scripts/install-deps --cluster
	scripts/install-kubernetes cluster
	scripts/install-kubernetes flannel
	scripts/install-helm
	cargo build --workspace --bins

api-server: deps
	@scripts/install-kubernetes
	@scripts/install-etcd
	@scripts/install-kubernetes definitions
