# Each target is one command; `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON := .venv/bin/python
# The dataplane needs root: everything that touches the kernel goes through this.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -E)

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.PHONY: setup
setup: .venv/.installed ## Install what is missing: Debian packages, .venv with bin/ebproxy

.venv/.installed: requirements.lock pyproject.toml .ci/install.sh
	.ci/install.sh
	@touch $@

.PHONY: demo
demo: setup ## Build a two-node cluster of namespaces and show the main job, live
	$(SUDO) $(PYTHON) -m tests.demo

.PHONY: test
test: setup ## Run every test layer that needs no Docker
	$(SUDO) $(PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile

.PHONY: check
check: setup ## Lint, types, layers, C format, spelling
	.ci/check.sh

.PHONY: bench
bench: setup ## Measure against nftables and iptables; writes build/bench/
	$(SUDO) $(PYTHON) -m tests.bench

.PHONY: image
image: ## Build the container image (docker, podman or buildah)
	.ci/image.sh

.PHONY: image-test
image-test: setup ## Build the image with buildah and start the agent from it as the DaemonSet does (4 min)
	$(SUDO) $(PYTHON) -m pytest tests/image/check_image.py

.PHONY: kind
kind: ## Create a kind cluster without kube-proxy, deploy, and smoke-test (needs Docker)
	tests/e2e/kind.sh

.PHONY: lock
lock: ## Resolve pyproject.toml into requirements.lock again
	.ci/lock.sh

.PHONY: clean
clean: ## Remove what make made; leaves the node's dataplane alone (see `ebproxy cleanup`)
	rm -rf build .venv *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
