PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS)

.PHONY: demo test quick check lint clean

demo: $(VENV)/.installed
	PYTHONWARNINGS=ignore::FutureWarning $(VENV)/bin/python examples/digits_demo.py --seed $(SEED)

test: check
	$(PYTEST)

quick: $(VENV)/.installed
	$(PYTEST) -m "not processes"

check: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo --no-cache

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/lint-imports --no-logo --no-cache

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[deepspeed,wandb,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
