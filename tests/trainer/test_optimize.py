"""Law 9 and equation 4 for one optimizer step by itself: against plain PyTorch, each window run alone."""

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from schemas.batch import IGNORE, collate
from schemas.config import Context, Train
from tests.trainer.made import made, window
from tests.trainer.test_live import opened
from trainer.ahead import Placed
from trainer.checkpoint import State
from trainer.live import Live
from trainer.loop import (
    Diverged,
    Run,
    optimize,
)
from trainer.ranks import ALONE, Ranks
from trainer.stream import MicroBatch, Step

RATE = 0.25
START = State(0, 0, 0, 0, {})
LENGTHS = [[9, 5, 11], [7, 9, 3]]  # windows of two micro-batches of two rows


def step_of(lengths=LENGTHS):
    """A step and its windows; ref_loss stands where each token is predicted."""
    rng, micros, windows = np.random.default_rng(2), [], []
    for share in lengths:
        every = [
            replace(window(rng, length), tokens=rng.integers(2, 40, length), ref_entropy=rng.random(length, np.float32))
            for length in share
        ]
        batch = collate([one.tokens for one in every], [[0, 1], [2]], 16)
        columns = {name: batch.spread([getattr(one, name) for one in every]) for name in ("ref_loss", "ref_entropy")}
        placed = [Placed(0, key, one) for key, one in enumerate(every)]
        micros.append(MicroBatch(batch, columns, [length - 1 for length in share], placed))
        windows += every
    return Step(micros, position=6, tokens=sum(map(sum, lengths)), padding=0.25), windows


def run_of(ranks=ALONE, evaluate=None, source=None, base=Path(), **fields):
    fields = {"output": Path("x"), "epochs": 1, "dtype": "float32", "clip": 1e9, **fields}
    return Run(Train(**fields), Context(window=64), base, source or made([5] * 12), None, ranks, evaluate)


the_model = functools.cache(opened)  # to prove a model takes longer than a step of it


def taken(run, state=START):
    """The weights' way in one step of plain gradient descent, and the row."""
    live = Live(the_model())
    live.zero_grad(set_to_none=True)  # of a test before this one that was refused
    before = {name: tensor.clone() for name, tensor in live.model.state_dict().items()}
    row = optimize(live, torch.optim.SGD(live.parameters(), lr=99.0), step_of()[0], run, state, RATE)
    assert all(parameter.grad is None for parameter in live.parameters())
    ways = {name: tensor - before[name] for name, tensor in live.model.state_dict().items()}
    live.model.load_state_dict(before)
    return ways, row


def plainly(choose):
    """Of the tokens that `choose(losses of each window, windows)` says: gradients of their mean loss, these, their scores."""
    model, (_, windows), every = the_model().module, step_of(), []
    for one in windows:
        tokens = torch.from_numpy(one.tokens)
        every.append(cross_entropy(model(input_ids=tokens[None]).logits[0, :-1], tokens[1:], reduction="none"))
    chosen = choose([losses.detach() for losses in every], windows)
    kept = torch.cat([losses[mask] for losses, (mask, _) in zip(every, chosen, strict=True)])
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(kept.mean(), parameters), strict=True))
    return gradients, kept.detach(), torch.cat([scores[mask] for mask, scores in chosen])


def best(scores, keep):
    """Mask of the round(keep * n) highest, the earlier of equals."""
    order = torch.argsort(scores, descending=True, stable=True)
    return torch.zeros(len(scores), dtype=torch.bool).index_fill_(0, order[: round(keep * len(scores))], True)


def by_reference(windows):
    return [torch.from_numpy(-one.ref_loss[1:].astype(np.float32)) for one in windows]


def all_of_them(every, _windows):
    return [(torch.ones(len(losses), dtype=torch.bool), losses) for losses in every]


def half_of_each_window(_every, windows):
    return [(best(scores, 0.5), scores) for scores in by_reference(windows)]


def half_of_each_window_by_both(_every, windows):
    entropies = [torch.from_numpy(-one.ref_entropy[1:]) for one in windows]
    return [
        (best(scores, 0.5) & best(other, 0.5), scores)
        for scores, other in zip(by_reference(windows), entropies, strict=True)
    ]


def half_of_the_step_by_excess(every, windows):
    scores = [losses + own for losses, own in zip(every, by_reference(windows), strict=True)]
    masks = best(torch.cat(scores), 0.5).split([len(own) for own in scores])
    return list(zip(masks, scores, strict=True))


CASES = {
    "clm": ({"objective": "clm"}, all_of_them),
    "by window": ({"objective": "self-ref-loss", "scope": "sequence", "keep": 0.5}, half_of_each_window),
    "by both": ({"objective": "self-ref-both", "scope": "sequence", "keep": 0.5}, half_of_each_window_by_both),
    "by step": ({"objective": "slm", "scope": "step", "keep": 0.5}, half_of_the_step_by_excess),
}


