# make serve   the demo model on two data-parallel ranks (one where there is one GPU), http://127.0.0.1:30000
#              [PORT=…] [MODEL=…] [RANKS=…] [ARGS="…"]
# make test    the tests, in two workers                                           [ARGS="…" passes pytest options]
# make lint    format, lint and types
# make eval    held-out accuracy of the served demo model                          [PORT=…] [MODEL=…]
# make fuzz    10,000 hostile requests to a server of its own, then 6,000 made from the schema
#              [ARGS="--requests … --seed …"]
# make soak    1,000 streams at once for five minutes                              [ARGS="--streams … --seconds …"]
# make stress  100,000 steps through peer memory, with random delays; needs a GPU   [STEPS=…] [ARGS="…"]
# make bench   tokens per second of the engine beside transformers, and the CPU collectives
# make demo-model   train, quantize and export the demo model again (tools/demo_model/README.md)   [FAMILY=deepseek]
# Each does the set-up it needs in .venv.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 30000
MODEL ?= assets/nibble-demo-6m-nvfp4
RANKS ?= $(if $(filter 1,$(shell nvidia-smi -L 2>/dev/null | grep -c GPU)),1,2)
FAMILY ?= qwen3
STEPS ?= 100000
ARGS ?=
BIN := $(VENV)/bin
DEMO_qwen3 := nibble-demo-6m
DEMO_deepseek := nibble-demo-deepseek-3m
DEMO := $(DEMO_$(FAMILY))
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)

# The many processes of the tests would each compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install serve test lint eval fuzz soak stress bench demo-model

install: $(VENV)/.installed

# PyTorch first and by itself: asked for by another package, pip may choose a build with gigabytes of CUDA.
# What is never imported need not be compiled.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

serve: install
	$(BIN)/python -m nibble.launch_server --model-path $(MODEL) --port $(PORT) \
		--tp-size $(RANKS) --dp-size $(RANKS) --ep-size $(RANKS) \
		--enable-dp-attention --enable-flashinfer-cutlass-moe $(ARGS)

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Asks the server that `make serve` runs.
eval: install
	$(BIN)/python -m tools.demo_model.evaluate --base-url http://127.0.0.1:$(PORT)/v1 \
		--record $(MODEL:nvfp4=bf16).json $(ARGS)

fuzz: install
	$(BIN)/python test/e2e/fuzz.py $(ARGS)
	$(BIN)/python -m pytest test/e2e/test_hostile_clients.py --hypothesis-profile long --timeout 1800

soak: install
	$(BIN)/python benchmark/soak.py $(ARGS)

stress: install
	$(BIN)/python -m pytest test/gpu/test_peer_memory.py -k many_steps --stress-steps $(STEPS) $(ARGS)

bench: install
	$(BIN)/python benchmark/offline.py --model-path $(MODEL) --ranks $(RANKS) $(ARGS)
	$(BIN)/python benchmark/comm/cpu_collectives.py

# Trains on the GPU (minutes; hours without one), then quantizes and exports.
demo-model: install
	$(BIN)/python -m tools.demo_model.train --family $(FAMILY) --output build/$(DEMO)-bf16 --record assets/$(DEMO)-bf16.json
	$(BIN)/python -m tools.demo_model.export --checkpoint build/$(DEMO)-bf16 --output assets/$(DEMO)-nvfp4

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
