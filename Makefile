# Every command works in a fresh clone: it makes .venv first. Another Python: make run PYTHON=python3.12
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
RUN    := $(VENV)/.run
TEST   := $(VENV)/.test
MINE   := $(wildcard nbs/reports/*.ipynb)
TESTS  := SELECTBENCH_SIZE=small SELECTBENCH_CACHE=$(CURDIR)/build/cache
SUM    := find nbs figures -type f -not -path '*/.ipynb_checkpoints/*' -exec cksum {} + 2>/dev/null | sort | cksum

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help run test test-browser lint notebooks unit validate new lab docs reports export clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

run: $(RUN)  ## install the package into .venv and run the tour
	@$(BIN)/selectbench run tour

test: $(TEST)  ## everything that must hold: lint, site, notebooks, then pytest
	@$(MAKE) --no-print-directory lint docs notebooks unit

lint: $(TEST)  ## ruff
	@$(BIN)/ruff check selectbench nbs tests docs benchmarks

notebooks: $(TEST)  ## run every notebook, reports at small size
	@before="$$($(SUM))"; $(TESTS) OMP_NUM_THREADS=1 $(BIN)/python tests/notebooks.py \
	  && test "$$before" = "$$($(SUM))" || { echo "a notebook failed, or wrote into nbs or figures at small size"; exit 1; }

unit: $(TEST)  ## pytest
	@$(TESTS) $(BIN)/python -m pytest

test-browser: $(TEST)  ## the widgets and the site in a real browser; installs chromium on Debian
	@command -v chromium || command -v chromium-browser || command -v google-chrome \
	  || { root=$$(test "$$(id -u)" = 0 || echo sudo); \
	       $$root apt-get update && $$root apt-get install --yes --no-install-recommends chromium; }
	@$(TESTS) SELECTBENCH_BROWSER=1 $(BIN)/python -m pytest tests/test_browser.py tests/test_site.py

validate: $(TEST)  ## check one method and run its notebook: make validate NAME=k_center
	@$(BIN)/selectbench validate $(NAME)

new: $(TEST)  ## draft a notebook from a row of the atlas: make new KEY=disco
	@$(BIN)/selectbench new-method $(KEY)

lab: $(TEST)  ## open JupyterLab on the notebooks
	@$(BIN)/selectbench lab

docs: $(TEST)  ## build the site into _docs
	@$(BIN)/python docs/build.py site

reports: $(TEST)  ## run the reports again at full size, in place, and the tour for the home page
	@for nb in $(MINE); do \
	  SELECTBENCH_SIZE=full $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace $$nb \
	  && $(BIN)/nbdev_clean --fname $$nb && echo "$$nb done" || exit 1; done
	@$(BIN)/python docs/build.py tour

export: $(TEST)  ## write the package, the list of methods and README from the notebooks
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean
	@$(BIN)/python -c "from selectbench.core.registry import write_index; write_index()"
	@$(BIN)/python docs/build.py readme

clean:  ## remove what is built; keep .venv and runs
	@rm -rf build _docs .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "selectbench needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2])'
	@$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing selectbench into $(VENV) (some minutes the first time)"
	@$(PIP) --editable .
	@touch $@

$(TEST): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing selectbench and what its tests need into $(VENV) (some minutes the first time)"
	@$(PIP) --editable '.[dev,docs,dask]'
	@touch $(RUN) $@
