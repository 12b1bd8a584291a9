"""vLLM's answers are the Hugging Face back end's. Runs in vLLM's environment (`make test-vllm`), nowhere else."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.suite.harness import evaluate_suite
from pipeline.suite.suites import GENERAL15, MATH9, Column
from pipeline.suite.tasks import TASKS
from schemas.config import Config

pytest.importorskip("vllm")


@pytest.fixture
def model(long_model: Path, tmp_path: Path) -> Path:
    """The long model's tokenizer with heads as wide as vLLM's attention on a CPU asks for."""
    folder = shutil.copytree(long_model, tmp_path / "model")
    shape = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8192, initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


ROLLING = Column("bits/byte", "rolled", "bits_per_byte,none", 0, percent=False)


def test_a_vllm_run_agrees_with_the_hugging_face_run(
    scores: Config, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled = {
        "task": "rolled",
        "dataset_path": "openai/gsm8k",
        "dataset_name": "main",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
    }
    monkeypatch.setitem(TASKS, "rolled", rolled)
    ranked = [column for column in GENERAL15.columns if column.title in ("ARC-E", "PIQA", "OBQA", "BoolQ")]
    suite = replace(MATH9, columns=(*MATH9.columns[:1], *ranked, ROLLING))
    found = {
        backend: evaluate_suite(scores, model, suite, backend, data=data, new_tokens=8)["columns"]
        for backend in ("hf", "vllm")
    }
    shares = {
        backend: {title: figure["value"] for title, figure in columns.items() if title != ROLLING.title}
        for backend, columns in found.items()
    }
    assert shares["hf"] == shares["vllm"]
    assert found["vllm"][ROLLING.title]["value"] == pytest.approx(found["hf"][ROLLING.title]["value"], rel=1e-4)
