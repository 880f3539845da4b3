# Two commands do all the set-up on a machine with Python >= 3.11 and make:
#   make reproduce    the main job
#   make test         every check
# Both create .venv in this folder on their first run and use it afterwards.

VENV  := .venv
BIN   := $(VENV)/bin
READY := $(VENV)/.ready

# make reproduce PROFILE=full ALL=1 ARGS="-p bits=64"
PROFILE ?= quick
ALL     ?=
ARGS    ?=

# the first Python that is new enough and can make environments (Debian keeps venv in a package of its own)
PYTHON  ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$python && break; done)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# threads that wait soon sleep instead of keeping a core busy: on a machine that is shared, up to ten times faster
export GOMP_SPINCOUNT := 10000

.DEFAULT_GOAL := help
.PHONY: help reproduce report test test-python test-lib test-artefacts lab docs docs-serve expected weights readme prepare clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

reproduce: $(READY)  ## the main job: tables and figures from real data (ALL=1 all artefacts, PROFILE=smoke|quick|full|paper, ARGS="-p bits=64")
	$(BIN)/s5vh-nb reproduce --profile $(PROFILE) $(if $(ALL),--all) $(ARGS)

report: $(READY)  ## draw the committed tables and figures again from their records, without training
	$(BIN)/s5vh-nb report $(or $(ARGS),s5vh/retrieval)

test: test-python test-lib test-artefacts  ## every check: pytest, all lib and learn notebooks, all artefact notebooks in the smoke profile
	@echo "make test: all well"

test-python: $(READY)
	$(BIN)/python -m pytest -q -rs tests

test-lib: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs/lib --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs/learn --n_workers 1 --timing

test-artefacts: $(READY)
	rm -rf results/smoke figures/smoke && mkdir -p results/smoke
	$(BIN)/papermill --log-level ERROR --no-progress-bar -p profile smoke nbs/s5vh/retrieval.ipynb results/smoke/plain.ipynb
	$(BIN)/s5vh-nb reproduce --all --profile smoke

# Lab does not ask about news
NEWS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}}

lab: $(READY)  ## JupyterLab for the whole project, opened at the index
	@mkdir -p $(VENV)/etc/jupyter/labconfig
	@echo '$(NEWS)' > $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json
	$(BIN)/jupyter lab --config=tools/lab.py --ServerApp.root_dir="$(CURDIR)" nbs/index.ipynb

docs: $(READY)  ## the site, in docs/_build/html: all notebooks, API reference, search; any warning or dead link ends it
	$(BIN)/python tools/docs.py

docs-serve: docs  ## the site on this machine, at http://127.0.0.1:8000
	$(BIN)/python -m http.server --bind 127.0.0.1 --directory docs/_build/html 8000

expected: $(READY)  ## results/expected.csv: what the main job should give, from three seeds of it
	$(BIN)/python tools/expected.py

weights: $(READY)  ## the networks of s5vh_nb/data/plus, trained anew, and their cards
	$(BIN)/python tools/weights.py
	$(BIN)/python tools/cards.py

readme: $(READY)  ## README.md and the pages of nbs/pages, from records and tables
	$(BIN)/python tools/readme.py

prepare: $(READY)  ## after editing notebooks: format, export the package, clean the notebooks, make drawings, README.md, pages and docs/equations.md
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format --quiet .
	$(BIN)/python tools/export.py
	$(BIN)/jupyter nbconvert --clear-output --inplace --log-level WARN $(wildcard nbs/s5vh/*.ipynb nbs/dmmh/*.ipynb nbs/beyond/*.ipynb)
	$(BIN)/python tools/pictures.py
	$(BIN)/nbdev_clean
	$(BIN)/python tools/path.py
	$(BIN)/python tools/drawings.py
	$(BIN)/python tools/readme.py
	$(BIN)/python tools/equations.py

clean:  ## remove the environment, the site, what smoke and quick runs wrote, and all checkpoints
	rm -rf $(VENV) docs/_build results/smoke results/quick results/checkpoints figures/smoke figures/quick

# torch first and by name: where the index offers a CPU build, that one is taken; elsewhere the ordinary build
$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "make: expected Python >= 3.11 with its venv module (Debian: apt install python3-venv), found $(or $(PYTHON),none); or say make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version); this takes some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0 setuptools wheel
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e '.[dev,docs,lab,video,milvus,ray,serve]'
	@touch $@
