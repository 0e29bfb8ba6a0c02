# make report [CAMPAIGN=folder] | make test | make test-slow | make lab | make docs | make bench | make readme | make hooks
SHELL := /bin/bash
PYTHON ?= python3.11
CAMPAIGN ?= data_samples/lfp-twin
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TESTED := $(VENV)/.ready-tests
DOCUMENTED := $(VENV)/.ready-docs
MEASURED := $(VENV)/.ready-bench
# another index for torch, e.g. a CUDA build: make TORCH_INDEX=https://...
PIP_EXTRA := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: report test test-slow lab docs bench readme clean hooks

report: $(READY)
	@$(BIN)/batt-nb report "$(CAMPAIGN)" $(if $(RAW_ROOT),--raw-root "$(RAW_ROOT)")

test: $(TESTED)
	@bash tests/gate.sh $(BIN)

test-slow: $(TESTED)
	@$(BIN)/pytest -m slow

lab: $(READY)
	@$(BIN)/batt-nb lab nbs

docs: $(DOCUMENTED)
	@$(BIN)/python environments/docs/build.py

bench: $(MEASURED)
	@bash nbs/benchmarks/run.sh $(BIN)

readme: $(TESTED)
	@bash environments/make_readme.sh $(BIN)

hooks: $(TESTED)
	@$(BIN)/nbdev_install_hooks

$(READY): settings.ini setup.py environments/constraints.txt
	@bash environments/setup.sh "$(PYTHON)" "$(VENV)" "" "$(PIP_EXTRA)"
	@touch $@

$(TESTED): $(READY)
	@bash environments/setup.sh "$(PYTHON)" "$(VENV)" dev "$(PIP_EXTRA)"
	@touch $@

$(DOCUMENTED): $(READY)
	@bash environments/setup.sh "$(PYTHON)" "$(VENV)" docs "$(PIP_EXTRA)"
	@touch $@

$(MEASURED): $(TESTED)
	@bash environments/setup.sh "$(PYTHON)" "$(VENV)" dev,bench "$(PIP_EXTRA)"
	@touch $@

clean:
	rm -rf $(VENV) build _docs _proc *.egg-info
