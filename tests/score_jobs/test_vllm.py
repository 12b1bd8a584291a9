"""Law 5 for the vllm engine, where vllm is installed (an environment of its own); what a user without it is told."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from schemas.config import Context, Score
from schemas.errors import UserError
from score_jobs.engines import open_engine

TOLERANCE_NATS = 1e-4


def settings(tmp_path: Path, **fields) -> Score:
    return Score(model="m", output=tmp_path, dtype="float32", batch_tokens=256, engine="vllm", **fields)


def test_entropies_are_refused_by_the_engine_that_has_none(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.entropy.*score\.engine: hf"):
        open_engine(tiny_model, Context(window=64), settings(tmp_path, entropy=True))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_is_an_error_that_names_the_extra(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.engine.*tokensift\[vllm\]"):
        open_engine(tiny_model, Context(window=64), settings(tmp_path))


@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_law_5_vllm_gives_the_packed_engines_losses_and_the_same_bits_twice(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    # Heads of 32: vllm's attention on a CPU refuses the tiny model's, which are of 8.
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = tmp_path / "model"
    config = LlamaConfig(vocab_size=512, max_position_embeddings=128, initializer_range=0.2, **shape)
    LlamaForCausalLM(config).save_pretrained(model)
    windows = [rng.integers(0, 512, size=length) for length in (64, 1, 17, 30, 2, 2, 5, 31, 9, 40, 3, 8, 1, 24)]
    engine = open_engine(model, Context(window=64), settings(tmp_path))
    found, again = engine.score(windows), engine.score(windows)
    plain = open_engine(model, Context(window=64), settings(tmp_path).model_copy(update={"engine": "hf"}))
    for (losses, _), (same, _), (expected, _) in zip(found, again, plain.score(windows), strict=True):
        np.testing.assert_array_equal(losses, same)
        np.testing.assert_allclose(losses, expected, atol=TOLERANCE_NATS, rtol=0)
