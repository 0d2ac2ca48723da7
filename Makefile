# `make demo` and `make test` do everything on a fresh machine: a virtual environment in .venv, pinned packages, the job.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo_out

.PHONY: demo app examples gallery train model-report bench-quick bench bench-tune bench-tradeoff bench-engine test \
	test-app browser test-slow test-matrix diffusers-suite fuzz lint bundle blocks hub space clean

demo: $(VENV)/demo
	$(BIN)/mde-edit edit --config examples/cat_straw_hat/edit.json --out $(OUT)/null_text
	$(BIN)/mde-edit edit --config examples/cat_straw_hat/edit.json --method direct --guidance-scale 2.5 --out $(OUT)/direct

# The page, in a browser: MODEL=CompVis/stable-diffusion-v1-4 for photographs.
app: $(VENV)/app
	$(BIN)/mde-edit app $(if $(MODEL),--model $(MODEL))

examples: $(VENV)/demo
	for case in examples/*/; do $(BIN)/mde-edit edit --config $$case/edit.json --out $$case || exit 1; done
	$(BIN)/python examples/gallery.py

gallery: $(VENV)/demo
	$(BIN)/python examples/gallery.py

# The embedded model's training, stage by stage; see training/README.md.
train: $(VENV)/train
	$(BIN)/python -m training.vae --out train_out/vae
	$(BIN)/python -m training.latents --vae train_out/vae --out train_out/latents
	$(BIN)/python -m training.unet --vae train_out/vae --latents train_out/latents --out train_out/ldm
	$(BIN)/python -m training.judge --out train_out/judge

# [MODEL=train_out/ldm/pipeline] [JUDGE=train_out/judge]: the shipped ones by default.
model-report: $(VENV)/train
	$(BIN)/python -m training.report --model $(or $(MODEL),emoji_ldm) --judge $(or $(JUDGE),emoji_judge) --out train_out/report

# emoji-bench; see benchmarks/README.md. METHODS="none both ..." runs some, LIMIT=3 the first cases of each task and split,
# PROCESSES=2 spreads the cases, SOFTEN=0.22 dilutes the model's attention.
METHODS ?=
STEPS ?= 50
LIMIT ?=
PROCESSES ?= 1
SOFTEN ?= 1
SOFT = $(if $(filter-out 1,$(SOFTEN)),_soften_$(SOFTEN))
SPREAD = $(BIN)/torchrun --nproc_per_node $(PROCESSES)
RUN = $(SPREAD) -m benchmarks.run $(if $(METHODS),--methods $(METHODS)) $(if $(LIMIT),--limit $(LIMIT))

bench-quick: $(VENV)/bench
	$(BIN)/python -m benchmarks.draw --set quick --out bench_out/quick/cases
	$(RUN) --cases bench_out/quick/cases --out bench_out/quick/results --steps 20
	$(BIN)/python -m benchmarks.tables --cases bench_out/quick/cases --results bench_out/quick/results --out bench_out/quick

bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.draw --set test --out bench_out/test/cases
	$(RUN) --cases bench_out/test/cases --out bench_out/test$(SOFT)/results --steps $(STEPS) --soften $(SOFTEN)
	$(BIN)/python -m benchmarks.tables --cases bench_out/test/cases --results bench_out/test$(SOFT)/results \
		--out bench_out/test$(SOFT)

bench-tune: $(VENV)/bench
	$(BIN)/python -m benchmarks.draw --set dev --out bench_out/dev/cases
	$(BIN)/python -m benchmarks.tune --cases bench_out/dev/cases --out bench_out/tuning --steps $(STEPS) \
		$(if $(METHODS),--methods $(METHODS)) $(if $(LIMIT),--limit $(LIMIT))

bench-tradeoff: $(VENV)/bench
	$(BIN)/python -m benchmarks.draw --set dev --out bench_out/dev/cases
	$(SPREAD) -m benchmarks.tradeoff --cases bench_out/dev/cases --out bench_out/tradeoff $(if $(LIMIT),--limit $(LIMIT))

# What an edit costs at Stable Diffusion 1.4's size, with random weights: [DTYPE="float32 bfloat16"] on a GPU.
bench-engine: $(VENV)/bench
	$(BIN)/python -m benchmarks.engine --out bench_out/engine.md $(if $(DTYPE),--dtype $(DTYPE))

# Models this small only lose by sharing their work: one thread each, one process per core.
test: $(VENV)/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The page's tests, in a browser; with ALL=1 the one of a minute, too.
test-app: $(VENV)/test-app browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'app$(if $(ALL),, and not slow)' tests/test_app.py

# The one that is there, or Debian's Chromium.
ROOTLY = $(if $(filter-out 0,$(shell id -u)),sudo)
browser:
	command -v chromium google-chrome > /dev/null || $(ROOTLY) apt-get install -qy chromium > /dev/null || \
		{ $(ROOTLY) apt-get update && $(ROOTLY) apt-get install -qy chromium > /dev/null; }

test-slow: $(VENV)/test
	$(BIN)/python -m pytest -m slow
	ROUNDS=15 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_threads.py

# Ten thousand calls, arrays and configs of any kind; `make test` makes 150 of each.
fuzz: $(VENV)/test
	FUZZ=10000 $(BIN)/python -m pytest -n 2 tests/test_inputs.py tests/test_pictures.py tests/test_cli.py -k any_

# The tests on older releases of diffusers and transformers, each in a folder under build/matrix: half an hour.
test-matrix: $(VENV)/test
	$(BIN)/python tests/matrix.py

# diffusers' own pipeline tests, run on this pipeline: make diffusers-suite DIFFUSERS=path of a checkout of its repository.
diffusers-suite: $(VENV)/test
	$(BIN)/pip install -q -c constraints.txt parameterized requests-mock scipy torchsde
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/diffusers_suite.py \
		$(or $(DIFFUSERS),$(error say where a checkout of diffusers is: make diffusers-suite DIFFUSERS=path))

lint: $(VENV)/test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# What a pull request to diffusers' examples/community adds: a file per pipeline, a table row and a section.
bundle: $(VENV)/demo
	mkdir -p build/community
	$(BIN)/mde-edit bundle --out build/community/mde_edit.py
	$(BIN)/mde-edit bundle --xl --out build/community/mde_edit_xl.py
	cp community/README.md build/community/

# The folder that `ModularPipelineBlocks.from_pretrained` loads; docs/modular.md.
blocks: $(VENV)/demo
	$(BIN)/mde-edit bundle --blocks --out build/blocks

# make hub REPO=user/name [MODEL=emoji_ldm | BLOCKS=1] [XL=1] [DRY=1]
hub: $(VENV)/demo
	$(BIN)/mde-edit push $(or $(REPO),$(error say where to: make hub REPO=user/name)) \
		$(if $(MODEL),--with-model $(MODEL)) $(if $(BLOCKS),--blocks) $(if $(XL),--xl) $(if $(DRY),--dry-run)

# make space REPO=user/name [DRY=1]
space: $(VENV)/demo
	$(BIN)/mde-edit push $(or $(REPO),$(error say where to: make space REPO=user/name)) --space $(if $(DRY),--dry-run)

clean:
	rm -rf $(VENV) $(OUT) train_out bench_out build

# One stamp per extra; torch first, so that nothing else decides which build of it comes.
$(VENV)/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[$*]'
	touch $@
