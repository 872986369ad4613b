# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
DEMO := models/SmolLM2-135M-Instruct-8.0bpw-8hb-exl2
ROOMS := cli quantize eval convert measure linalg checkpoint
# Of `make fuzz`, of each reader.
MUTANTS ?= 500

.PHONY: demo test test-slow test-gpu fuzz check format bench-quality bench-gguf bench-memory check-readers clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,demo,gguf,engine,tasks,png]'
	# What the first GGUF run would fetch, so that tests find it.
	$(BIN)/python -c 'from bpwise.convert.gguf.llama_cpp.fetch import fetch_converter; fetch_converter()'
	touch $@

$(MODEL)/config.json: | $(VENV)/installed
	$(BIN)/python examples/get_smollm2.py $(MODEL)

# Quantize a real model to 8.0 bits per weight with an 8-bit head, and print the comparison with the original.
demo: $(VENV)/installed $(MODEL)/config.json
	rm -rf $(DEMO) $(DEMO).work
	$(BIN)/bpwise quantize $(MODEL) $(DEMO) --bpw 8.0 --head-bits 8 --rows 8
	@echo
	@cat $(DEMO)/report.md

# Ten tests look at the pages in a browser; they say so where no Chromium with its chromedriver is installed.
test: $(VENV)/installed
	$(BIN)/pytest -q -rs

test-slow: $(VENV)/installed
	$(BIN)/pytest -q -m slow

# With ExLlamaV2 itself as the judge, where it is installed: pip install exllamav2
test-gpu: $(VENV)/installed
	$(BIN)/pytest -q -m gpu

# Damaged files of every kind that is read, made from a seed: what is not read must be refused in a sentence, at once.
# `make fuzz MUTANTS=5000 FUZZ='--readers plan,measurement --seed 1'`
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
bench-quality: $(VENV)/installed build/exl
	test -e $(MODEL)-off-grid/config.json || $(BIN)/python examples/get_smollm2.py --off-grid $(MODEL)-off-grid
	$(BIN)/python benchmarks/quality.py $(MODEL)-off-grid --exllamav2 build/exl/exllamav2 --work-dir build/quality

# Two hours: GGUF files against llama-quantize's, on a model whose widths K types fit.
bench-gguf: $(VENV)/installed
	test -e $(MODEL)-off-grid/config.json || $(BIN)/python examples/get_smollm2.py --off-grid $(MODEL)-off-grid
	test -e $(MODEL)-512/config.json || $(BIN)/python benchmarks/narrow_model.py $(MODEL)-off-grid $(MODEL)-512
	$(BIN)/python benchmarks/gguf_quality.py $(MODEL)-512 --rows 16 --work-dir build/gguf

bench-memory: $(VENV)/installed
	$(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build models
