# make install                            into .venv
# make train ARGS="--task_name balance"   train, after installing into .venv
# make test                               the test suite, two tests at a time, a thread each
# make test ARGS="tests/test_sac.py"      some of it, one at a time
# make lint                               ruff

# the first Python 3.10 to 3.12 found; another: make PYTHON=/path/to/python
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.10 python3; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
ARGS ?=

.PHONY: install train test lint

install: .venv/installed

train: .venv/installed
	.venv/bin/python train.py --save_tb --save_video $(ARGS)

test: .venv/installed-dev
	$(if $(ARGS),,OMP_NUM_THREADS=1) .venv/bin/python -m pytest $(or $(ARGS),-n 2 --dist worksteal)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

.venv/pip:
	@test -n "$(PYTHON)" || { echo "no Python 3.10, 3.11 or 3.12 found; name one: make PYTHON=/path/to/python" >&2; exit 2; }
	.venv/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	# the pip that old Pythons bring searches for hours among these requirements
	.venv/bin/python -m pip install --quiet pip==26.3
	touch $@

.venv/installed: .venv/pip requirements.txt
	.venv/bin/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@
