# Everything runs in .venv, which is made when missing. One thread a process: small networks are many times slower with two.
export OMP_NUM_THREADS := 1
# glibc keeps what it frees: else every call of a network maps and faults its activations anew.
export MALLOC_TRIM_THRESHOLD_ := 1000000000
export MALLOC_MMAP_THRESHOLD_ := 1000000000
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-full test test-slow lint docs benchmark strong clean

demo: .venv/ok            ## train, sample, score and compare on 8x8 digits, into runs/demo
	$(BIN)/scoresde demo $(ARGS)

demo-full: .venv/ok       ## the same with every row, into runs/demo-full
	$(BIN)/scoresde demo --full --out runs/demo-full $(ARGS)

test: .venv/ok            ## the tests, two processes of one thread
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-slow: .venv/ok       ## the tests too long for every push
	$(BIN)/python -m pytest -n 2 -m slow $(ARGS)

lint: .venv/ok            ## ruff and the type checker
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyrefly check

docs: .venv/docs          ## the documentation, into docs/_build/html; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

benchmark: .venv/ok       ## the cost of seeded noise, and of everything outside the network beside the peers'
	$(BIN)/python benchmarks/noise.py
	$(BIN)/python benchmarks/overhead.py

strong: .venv/ok          ## errors of every solver and of the peers' on exact problems, what is not yet in its results (hours, from none)
	$(BIN)/python benchmarks/strong.py

# torch first, by exact version: a bare "torch" may bring gigabytes of CUDA packages.
.venv/ok: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,demo,peers]"
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt k-diffusion  # its samplers need nothing more
	touch $@

.venv/docs: .venv/ok
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv docs/_build
