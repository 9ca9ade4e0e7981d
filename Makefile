# Every command works on a fresh machine: it makes .venv first, from pyproject.toml and constraints.txt.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built
# without a GPU, machine code for sm_90a and PTX keep the build of the tests short; a package has all
ARCHS ?= $(if $(wildcard /dev/nvidia0),,90a-real;90-virtual)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format check bench audit gpu peers report versions codec latents evaluate weights clean

help: ## This list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(INSTALLED) $(BUILT) ## The virtual environment with everything a developer needs

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) -V)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "No virtual environment could be made: apt-get install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (some minutes the first time)"
	DIT_KERNELS_CUDA=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

$(BUILT): $(INSTALLED) CMakeLists.txt $(wildcard csrc/*.* csrc/emulator/*.*)
	@echo "Building the CUDA kernels, for GPUs and for the CPU (some minutes)"
	DIT_KERNELS_CUDA=1 DIT_KERNELS_CUDA_ARCHS="$(ARCHS)" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

demo: $(INSTALLED) ## Prompts to videos from the shipped weights, then every backend against the reference
	$(BIN)/dit-kernels demo --out demo
	$(if $(wildcard /dev/nvidia0 /dev/kfd),,TRITON_INTERPRET=1) $(BIN)/dit-kernels check
	@echo
	@echo "The videos and contact-sheet.png are in demo/. Now type:"
	@echo "  . $(BIN)/activate"
	@echo '  dit-kernels generate "a nine moving up" --out nine.gif'
	@echo "  dit-kernels evaluate"

test: $(INSTALLED) $(BUILT) ## All tests; no GPU is needed
	$(BIN)/python -m pytest tests --ignore=tests/triton --ignore=tests/cuda --ignore=tests/kernels
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton tests/kernels
	$(BIN)/python -m benchmarks.audit --check
	DIT_KERNELS_EMULATE=1 DIT_KERNELS_CUDA_ARCHS="$(ARCHS)" $(BIN)/python -m pytest tests/cuda tests/kernels
	$(BIN)/python -m benchmarks.audit_cuda --check

lint: $(INSTALLED) ## Formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## Rewrite the sources as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(INSTALLED) ## Errors of every backend that runs here, against the float64 reference
	$(BIN)/dit-kernels check

bench: $(INSTALLED) ## Time every op here against eager and torch.compile; tables and plots in runs/bench
	$(BIN)/dit-kernels bench --out runs/bench
	$(BIN)/python -m benchmarks.report runs/bench

audit: $(INSTALLED) $(BUILT) ## Compile every Triton and CUDA kernel without a GPU: registers, spills, load widths
	$(BIN)/python -m benchmarks.audit
	$(BIN)/python -m benchmarks.audit_cuda

gpu: ## On a machine with a GPU, torch and triton, no network needed: all in ten minutes (STAGES="test ...")
	$(PYTHON) -m benchmarks.gpu $(STAGES)

peers: $(INSTALLED) ## Wheels of outside kernels into peers/, which `make gpu` installs from
	$(BIN)/python -m benchmarks.peers peers

report: $(INSTALLED) ## docs/benchmarks.md and its plots, from the committed results
	$(BIN)/python -m benchmarks.report

versions: $(INSTALLED) ## Tests of `patch` with other releases of diffusers, and with torchao; docs/diffusers.md
	$(BIN)/python tests/integrations/versions.py

codec: $(INSTALLED) ## Train the shipped codec again (ten minutes on two cores; resumes)
	$(BIN)/dit-kernels train-codec --out runs/codec --resume

latents: $(INSTALLED) ## Train a model in the latents of the shipped codec (resumes)
	$(BIN)/dit-kernels train --out runs/latents-first --resume --codec causal --time-mean 1.0 --hold-out \
		--steps 10000 --small-steps 3500 --small-frames 5
	$(BIN)/dit-kernels train --out runs/latents --resume --init runs/latents-first/model.safetensors \
		--time-mean 1.0 --wordings --steps 3000 --learning-rate 0.0007

evaluate: $(INSTALLED) ## Judge the shipped weights; docs/evaluation.json and README's table
	$(BIN)/dit-kernels evaluate --json docs/evaluation.json --markdown README.md

weights: $(INSTALLED) ## Train the shipped weights again (two hours on one core; resumes)
	$(BIN)/dit-kernels train --out runs/plain --resume
	$(BIN)/dit-kernels train --out runs/digits --resume --init runs/plain/model.safetensors --wordings \
		--vary-every 4 --steps 4000 --learning-rate 0.0007

clean: ## Remove the environment and what the commands wrote
	rm -rf $(VENV) demo build dist *.egg-info
