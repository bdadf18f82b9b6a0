# Understudy. `make help` lists what there is; everything sets itself up first.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
LAB_VM := --folder /var/lib/understudy-lab-vm --port-base 9600

.PHONY: help setup lab lab-down test soak check bench bpf image lab-vm lab-vm-down lock

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

setup: $(READY) ## install what everything needs (Debian packages, a virtual environment, Azurite)

$(READY): requirements.lock pyproject.toml deploy/setup deploy/installer.lock azure_emu/package-lock.json \
    deploy/go.lock vsphere_emu/vcsim/go.sum $(wildcard vsphere_emu/vcsim/*.go) \
    azure_emu/compute/guest/build.py azure_emu/compute/guest/init \
    azure_emu/compute/guest/build.py azure_emu/compute/guest/init
	deploy/setup
	touch $@

bpf: $(READY) ## compile the tracker's eBPF program
	$(MAKE) -C agents/mobility/tracker

check: $(READY) ## ruff, strict mypy, import contract
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

test: check bpf ## the tests, on real parts, three files at a time
	$(PY) -m pytest -m 'not soak' --numprocesses 3 --dist loadfile --no-loadscope-reorder

soak: bpf ## the long mode: random kills for many minutes
	$(PY) -m pytest -m soak --timeout 3600

bench: bpf ## measure speed and memory; prints a table
	$(PY) -m tests.bench

lab: bpf ## the main job on real parts, proved
	$(VENV)/bin/understudy lab up

lab-down: ## remove every trace of the lab
	$(VENV)/bin/understudy lab down

image: $(READY) ## build the bootable Debian of the lab, or say where it is
	$(PY) -m vsphere_emu.image build

lab-vm: bpf ## the source as a virtual machine with the agent inside; proved
	$(VENV)/bin/understudy lab $(LAB_VM) vm

lab-vm-down: ## remove every trace of it
	$(VENV)/bin/understudy lab $(LAB_VM) down

lock: ## resolve the dependencies anew
	$(VENV)/bin/uv pip compile --quiet --upgrade --generate-hashes --no-emit-index-url --no-header \
	    --extra dev pyproject.toml -o requirements.lock
