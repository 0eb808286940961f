# make demo       train, generate, evaluate and report on the embedded micrographs, or on DATA=FOLDER
# make pairs      labelled pairs in four ways, and what they add to a detector (an hour), or on DATA=FOLDER
# make test       lint and the fast tests
# make test-slow  the tests that take minutes each
# make test-faults  whole commands under kills, power cuts and full disks (an hour; all of it as root)
# make test-isa   the fast tests with the instructions of older processors
# make lint       format, lint and types
# make docs       the documentation site, in site/
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

DATA ?= synthetic
OUT ?= runs/demo
PRESET ?= demo
NUM_IMAGES ?= 1000
FLAGS ?=
DEMO_JOBS ?= 2
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
THREADS = OMP_NUM_THREADS=$(shell n=$$(( $(CORES) / $(DEMO_JOBS) )); echo $$(( n > 0 ? n : 1 )))
# glibc gives each large tensor back to the system and maps its pages anew; these two settings keep freed memory in the process
TRAIN := MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000 $(RUN)

.PHONY: demo demo-ldm demo-gan pairs test test-slow test-faults test-isa lint docs install clean

# The autoencoder is fitted in seconds. Then the denoiser and StyleGAN2 train side by side, each on half of the cores:
# networks this small gain little from a second core. DEMO_JOBS=1 trains one after the other on all cores. Both families
# train from scratch on the same tiles, so that the comparison is fair.
demo: $(INSTALLED)
	@mkdir -p "$(OUT)"
	$(TRAIN) train_ldm.py $(PRESET) --data "$(DATA)" --out "$(OUT)/ldm" $(FLAGS) --last-stage autoencoder
	@echo "the LDM's denoiser and StyleGAN2 train side by side; StyleGAN2's progress is in $(OUT)/stylegan2.log"
	$(MAKE) --no-print-directory -j $(DEMO_JOBS) demo-ldm demo-gan
	$(RUN) evaluate.py --models "$(OUT)/ldm" "$(OUT)/stylegan2" --num-images $(NUM_IMAGES) --out "$(OUT)" \
	  --baselines experiments/2024_gan_vs_ldm/study.json

demo-ldm: $(INSTALLED)
	$(THREADS) $(TRAIN) train_ldm.py $(PRESET) --data "$(DATA)" --out "$(OUT)/ldm" $(FLAGS)
	$(THREADS) $(RUN) -m em_diffusion.choose_guidance "$(OUT)/ldm" --scales 1 1.5 2 2.5 --num-images 500
	$(THREADS) $(RUN) generate.py --model "$(OUT)/ldm" --num-images $(NUM_IMAGES) --out "$(OUT)/images/ldm"

demo-gan: $(INSTALLED)
	@{ $(THREADS) $(TRAIN) train_gan.py $(PRESET) --data "$(DATA)" --out "$(OUT)/stylegan2" $(FLAGS) && \
	  $(THREADS) $(RUN) generate.py --model "$(OUT)/stylegan2" --num-images $(NUM_IMAGES) --out "$(OUT)/images/stylegan2"; } \
	  > "$(OUT)/stylegan2.log" 2>&1 || { tail -n 3 "$(OUT)/stylegan2.log" >&2; exit 1; }

PAIRS_FLAGS ?= $(if $(filter-out synthetic,$(DATA)),--data "$(DATA)")
pairs: $(INSTALLED)
	$(RUN) experiments/labelled_pairs/recipe.py $(PAIRS_FLAGS)

test: $(INSTALLED) lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow"

test-slow: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -m slow --ignore tests/test_faults.py

test-faults: $(INSTALLED)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -s -m slow tests/test_faults.py

# a bound that one processor happens to hold fails on another; a newer processor can act as an older one
test-isa: $(INSTALLED)
	for isa in AVX2 AVX512_CORE; do \
	  echo "ONEDNN_MAX_CPU_ISA=$$isa" && \
	  ONEDNN_MAX_CPU_ISA=$$isa OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "not slow" || exit 1; \
	done

lint: $(INSTALLED)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed and no python3 was found; set PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(f"Python 3.11 or newer is needed, this is {v[0]}.{v[1]}; set PYTHON=...") if v < (3, 11) else None'
	@echo "installing into $(VENV), once (about 3 minutes)"
	"$(PYTHON)" -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[test,docs]"
	@# pip would compile on one core; some packages hold templates that are no Python
	@$(RUN) -m compileall -q -j 0 $(VENV)/lib > /dev/null 2>&1 || true
	@touch $(INSTALLED)

clean:
	rm -rf runs site $(VENV) *.egg-info
