# make demo       see a durable agent survive its first crashes (as root; set-up included)
# make test       everything that a change must pass
# make test-long  the whole, with 200 seeded chaos runs and a Ceph cluster (its packages are installed)
# make lint       style, types and import rules only
# make setup      only set this machine and .venv up
# make lock       resolve the pinned requirements anew
# make docs       write docs/cli.md from the commands' own help, and the documents as a site into build/site

SHELL := /bin/bash
PY := .venv/bin/python

.PHONY: help demo test test-long lint setup setup-test setup-long lock docs

help:
	@sed -n 's/^# //p' Makefile

setup:
	@scripts/setup.sh run

setup-test:
	@scripts/setup.sh test

setup-long:
	@scripts/setup.sh long

demo: setup
	@$(PY) examples/coder/demo.py

lint: setup-test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/pyright
	.venv/bin/lint-imports

## Real kills on a busy machine: what fails is run once more, alone, and both outcomes stay on the screen. A test that fails
## only at first is a defect to look at, in the test or in what it tests; one that fails twice fails the run.
test: lint
	$(PY) -m pytest -n auto --maxprocesses 4 --no-loadscope-reorder -m "not long" || { echo "once more, the failed ones alone:"; \
	  $(PY) -m pytest -m "not long" --last-failed --last-failed-no-failures none; }

## The suites of sessions once more, with every agent in a microVM, by emulation; the last ones with all memory read lazily.
## A suite that is not here says why in tests/unit/test_parity.py.
ON_QEMU := promises forks context_api templates inspect node_recovery sdk_sessions second_place frozen_clients queues \
  context_family versions terminals exec_cp ports naps retries_budgets typed_agents egress command_inside programs coders \
  oci_images image_cli cli_sessions cli_more cli_examples mcp testing_plugin bad_input bad_storage docs_run docs_pages \
  init_project demo_whole
test-long: setup-long lint
	$(PY) -m pytest
	RETHAW_ENGINE=qemu $(PY) -m pytest -m "not long" --timeout 400 $(ON_QEMU:%=tests/e2e/test_%.py)
	RETHAW_ENGINE=qemu $(PY) -m pytest -m long tests/e2e/test_programs.py tests/e2e/test_coders.py
	RETHAW_ENGINE=qemu $(PY) -m rethaw.testing.chaos --seeds 0-4 --turns 8
	RETHAW_ENGINE=qemu RETHAW_CACHE_BYTES=0 RETHAW_LAZY_FROM_BYTES=1 $(PY) -m rethaw.testing.chaos --seeds 5-9 --turns 8

lock:
	@scripts/lock.sh

docs: setup-test
	@$(PY) scripts/cli_docs.py
	@NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --quiet && echo "docs: see build/site/index.html"
