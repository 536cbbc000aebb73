# `make demo` and `make test` install everything they need into .venv. The report's tests need a browser besides: where
# there is none, root on Debian gets one; elsewhere they are skipped, and fail in CI.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := $(CURDIR)/demo
PACKAGES := orchestrator tasks pipelines serve
# Processes of `make test`: each takes whole files of tests, in their order (Ray and commands first: they last longest), and
# computes with one thread, or each would wait for the other's.
JOBS ?= 2

.PHONY: install browser demo test test-slow kill-matrix check bench load clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cluster,dev]'
	touch $@

# A fresh folder each time: a published task is never replaced. --alone trains the reference without privacy.
demo: export METAMORPHOSIS_HOME := $(DEMO)
demo: install
	rm -rf $(DEMO)
	$(BIN)/python pipelines/train.py --preset digits
	$(BIN)/python pipelines/add_task.py digit --epochs 8
	$(BIN)/python pipelines/evaluate.py --alone 8

browser:
	@command -v chromium > /dev/null || command -v chromium-browser > /dev/null || command -v google-chrome > /dev/null || \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null; then \
	    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium > /dev/null; \
	  else echo "no Chromium: the tests that open the report in a browser will be skipped"; fi

test: export OMP_NUM_THREADS := 1
test: install browser
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -m slow

kill-matrix: install
	$(BIN)/python tests/end_to_end/kill_matrix.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# Serving under load, with a replica killed each minute.
load: install
	$(BIN)/python tests/serve/load.py --minutes 15

bench: install
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@status=0; for file in benchmarks/*.py; do \
	  case $$file in */_*) continue;; esac; \
	  $(BIN)/python $$file || status=1; \
	done; exit $$status

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
