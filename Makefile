# make demo: caption the example pair.   make test: the tests.   make docs: the site.   Everything happens in $(VENV).
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTHONS ?= python3.11 python3.12 python3.13
ENDS ?= floors newest
BIN := $(VENV)/bin
EXAMPLE := kcfi/example
LIBRARIES := kcfi/scenes/libraries/LICENSES.txt
DOCKER ?= docker
# tests of the site are skipped without npm, or without a network
OPTIONAL_LIBRARIES = -$(if $(shell command -v npm),$(MAKE) libraries)

.PHONY: demo test test-all test-versions fuzz licences lint docs libraries wheel image bench bench-quality tiny clean

demo: $(VENV)/installed
	$(BIN)/kcfi caption $(EXAMPLE)/before.png $(EXAMPLE)/after.png --heatmap --output demo-output

test: $(VENV)/installed-dev
	$(OPTIONAL_LIBRARIES)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS)

test-all: $(VENV)/installed-dev
	$(OPTIONAL_LIBRARIES)
	$(BIN)/python -m pytest

# both ends of the declared versions, on every Python that is there: about a quarter of an hour each
test-versions:
	$(PYTHON) tests/versions.py --pythons $(PYTHONS) --ends $(ENDS)

# thousands of damaged files for every reader; inputs that find a mistake are written into `fuzz-found`
fuzz: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/fuzz.py --keep fuzz-found

# docs/licences.md: what everything that is installed with kcfi says of its licence
licences: $(VENV)/installed-dev
	$(BIN)/python tests/licences.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# docs/ as a site: open site/index.html. A link that leads nowhere, or a page in no menu, ends the build
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# what draws the map of `kcfi scene --site`, by the hashes of libraries/package-lock.json; a wheel holds it if it is there
libraries: $(LIBRARIES)

$(LIBRARIES): libraries/package.json libraries/package-lock.json libraries/copy.js
	npm ci --prefix libraries --no-audit --no-fund --loglevel=error
	npm run --prefix libraries --silent copy

wheel: $(VENV)/installed-dev libraries
	$(BIN)/python -m build

# the image of compose.yaml; TORCH_INDEX: docs/containers.md
image:
	$(DOCKER) build --build-arg TORCH_INDEX=$(TORCH_INDEX) --tag kcfi .

# ratios to plain baselines, into docs/performance.md; nothing else should run meanwhile
bench: $(VENV)/installed-dev
	$(BIN)/python benchmarks/run_all.py

bench-quality: $(VENV)/installed-dev
	$(BIN)/python benchmarks/time_to_quality.py synthetic/fine_tuned_128px --num_eval_pairs 64

# kcfi-tiny from nothing. AERIAL: folder with the four sources that the card of kcfi-tiny names
AERIAL ?= open_aerial
tiny: $(VENV)/installed
	$(BIN)/kcfi data materials --source $(AERIAL)/ucmerced $(AERIAL)/dubai $(AERIAL)/banepa $(AERIAL)/tartu --output runs/materials
	$(BIN)/python -m kcfi.training.towers.language_model --output runs/tiny-lm --steps 1000
	$(BIN)/python -m kcfi.training.towers.vision_tower --output runs/tiny-vit --steps 600
	$(BIN)/kcfi train tiny
	$(BIN)/kcfi train tiny_real
	$(BIN)/python -m kcfi.training.sharing.export runs/tiny-real hub_configs/kcfi-tiny

# torch first: whatever build pip is set up to find then satisfies the packages that ask for it
$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt torch torchvision
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache demo-output fuzz-found
	rm -rf libraries/node_modules $(dir $(LIBRARIES))
