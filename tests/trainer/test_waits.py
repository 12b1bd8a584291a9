"""How often a step waits for the device: run on the meta device, which has no values, every look at one raises."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trainer.choice
import trainer.metrics
from schemas import attention
from schemas.batch import collate
from schemas.config import Context, Train
from schemas.forward import Opened
from trainer.checkpoint import State
from trainer.live import Live
from trainer.loop import Run, optimize
from trainer.ranks import Ranks
from trainer.selection import OBJECTIVES, SCOPES, Selection
from trainer.stream import MicroBatch, Step

META = torch.device("meta")
SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Beside(Ranks):
    """One of two ranks whose collectives give what this one has: on a device they wait for nothing."""

    def sum(self, values):
        return values

    def least(self, values):
        return values

    def gather(self, values):
        return values[None].expand(self.world, -1)


@pytest.fixture
def live(monkeypatch) -> Any:
    # On a GPU a kernel takes the boundaries as they lie there; here attention of one window stands for it.
    def kernel(query, key, value, bounds, dropout, scale, _sliding_window):
        return torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(0, 1)[None] for tensor in (query, key, value)), is_causal=True, scale=scale
        )[0].transpose(0, 1)

    monkeypatch.setattr(attention, "_uncompiled", kernel)
    with META:
        model = LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2))
    assert attention.install(model)
    found = Live(Opened(model, linear=True, isolation="varlen", compute=torch.float32))
    found.set_requires_all_reduce = lambda _on: None
    return found


def step_of(columns):
    batch = collate([np.arange(9) + 2, np.arange(5) + 2, np.arange(11) + 2], [[0, 1], [2]], 16)
    stored = {name: torch.zeros(2, 16) for name in columns}
    return Step([MicroBatch(batch, stored, [8, 4, 10])] * 2, position=3, tokens=50, padding=0.2)


def waits_of(live, objective, scope, ranks, monkeypatch):
    seen = []

    def read(values):
        seen.append(values.shape)
        return [0.0] * values.numel()

    for module in (trainer.metrics, trainer.choice):
        monkeypatch.setattr(module, "read", read)
    nothing: Any = None
    config = Train(output=Path("x"), epochs=1, objective=objective, scope=scope, dtype="float32")
    run = Run(config, Context(), Path(), nothing, None, ranks)
    optimizer = torch.optim.SGD(live.parameters())
    optimize(live, optimizer, step_of(Selection.of(objective, scope, 0.5).columns), run, State(0, 0, 0, 0, {}), 1e-3)
    return len(seen)


@pytest.mark.parametrize(("objective", "scope"), product(OBJECTIVES, SCOPES))
def test_a_step_waits_for_the_device_once_and_for_masks_of_the_whole_step_once_more(
    live, objective, scope, monkeypatch
):
    ahead = Selection.of(objective, scope, 0.5).ahead
    assert waits_of(live, objective, scope, Ranks(0, 1, META), monkeypatch) == 1 + ahead


@pytest.mark.parametrize(("objective", "scope"), product(OBJECTIVES, SCOPES))
def test_on_several_ranks_only_a_ranking_over_all_of_a_micro_batch_leaves_a_ranks_own_count_to_be_waited_for(
    live, objective, scope, monkeypatch
):
    selection, beside = Selection.of(objective, scope, 0.5), Beside(0, 2, META)
    if scope == "micro" and len(selection.objective.scores) == 1:
        with pytest.raises(NotImplementedError, match="nonzero"):
            waits_of(live, objective, scope, beside, monkeypatch)
    else:
        assert waits_of(live, objective, scope, beside, monkeypatch) == 1 + selection.ahead
