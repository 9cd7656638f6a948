# Every recipe runs from this folder by relative paths, so a checkout whose path has spaces works.
PYTHON ?= python3
PY := .venv/bin/python
WORKERS ?= 1

.PHONY: help setup try series outputs html test bench experiments lab readme docs

help:
	@echo "make try          what a trained model makes of a text: TEXT='your own', or an example; nothing is trained"
	@echo "make series       run the notebooks in order, train what isn't trained yet, end with a table of results"
	@echo "                  (BLT_PRESET=ci for toy sizes, laptop by default, gpu for a large GPU)"
	@echo "make test         every check, and every notebook at BLT_PRESET=ci"
	@echo "make lab          JupyterLab on nbs/"
	@echo "make html         the notebooks as static pages in _site/, which need no network"
	@echo "make bench        speed and memory beside the implementation in transformers (a quiet machine, 15 minutes)"
	@echo "make experiments  the rows that a table of results lacks: TABLE=its name, WORKERS=2 for two at a time"
	@echo "make outputs      put the outputs of the last 'make series' into the notebooks in nbs/"
	@echo "make readme       README.md from nbs/index.ipynb"
	@echo "make docs         the documentation site in _docs/ (needs Quarto)"
	@echo "make setup        only set up .venv (the others do it by themselves)"
	@echo "Python 3.11 to 3.14 is needed; choose one with PYTHON=python3.12"

setup: .venv/.ready
	@:

# An environment that works is kept, with the Python it was made with; PYTHON counts when there is none.
.venv/.ready: settings.ini constraints.txt
	@echo "setting up .venv (a few minutes the first time)"
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(PY) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 14) else "blt_nb needs Python 3.11 to 3.14, and .venv has %d.%d: remove .venv, then make PYTHON=python3.12" % v)'
	@$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch .venv/.ready

# A text reaches the command as it is, whatever the shell would make of it.
try: export BLT_TEXT = $(value TEXT)
try: setup
	@$(PY) -m blt_nb.cli try $(if $(value TEXT),-- "$$BLT_TEXT")

series: setup
	@$(PY) .ci/notebooks.py series

outputs: setup
	@$(PY) .ci/notebooks.py outputs

html: setup
	@$(PY) .ci/pages.py

test: setup
	@$(PY) .ci/test.py

bench: setup
	@$(PY) -m nbconvert --to notebook --execute --inplace --log-level WARN nbs/checks/bench.ipynb
	@.venv/bin/nbdev_clean --fname nbs/checks/bench.ipynb
	@echo "results: data/results/bench.csv   notebook: nbs/checks/bench.ipynb"

experiments: setup
	@$(PY) -m blt_nb.experiments.runs $(TABLE) --workers $(WORKERS)

lab: setup
	@$(PY) -m jupyterlab nbs $$([ "$$(id -u)" != 0 ] || echo --allow-root)

readme: setup
	@$(PY) .ci/readme.py

docs: setup
	@$(PY) .ci/docs.py
