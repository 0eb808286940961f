# make demo   the whole road on the embedded data (or DATA=FOLDER): train, generate, evaluate, report
# make test   the tests, without those marked slow
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

DATA ?= synthetic
OUT ?= runs/demo
PRESET ?= demo
NUM_IMAGES ?= 1000
STEPS ?= 25
FLAGS ?=

.PHONY: demo test test-slow lint install clean

demo: $(INSTALLED)
	$(RUN) train_ldm.py $(PRESET) --data "$(DATA)" --out "$(OUT)/ldm" $(FLAGS)
	$(RUN) train_gan.py $(PRESET) --data "$(DATA)" --out "$(OUT)/stylegan2" $(FLAGS)
	$(RUN) generate.py --model "$(OUT)/ldm" --num-images $(NUM_IMAGES) --num-inference-steps $(STEPS) --out "$(OUT)/images/ldm"
	$(RUN) generate.py --model "$(OUT)/stylegan2" --num-images $(NUM_IMAGES) --out "$(OUT)/images/stylegan2"
	$(RUN) evaluate.py --models "$(OUT)/ldm" "$(OUT)/stylegan2" --num-images $(NUM_IMAGES) --num-inference-steps $(STEPS) --out "$(OUT)"

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and no python3 was found; set PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; set PYTHON=...") if v < (3, 11) else None'
	@echo "installing into $(VENV), once (about 3 minutes)"
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $(INSTALLED)

clean:
	rm -rf runs $(VENV) *.egg-info
