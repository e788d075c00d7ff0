# make demo      the smart-grid demo                 make test     lint, types, contract drift, all tests
# make bench     measure (ARGS="--suite core --json")  make ledger   the long crash test (ARGS="--seconds 600")
# make site-ledger   a million writes at five sites, cut and killed (ARGS="--writes 200000 --seed 7")
# make weather   servers of stores that die and come back under load; three minutes
# Everything is installed into .venv, from constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: test lint types contract unit demo bench weather ledger site-ledger generate clean

test: lint types contract unit

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev $(VENV)/demo
	$(BIN)/mypy sdk/mnemesh memory_shards router services edge cli bench examples

contract: $(VENV)/dev
	$(BIN)/mnemesh contract check

# Two at a time, a file each: a test waits for servers half of its time.
unit: $(VENV)/dev $(VENV)/demo $(VENV)/servers
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

demo: $(VENV)/demo
	$(BIN)/mnemesh demo $(ARGS)

bench: $(VENV)/demo
	$(BIN)/mnemesh bench $(ARGS)

weather: $(VENV)/dev $(VENV)/demo $(VENV)/servers
	$(BIN)/pytest -m weather $(ARGS)

ledger: $(VENV)/dev
	$(BIN)/python -m tests.ledger $(ARGS)

site-ledger: $(VENV)/dev
	$(BIN)/python -m tests.site_ledger $(ARGS)

generate: $(VENV)/dev
	$(BIN)/mnemesh contract generate

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/base: pyproject.toml sdk/pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable ./sdk --editable .
	touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) --editable '.[dev,edge,redis,neo4j,milvus,cuda,snapshots]'
	touch $@

# Redis, Neo4j and Milvus, which stores are tested against: from Debian, Maven and PyPI, as far as there is a way.
$(VENV)/servers: $(VENV)/dev bench/store_servers.py
	$(BIN)/python -m bench.store_servers
	touch $@

$(VENV)/demo: $(VENV)/base
	$(PIP) --editable '.[demo]'
	touch $@
