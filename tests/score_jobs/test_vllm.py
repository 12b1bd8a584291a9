"""Law 5 for the vllm engine, where vllm is installed (an environment of its own); what a user without it is told."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pydantic import BaseModel
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


class Checked(BaseModel):
    """Stands for vllm's own config classes, whose errors begin with a count."""

    length: int


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (lambda: Checked.model_validate({"length": "long"}), "valid integer"),
        (lambda: torch.empty(1 << 60), "allocate"),
        (lambda: json.loads("{"), "Expecting property name"),
    ],
)
def test_what_vllm_says_when_it_cannot_load_a_model_is_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Callable, message: str
) -> None:
    module = SimpleNamespace(LLM=lambda **options: fail(), SamplingParams=None)
    monkeypatch.setitem(sys.modules, "vllm", module)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=rf"score\.model: .*{message}.*score\.engine: hf") as caught:
        open_engine(tiny_model, Context(window=64), settings(tmp_path))
    assert len(str(caught.value).splitlines()) == 1


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
    for one, same, expected in zip(found, again, plain.score(windows), strict=True):
        np.testing.assert_array_equal(one.loss, same.loss)
        np.testing.assert_allclose(one.loss, expected.loss, atol=TOLERANCE_NATS, rtol=0)
