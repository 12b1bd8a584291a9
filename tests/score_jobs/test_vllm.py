"""The vllm engine: law 5 where vllm is installed (`make test-vllm`); what a user without it is told, everywhere.

The way by token needs vllm's model runner V2, which needs Triton: no CPU build of vllm has it. So it is held here
against a stand-in that keeps vllm's documented contract (`SamplingParams.prompt_logprob_token_ids`), and against vllm's
own checks of what it is asked.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from schemas.config import Context, Score
from schemas.errors import UserError
from score_jobs.engines import open_engine
from score_jobs.engines.vllm_offline import VllmEngine

TOLERANCE_NATS = 1e-4
POSITIONS, VOCABULARY = 64, 512
LENGTHS = (64, 1, 17, 30, 2, 64, 5, 31, 9, 40, 64, 3, 8, 1, 24)
with_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed: `make test-vllm`")
without_vllm = pytest.mark.skipif(find_spec("vllm") is not None, reason="vllm is installed")


@pytest.fixture(autouse=True)
def environment_as_it_was() -> Iterator[None]:
    """The engine sets what vllm reads from the environment alone."""
    with patch.dict(os.environ):
        yield


def settings(tmp_path: Path, **fields) -> Score:
    return Score(model="m", output=tmp_path, dtype="float32", batch_tokens=256, engine="vllm", **fields)


def build(folder: Path, family: str) -> Path:
    """A random model of exactly POSITIONS positions. Heads of 32: vllm's attention on a CPU refuses smaller ones."""
    torch.manual_seed(0)
    names = {"vocab_size": VOCABULARY, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    if family == "learned":
        model = GPT2LMHeadModel(GPT2Config(n_positions=POSITIONS, n_embd=128, n_layer=2, n_head=4, **names))
    else:
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=POSITIONS, **names, **shape))
    model.save_pretrained(folder)
    return folder


def make_windows() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, size=length) for length in LENGTHS]


@torch.no_grad()
def plain_losses(folder: Path, windows: list[np.ndarray]) -> list[np.ndarray]:
    """Losses by a plain Hugging Face forward, a window at a time; without position 0."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    losses = []
    for window in windows:
        tokens = torch.from_numpy(window)
        logits = model(input_ids=tokens[None]).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none").numpy())
    return losses


def test_entropies_are_refused_by_the_engine_that_has_none(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.entropy.*score\.engine: hf"):
        open_engine(tiny_model, Context(window=64), settings(tmp_path, entropy=True))


def test_a_window_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"context\.window: 65 is more than the 64 positions"):
        open_engine(build(tmp_path / "model", "rope"), Context(window=65), settings(tmp_path))


@without_vllm
def test_a_missing_vllm_is_an_error_that_says_how_to_get_it(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"score\.engine.*make vllm.*score\.python"):
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


class StandIn:
    """What vllm with model runner V2 promises: row i holds the log-probabilities of the ids asked for token i + 1."""

    class SamplingParams(SimpleNamespace):
        prompt_logprob_token_ids: np.ndarray | None = None

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.answer: Callable[[np.ndarray], np.ndarray | None] = lambda rows: rows
        self.llm_engine = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=True))

    def LLM(self, **options: Any) -> "StandIn":
        self.options = options
        self.plain = AutoModelForCausalLM.from_pretrained(options["model"]).eval()
        return self

    @torch.no_grad()
    def generate(self, prompts: list[dict], params: list[Any], use_tqdm: bool) -> list[SimpleNamespace]:
        return [self._one(one["prompt_token_ids"], asked) for one, asked in zip(prompts, params, strict=True)]

    def _one(self, tokens: list[int], asked: Any) -> SimpleNamespace:
        ids = asked.prompt_logprob_token_ids
        assert asked.max_tokens == 1 and ids.dtype.kind == "i" and ids.shape == (len(tokens) - 1, 1)
        rows = self.plain(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return SimpleNamespace(prompt_token_id_logprobs=self.answer(rows.gather(-1, torch.tensor(ids).long()).numpy()))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", made)  # type: ignore[arg-type]
    return made


def test_law_5_by_token_where_vllm_is_asked_for_the_tokens_themselves(tmp_path: Path, stand_in: StandIn) -> None:
    windows, folder = make_windows(), build(tmp_path / "model", "rope")
    engine = open_engine(folder, Context(window=POSITIONS), settings(tmp_path))
    for scored, expected in zip(engine.score(windows), plain_losses(folder, windows), strict=True):
        assert scored.loss.dtype == np.float32 and np.isnan(scored.loss[0])
        np.testing.assert_allclose(scored.loss[1:], expected, atol=TOLERANCE_NATS, rtol=0)


@pytest.mark.parametrize("answer", [lambda rows: None, lambda rows: rows[1:], lambda rows: rows[:, 0]])
def test_scores_that_vllm_dropped_are_an_error_not_a_loss(tmp_path: Path, stand_in: StandIn, answer: Callable) -> None:
    stand_in.answer = answer
    engine = open_engine(build(tmp_path / "model", "rope"), Context(window=POSITIONS), settings(tmp_path))
    with pytest.raises(RuntimeError, match="for a window of 64 tokens"):
        engine.score(make_windows())


@pytest.mark.parametrize(("gpus", "parallel", "backend"), [(0, 1, "uni"), (0.5, 1, "uni"), (1, 1, "uni"), (4, 4, "mp")])
def test_nothing_that_forms_batches_is_left_to_the_machine(
    tmp_path: Path, stand_in: StandIn, gpus: float, parallel: int, backend: str
) -> None:
    open_engine(build(tmp_path / "model", "rope"), Context(window=64), settings(tmp_path, gpus_per_worker=gpus))
    asked = stand_in.options
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert asked["max_num_seqs"] and asked["max_num_batched_tokens"] == 256
    assert not asked["enable_prefix_caching"] and not asked["async_scheduling"]
    assert (asked["tensor_parallel_size"], asked["distributed_executor_backend"]) == (parallel, backend)
    assert asked["gpu_memory_utilization"] == pytest.approx(0.45 if gpus == 0.5 else 0.9)


@with_vllm
@pytest.mark.parametrize("family", ["rope", "learned"])
def test_law_5_vllm_gives_the_plain_forwards_losses_at_all_positions_of_the_model_and_the_same_bits_twice(
    tmp_path: Path, family: str
) -> None:
    windows, folder = make_windows(), build(tmp_path / "model", family)
    engine = VllmEngine(folder, POSITIONS, "float32", 256, 0)
    seen: list[int] = []

    def watch(module: torch.nn.Module, arguments: tuple, named: dict[str, Any]) -> None:
        seen.append(int(named["positions"].max()))

    engine.model.apply_model(lambda model: model.register_forward_pre_hook(watch, with_kwargs=True) and None)
    found, again, plain = engine.score(windows), engine.score(windows), plain_losses(folder, windows)
    for one, same, expected in zip(found, again, plain, strict=True):
        np.testing.assert_array_equal(one.loss, same.loss)
        np.testing.assert_allclose(one.loss[1:], expected, atol=TOLERANCE_NATS, rtol=0)
    assert np.concatenate(plain).std() > 0.5  # losses that differ, so that a shift by one token would show
    assert max(seen) == POSITIONS - 1  # the sampled token, beyond the last position, is never fed back
    # What the way by token would ask passes vllm's own checks.
    config = engine.model.llm_engine.model_config
    engine.by_token = True
    for window in windows:
        if len(window) > 1:
            engine._ask(window).verify(config, None, None, None)
