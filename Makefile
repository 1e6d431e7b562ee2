# pg_dedup_migrate: everything a person types. `make` alone lists it.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# rustup leaves cargo here; a shell that was open before does not know it yet.
export PATH := $(PATH):$(HOME)/.cargo/bin

# Which server: PG_CONFIG=/path/to/pg_config, else scripts/setup.sh finds or installs one.
ifdef PG_CONFIG
export PG_CONFIG
endif

TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
SIDECAR := $(TARGET_DIR)/release/pg-dedup-migrate
export SIDECAR

# Features of the extension crate for the server in use, once setup has found one.
PG_FEATURES = --no-default-features --features pg_dedup_migrate/pg$(shell . scripts/postgres.sh; pg_major "$$(find_pg_config)")

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## install what is missing (server, headers, libclang, cargo-pgrx)
	@scripts/setup.sh

.PHONY: demo
demo: install build ## migrate 126,000 real records between two private clusters and look at the result
	@scripts/demo.sh

.PHONY: demo-stop
demo-stop: ## stop and remove the demo's clusters
	@scripts/demo.sh stop

.PHONY: build
build: setup ## build the sidecar: target/release/pg-dedup-migrate
	cargo build --release --package pg-dedup-migrate-sidecar

.PHONY: install
install: setup ## install the extension into a server: make install PG_CONFIG=/path/to/pg_config
	scripts/install.sh

# The extension's own tests install a test build; the one to use has to come after them.
.PHONY: test
test: setup ## set up, then run every test
	cargo test --package pg_dedup_record --package pg_dedup_shared --package pg_dedup_throttle --package pg-dedup-migrate-sidecar
	scripts/extension_tests.sh
	$(MAKE) --no-print-directory install test-integration

.PHONY: test-integration
test-integration: build # the tests against private clusters alone, with the extension that is installed; TEST=name to choose
	scripts/test_tools.sh
	cargo build --package pg-dedup-migrate-sidecar --features failpoints
	PG_CONFIG="$$(scripts/setup.sh --pg-config)" PG_DEDUP_MIGRATE="$(abspath $(SIDECAR))" \
	    PG_DEDUP_MIGRATE_FAILPOINTS="$(abspath $(TARGET_DIR)/debug/pg-dedup-migrate)" \
	    cargo test --package integration $(if $(TEST),-- $(TEST))

.PHONY: bench
bench: install build ## compare with plain COPY, pgcopydb and the SQL everybody writes
	scripts/bench.sh

.PHONY: lint
lint: setup ## formatting, clippy with warnings denied, cargo deny when it is installed
	cargo fmt --all --check
	cargo clippy --workspace --all-targets $(PG_FEATURES) -- --deny warnings
	scripts/deny.sh

.PHONY: clean
clean: ## remove clusters, downloads and build results
	@scripts/demo.sh stop
	rm -rf .demo .bench
	cargo clean
