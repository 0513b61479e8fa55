PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# torch is installed first: some packages need it to build, and others must not replace it.
# CPU build: make install TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)

DATA ?= data
OUTPUT ?= runs/general

.PHONY: install demo general results rivals test test-unit test-all check docs audit format package package-test

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/pip install -c constraints.txt -e ".[bench,demo,dev,evaluation,explore,s3,test]"
	touch $(STAMP)

demo: install
	$(BIN)/msense build --config demo --output runs/demo
	$(BIN)/msense show runs/demo key cell kernel tree

# students of varied text: make general CORPUS=DIR [OUTPUT=runs/general]; run it again to resume
general: install
	$(BIN)/msense build --config general-dictionary --corpus $(CORPUS) --output $(OUTPUT)/dictionary
	for student in table static "layers:2 --batch-tokens 1024"; do \
		$(BIN)/msense distill --config general-student --dictionary $(OUTPUT)/dictionary --student $$student \
			--output $(OUTPUT)/$${student%% *} || exit 1; \
	done

# make results DATA=DIR, with banking77/ tweet_emotion/ sst2/ coarsewsd/ wordsim/ wikitext2/; hours on two cores
results: install
	$(BIN)/python jobs/reproduce.py --data $(DATA) $(if $(MODEL2VEC_PYTHON),--model2vec-python $(MODEL2VEC_PYTHON))

# make rivals DATA=DIR [SETS="cranfield banking77"], with retrieval/NAME/ and banking77/; less than an hour on two cores
rivals: install
	$(BIN)/python jobs/rivals.py $(SETS) --data $(DATA) $(if $(MODEL2VEC_PYTHON),--model2vec-python $(MODEL2VEC_PYTHON)) \
		$(if $(TOKENLEARN_PYTHON),--tokenlearn-python $(TOKENLEARN_PYTHON))

# without whole runs: no Ray, no servers
test-unit: install
	$(BIN)/python -m pytest -n 2 -m "not slow and not integration"

test: install
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-all: install
	$(BIN)/python -m pytest -m ""

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the pages and a reference of the Python interface, in site/; fails on warnings and broken links
docs: install
	$(BIN)/pip install -c constraints.txt -e ".[docs]"
	$(BIN)/mkdocs build --strict -f .github/mkdocs.yml

# wheel and sdist in dist/
package:
	rm -rf dist build
	$(PYTHON) -m venv .package
	.package/bin/pip install build
	.package/bin/python -m build --outdir dist .

# the wheel in a clean environment, outside the checkout: make package-test [PYTHON=python3.13]
package-test: install package
	$(BIN)/python tests/support/package_smoke.py dist --python $(PYTHON)

audit:
	$(PYTHON) -m venv .audit
	.audit/bin/pip install pip-audit
	.audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
