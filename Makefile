# make demo   one prompt answered by a model split over three daemons on this machine
# make test   every check and test of the project
# Both set up everything they need in .venv; PYTHON=/path/to/python3.12 picks the interpreter.

.DEFAULT_GOAL := help
.PHONY: help python-found setup setup-dev setup-torch demo test test-torch lint format bench \
  bench-backends lock clean distclean
MAKEFLAGS += --no-print-directory
# The tests start hundreds of processes: each would compile all it imports.
unexport PYTHONDONTWRITEBYTECODE

# The first Python that is new enough; `make PYTHON=...` overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)

BIN := .venv/bin
SOURCES := base native consensus sharding inference node cli benchmarks simulations
CHECKED := $(SOURCES) tests tools
# cargo's test programs link against the Python of the virtual environment
CARGO = PYO3_PYTHON="$$PWD/$(BIN)/python" \
  LD_LIBRARY_PATH="$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("LIBDIR") or "")'):$$LD_LIBRARY_PATH" \
  cargo
# With PYTEST_FLAGS="-k something" some of the runs may have no test (5).
none_ok = $(if $(PYTEST_FLAGS),|| [ $$? -eq 5 ])
together = $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)
step = @printf '\n--- %s\n' "$(1)"

help:
	@sed -n 's/^# //p' Makefile | head -3
	@echo "Also: setup, setup-torch, test-torch, lint, format, bench, bench-backends, lock, clean,"
	@echo "distclean."

python-found:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "error: no Python 3.11 or newer was found. Install one:" >&2; \
	  echo "    Debian, Ubuntu: sudo apt-get install python3 python3-venv python3-dev" >&2; \
	  echo "    Fedora:         sudo dnf install python3 python3-devel" >&2; \
	  echo "    macOS:          brew install python@3.13" >&2; \
	  echo "or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; fi

setup: python-found
	@"$(PYTHON)" tools/bootstrap.py

setup-dev: python-found
	@"$(PYTHON)" tools/bootstrap.py --dev

# torch in an environment of its own, .venv-torch: about 5 GB.
setup-torch: python-found
	@"$(PYTHON)" tools/bootstrap.py --dev --torch

demo: setup
	@$(BIN)/pyagent-node demo --nodes 3 --prompt "Name three rivers." --max-tokens 48 \
	  --seed 7 --temperature 0.8

# Each on a core of its own; where make can (4.0), what each says is shown in one piece.
CHECKS = check-rust check-pyright check-mypy check-style check-imports
.PHONY: $(CHECKS) test-rust
lint: setup-dev
	@$(MAKE) -j 2 $(together) $(CHECKS)

# Tests run beside each other: threads of small matrices would wait for each other by spinning.
test: export OPENBLAS_NUM_THREADS = 1
test: setup-dev
	@$(MAKE) -j 2 $(together) test-rust $(CHECKS)
	$(call step,pytest: as many tests at once as there are cores)
	@$(BIN)/pytest -n logical --maxprocesses 8 --dist worksteal -m "not alone and not daemons" \
	  $(PYTEST_FLAGS) $(none_ok)
	$(call step,pytest: tests with daemons)
	@$(BIN)/pytest -n logical --maxprocesses 2 --dist loadfile --no-loadscope-reorder \
	  -m "daemons and not alone" $(PYTEST_FLAGS) $(none_ok)
	$(call step,pytest: tests that must be alone)
	@$(BIN)/pytest -m alone $(PYTEST_FLAGS) $(none_ok)

check-style:
	$(call step,ruff)
	@$(BIN)/ruff check $(CHECKED)
	@$(BIN)/ruff format --check $(CHECKED)

check-mypy:
	$(call step,mypy)
	@$(BIN)/mypy -p pyagent_node

check-pyright:
	$(call step,pyright)
	@$(BIN)/pyright

check-imports:
	$(call step,import contracts)
	@$(BIN)/lint-imports

check-rust:
	$(call step,rustfmt and clippy)
	@cargo fmt --check
	@$(CARGO) clippy --quiet --locked --all-targets -- -D warnings

test-rust: check-rust
	$(call step,cargo test)
	@$(CARGO) test --quiet --locked

# The tests that need torch; the others of the same files run in `make test`.
TORCH_TESTS = tests/unit/torch_backend tests/conformance/backends \
  tests/integration/test_mixed_backends.py tests/integration/test_mixed_daemons.py
test-torch: setup-torch
	$(call step,pytest: the torch backend)
	@.venv-torch/bin/python -m pytest -m torch $(TORCH_TESTS) $(PYTEST_FLAGS) $(none_ok)

format: setup-dev
	@$(BIN)/ruff check --fix $(CHECKED)
	@$(BIN)/ruff format $(CHECKED)
	@cargo fmt

bench: setup
	@$(BIN)/pyagent-node bench pipeline --ranks 1,2,3

# All three backends beside transformers and mlx-lm; JSON on standard output.
bench-backends: setup-torch
	@.venv-torch/bin/python -m pyagent_node.cli.main bench backends --json

COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-emit-index-url \
  --custom-compile-command "make lock" $(LOCK_FLAGS)

# Versions stay as they are; `make lock LOCK_FLAGS=--upgrade` takes the newest.
lock: setup-dev
	@$(COMPILE) --generate-hashes pyproject.toml -o requirements/lock.txt
	@$(COMPILE) --generate-hashes pyproject.toml --extra context --extra mlx --group dev -c requirements/lock.txt \
	  -o requirements/lock-dev.txt
	@$(COMPILE) --generate-hashes requirements/torch.in -c requirements/lock-dev.txt \
	  -o requirements/lock-torch.txt
	@$(COMPILE) --generate-hashes --allow-unsafe requirements/build.in -o requirements/build.txt
	@$(COMPILE) --allow-unsafe requirements/build-constraints.in \
	  -o requirements/build-constraints.txt

clean:
	rm -rf build dist target .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	rm -f native/_native*.so

distclean: clean
	rm -rf .venv .venv-torch
