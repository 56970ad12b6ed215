# Words: setup fmt lint types test test-slow test-long test-cluster demo evidence bench
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Test processes at a time; a file's tests stay in one of them.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
export RAY_USAGE_STATS_ENABLED=0
export HF_HUB_OFFLINE=1
# Each of the many processes would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: setup fmt lint types test test-slow test-long test-cluster demo evidence bench
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
# Tests compare merge methods with its functions; what the rest of it needs is not wanted here.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps mergekit
	touch $(STAMP)

fmt: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

test: lint types
	$(PYTEST) --durations=10

# Only files with such tests are read; the name of each test is printed as it ends.
SLOW_FILES = $$(grep -rl --include='test_*.py' 'mark\.slow' tests)
test-slow: setup
	$(PYTEST) $(SLOW_FILES) -m "slow and not long" --timeout=900 --durations=20 -v

# Those of them that are left out of CI, whose time is limited.
test-long: setup
	$(PYTEST) $(SLOW_FILES) -m long --timeout=900 --durations=20 -v

# As root: three hosts with networks of their own on this machine, `ray up` on them, a job, and every fault.
test-cluster: setup
	$(BIN)/python -m pytest -m rehearsal --timeout=1500 -s tests/cluster

demo: setup
	$(BIN)/safetydpo demo

evidence: setup
	$(BIN)/safetydpo evidence

# Those that need no GPU and no finished run, one after the other; each prints one line of JSON. The rest (GPU, a
# finished run, hours) stand in benchmarks/, each with its command at the top of its file.
BENCHMARKS := train merge prompt_import fused_drawing picture_features cached_reference evaluate evaluate_report
bench: setup
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.pairs --parts speed --rounds 1
