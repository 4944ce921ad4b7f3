# make quickstart    install vdiff, train and distil on digits: checkpoints/report.html and a page in checkpoints/web
# make test          install vdiff and the developers' tools, run lint, format, types and all tests but the slow ones
# make test_all      the slow tests too (kills at many points, launched processes, exports), and make rounding
# make test_docs     every command of README and docs, as typed, in a fresh clone after the quickstart;
#                    one document: make test_docs DOCS="training.md --place FOLDER"
# make rounding      numeric tests with the rounding of a processor without vector instructions
# make minimum       all tests with the lowest versions that pyproject.toml allows, in .venv-minimum
# make check         lint, format and types only
# make docs          docs/commands.md from --help; figures and pictures of README and docs/benchmarks.md
# make benchmarks    the tables in benchmarks/results
# make clean         remove the environments, build outputs and caches; data and checkpoints stay

PYTHON ?= python3
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check --editable
PYTEST := -m pytest -rs --durations=30 --numprocesses logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder
NUMERIC := unet distillation methods methods_ladder method_objectives trajectory self_teacher \
	training_objectives training_optimisation verdict interop_reference noise_and_drawing conditioning
VDIFF := .venv/bin/vdiff
WEB := $(foreach k,4 5 6,checkpoints/base_$(k))
DIGITS := --data data/digits_8 --preset digits

unexport PYTHONDONTWRITEBYTECODE # modules and their assertions are compiled once, not in each process

.PHONY: quickstart test test_all test_docs slow rounding minimum check docs benchmarks clean

quickstart: .venv/ready
	test -d data/digits_8 || $(RUN) prepare_data.py
	$(RUN) train.py $(DIGITS) $$(test ! -f checkpoints/original/run.toml || echo --resume)
	$(RUN) distill.py --base checkpoints/original --teacher_steps 128 --to_steps 1 $(DIGITS)
	$(VDIFF) export web $(WEB) checkpoints/web --teacher checkpoints/original --teacher_steps 128 --overwrite \
		&& $(VDIFF) report \
		|| echo "checkpoints/web was not made, see the line above; everything else is done"

test: check
	$(RUN) $(PYTEST) -m "not slow"

test_all: test slow rounding

test_docs: .venv/ready_dev
	$(RUN) -m tests.documents $(DOCS)

slow: .venv/ready_dev
	$(RUN) $(PYTEST) -m slow

rounding: .venv/ready_dev
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(RUN) $(PYTEST) $(NUMERIC:%=tests/test_%.py)

minimum:
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet --disable-pip-version-check uv
	.venv-minimum/bin/uv pip install --python .venv-minimum --resolution lowest-direct --editable '.[dev]'
	.venv-minimum/bin/python $(PYTEST)

check: .venv/ready_dev
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: quickstart
	$(RUN) docs/make_commands.py
	$(VDIFF) report checkpoints --evaluate
	$(RUN) docs/make_readme.py

benchmarks: quickstart
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/digits.py --seeds 3

clean:
	rm -rf .venv .venv-minimum build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(INSTALL) '.[web]'
	touch $@

.venv/ready_dev: pyproject.toml
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch .venv/ready $@
