# make quickstart    set up, then digits in 1 to 1024 steps: checkpoints/base_5/ladder.png
# make test          set up, then all checks and tests
# make check         lint, format and types alone
# make docs          docs/commands.md from --help, and the README's picture from the quickstart
# make benchmarks    the tables in benchmarks/results
# make clean         remove the set-up and what tools left behind; data and checkpoints stay

PYTHON ?= python3
RUN := .venv/bin/python
DIGITS := --data data/digits_8 --preset digits

.PHONY: quickstart test check docs benchmarks clean

quickstart: .venv/ready
	test -d data/digits_8 || $(RUN) prepare_data.py
	$(RUN) train.py $(DIGITS) $$(test ! -f checkpoints/original/run.toml || echo --resume)
	$(RUN) distill.py --base checkpoints/original --teacher_steps 64 --to_steps 1 $(DIGITS)

test: check
	$(RUN) -m pytest --numprocesses logical --maxprocesses 8 --dist loadfile

check: .venv/ready
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

docs: quickstart
	$(RUN) docs/make_commands.py
	cp checkpoints/base_5/ladder.png docs/images/ladder.png

benchmarks: quickstart
	$(RUN) benchmarks/training.py
	$(RUN) benchmarks/digits.py --seeds 3

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch .venv/ready