@pytest.mark.parametrize("clip", [1e9, 0.01])
@pytest.mark.parametrize(("fields", "kept"), CASES.values(), ids=CASES)
def test_a_step_goes_down_the_clipped_gradient_of_the_mean_over_all_that_it_selects(fields, kept, clip):
    gradients, chosen, scores = plainly(kept)
    norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
    ways, row = taken(run_of(**fields, clip=clip))
    for name, gradient in gradients.items():
        wanted = -RATE * gradient * min(1.0, clip / float(norm))
        torch.testing.assert_close(ways[name], wanted, rtol=1e-3, atol=1e-6, msg=name)
    assert row["selected"] == len(chosen) and row["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    assert row["loss_kept"] == pytest.approx(float(chosen.mean()), rel=1e-5)
    lowest = None if fields["objective"] in ("clm", "self-ref-both") else pytest.approx(float(scores.min()), abs=1e-4)
    assert row["threshold"] == lowest


@pytest.mark.parametrize(("scope", "keep", "among"), [("step", 1 / 38, 6), ("micro", 0.03, 3)])
def test_a_step_of_one_token_is_that_tokens_own(scope, keep, among):
    def choose(_every, windows):
        scores = by_reference(windows)
        highest = torch.cat(scores[:among]).max()
        return [(own == highest, own) for own in scores]

    gradients, chosen, _ = plainly(choose)
    ways, row = taken(run_of(objective="self-ref-loss", scope=scope, keep=keep))
    assert row["selected"] == len(chosen) == 1
    for name, gradient in gradients.items():
        torch.testing.assert_close(ways[name], -RATE * gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("scope", ["step", "micro"])
def test_a_step_that_keeps_nothing_moves_nothing(scope):
    ways, row = taken(run_of(objective="self-ref-loss", scope=scope, keep=0.001))
    assert row["selected"] == 0 and not any(way.any() for way in ways.values())


def test_a_spike_is_told_with_its_windows_and_taken_unless_it_is_asked_to_be_skipped():
    quiet = State(40, 0, 0, 0, {}, norms=[1e-3] * 16)
    for fields, moves in (({}, True), ({"skip_spikes": 9.0}, False)):
        ways, row = taken(run_of(**fields), quiet)
        assert len(row["spike"]) == 5 and any(way.any() for way in ways.values()) is moves
    assert "spike" not in taken(run_of(skip_spikes=9.0))[1]
    norm = taken(run_of())[1]["grad_norm"]
    between = State(40, 0, 0, 0, {}, norms=[norm / 7] * 16)  # over five times the median, which is loud, not nine
    assert "spike" in taken(run_of(), between)[1] and "spike" not in taken(run_of(skip_spikes=9.0), between)[1]


@pytest.mark.parametrize("what", ["a loss", "the gradient alone"])
def test_a_step_that_is_not_finite_is_refused_by_its_number_before_any_weight_moves(monkeypatch, what):
    seen = []
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: seen.append("step"))
    real = Live.forward

    def forward(live, batch, choose, count=None):
        judged = real(live, batch, choose, count)
        if what == "a loss":
            judged.losses[0, 0] = torch.inf
        else:
            judged.loss_sum.register_hook(lambda gradient: gradient * torch.inf)
        return judged

    monkeypatch.setattr(Live, "forward", forward)
    with pytest.raises(
        Diverged, match=r"x: loss or gradient is not finite at step 8; its worst windows: # \(row.*; lower"
    ):
        taken(run_of(), State(7, 0, 0, 0, {}))
    assert not seen


def seeds_of(monkeypatch, ranks=ALONE, seed=0, step=0, **fields):
    seen = []
    monkeypatch.setattr(torch, "manual_seed", seen.append)
    optimize(FakeLive(), torch.optim.SGD([nn.Parameter(torch.zeros(1))]), step_of()[0],
             run_of(ranks, seed=seed, **fields), State(step, 0, 0, 0, {}), RATE)  # fmt: skip
    monkeypatch.undo()
    return seen


class FakeLive(nn.Module):
    """Losses of 1 everywhere; notes when gradients are asked to be added up over copies."""

    def __init__(self):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.ones(1)), []

    def set_requires_all_reduce(self, on):
        self.asked.append(on)

    def forward(self, batch, choose, count=None):
        losses = torch.where(batch.targets == IGNORE, torch.nan, 1.0)
        mask = choose(losses)
        return SimpleNamespace(loss_sum=(self.weight * mask).sum(), losses=losses, mask=mask)


class Two(Ranks):
    """One of two ranks that hold the same."""

    def sum(self, values):
        return values * 2

    def least(self, values):
        return values

    def every(self, value, group=None):
        return [value, value]


def test_dropout_is_drawn_anew_each_step_on_each_rank_by_each_seed_and_the_same_for_choice_and_training(monkeypatch):
    two = [Two(rank, 2, torch.device("cpu")) for rank in range(2)]
    cases = [(two[rank], seed, step) for rank in range(2) for seed in range(2) for step in range(3)]
    seeds = [seeds_of(monkeypatch, ranks, seed, step) for ranks, seed, step in cases]
    assert all(len(seen) == 2 and seen[0] == seen[1] for seen in seeds)
    assert len({seen[0] for seen in seeds}) == len(cases) and all(isinstance(seen[0], int) for seen in seeds)


def test_gradients_are_added_up_over_copies_once_a_step_at_its_last_micro_batch():
    live = FakeLive()
    two = Two(0, 2, torch.device("cpu"))
    optimizer = torch.optim.SGD(live.parameters())
    optimize(live, optimizer, step_of([*LENGTHS, LENGTHS[0]])[0], run_of(two), START, RATE)
    assert live.asked == [False, False, True]
