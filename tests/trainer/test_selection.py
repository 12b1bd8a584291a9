"""Law 7: selection is a pure function of (scores, valid, keep), held against a plain sort that knows nothing of it."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.config import Objective, Train
from trainer.ranks import Ranks
from trainer.selection import ALONE, OBJECTIVES, SCOPES, Selection, select_top, select_top_by_window

VALUES = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("nan"))), min_size=1, max_size=60)
SHARES = st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.7, 0.99, 1.0])


def plainly(scores: list[float], keep: float) -> list[bool]:
    """The best round(keep * valid) by score, the earlier of equals."""
    valid = [place for place, score in enumerate(scores) if not math.isnan(score)]
    best = sorted(valid, key=lambda place: (-scores[place], place))[: round(keep * len(valid))]
    return [place in best for place in range(len(scores))]


@given(VALUES, SHARES)
def test_the_top_round_keep_times_valid_are_selected_ties_to_the_earlier_nan_never(scores, keep):
    assert select_top(torch.tensor(scores), keep).tolist() == plainly(scores, keep)


@given(st.lists(VALUES, min_size=1, max_size=6), SHARES)
def test_selection_within_windows_is_selection_of_each_window_alone(windows, keep):
    scores = torch.tensor([value for window in windows for value in window])
    owner = torch.tensor([number for number, window in enumerate(windows) for _ in window])
    assert select_top_by_window(scores, owner, keep).tolist() == [
        kept for window in windows for kept in plainly(window, keep)
    ]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), SHARES, st.sampled_from(sorted(SCOPES)), st.data())
def test_the_count_known_before_the_forward_is_what_is_selected(counts, keep, scope, data):
    cut = data.draw(st.integers(0, len(counts)))
    micros, width = [counts[:cut], counts[cut:]], sum(counts) + 1
    live, owner = torch.full((2, 1, width), torch.nan), torch.full((2, 1, width), -1)
    for number, own in enumerate(micros):
        live[number, 0, : sum(own)] = torch.randn(sum(own))
        owner[number, 0, : sum(own)] = torch.repeat_interleave(torch.arange(len(own)), torch.tensor(own).long())
    selection = Selection.of("slm", scope, keep)
    assert selection.count(micros) == int(
        selection.masks(live, {"ref_loss": torch.randn(live.shape)}, owner, ALONE).sum()
    )


def together(world, work):
    """What `work` of each rank returns when they run side by side, in threads that meet at every collective."""
    meeting, box = threading.Barrier(world), [None] * world

    class Threaded(Ranks):
        def gather(self, values):
            box[self.rank] = values
            meeting.wait(60)
            every = torch.stack(box)
            meeting.wait(60)
            return every

        def sum(self, values):
            return self.gather(values).sum(0)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, [Threaded(rank, world, ALONE.device) for rank in range(world)]))


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=4, max_size=4), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), SHARES)
def test_in_step_scope_ranks_and_micro_batches_select_what_one_selects_of_all_rows(rows, world, per_micro, keep):
    per_micro = min(per_micro, 4 // world)
    width = max(map(len, rows))
    step = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows]).view(-1, world, per_micro, width)
    selection = Selection.of("self-ref-loss", "step", keep)

    def work(ranks):
        own = -step[:, ranks.rank]
        return selection.masks(own, {"ref_loss": own}, torch.zeros_like(own), ranks)

    found = torch.stack(together(world, work), 1)
    assert found.flatten().tolist() == plainly(step.flatten().tolist(), keep)


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=2, max_size=4), SHARES)
def test_in_micro_scope_the_ranks_select_together_what_one_rank_selects_of_all(rows, keep):
    width = max(map(len, rows))
    every = torch.tensor([row + [float("nan")] * (width - len(row)) for row in rows])
    selection = Selection.of("slm", "micro", keep)

    def work(ranks):
        own = every[ranks.rank].view(1, 1, width)
        return selection.masks(own, {"ref_loss": torch.zeros_like(own)}, torch.zeros_like(own), ranks)

    assert torch.cat(together(len(rows), work)).flatten().tolist() == plainly(every.flatten().tolist(), keep)


FLOATS = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1e-45, -1e-45, math.inf, -math.inf, math.nan])


@given(st.lists(FLOATS, min_size=1, max_size=50), SHARES)
def test_every_float_has_its_place_the_two_zeros_one_and_nan_none(scores, keep):
    assert select_top(torch.tensor(scores, dtype=torch.float32), keep).tolist() == plainly(scores, keep)


def test_what_scores_a_token():
    live, nothing = torch.tensor([3.0, 2.0, torch.nan]), torch.nan
    columns = {
        "ref_loss": torch.tensor([1.0, 5.0, nothing]),
        "ref_entropy": torch.tensor([0.5, 0.25, nothing]),
        "chance": torch.tensor([0.2, 0.9, nothing]),
    }
    scores = {
        name: [score(live, columns).tolist() for score in objective.scores] for name, objective in OBJECTIVES.items()
    }
    wanted = {
        "clm": [],
        "slm": [[2.0, -3.0, nothing]],
        "random": [[0.2, 0.9, nothing]],
        "self-ref-loss": [[-1.0, -5.0, nothing]],
        "self-ref-entropy": [[-0.5, -0.25, nothing]],
        "self-ref-both": [[-1.0, -5.0, nothing], [-0.5, -0.25, nothing]],
    }
    assert scores.keys() == wanted.keys()
    for name, found in scores.items():
        np.testing.assert_allclose(found, wanted[name], err_msg=name)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_what_says_so_asks_for_the_live_loss_and_no_column_but_its_own(name):
    objective = OBJECTIVES[name]
    shape = (2, 1, 9)
    columns = {column: torch.randn(shape) for column in objective.columns}
    owner = torch.zeros(shape)
    for scope in SCOPES:
        selection = Selection.of(name, scope, 0.5)
        one, other = (selection.masks(torch.randn(shape), columns, owner, ALONE) for _ in "ab")
        assert torch.equal(one, other) != objective.live


@given(st.lists(st.tuples(VALUES.map(lambda v: v[0]), st.integers(-3, 3)), min_size=1, max_size=60), SHARES)
def test_of_two_scores_a_token_is_kept_that_each_would_keep_alone(pairs, keep):
    losses = [loss for loss, _ in pairs]
    entropies = [math.nan if math.isnan(loss) else float(entropy) for loss, entropy in pairs]
    columns = {"ref_loss": torch.tensor(losses).view(1, 1, -1), "ref_entropy": torch.tensor(entropies).view(1, 1, -1)}
    selection = Selection.of("self-ref-both", "micro", keep)
    assert selection.ahead
    mask = selection.masks(columns["ref_loss"], columns, torch.zeros(1, 1, len(pairs)), ALONE)
    by_each = [plainly([-value for value in values], keep) for values in (losses, entropies)]
    assert mask.flatten().tolist() == [one and other for one, other in zip(*by_each, strict=True)]


def test_plain_training_keeps_every_predicted_token_whatever_keep_says():
    live = torch.tensor([[[1.0, float("nan"), 2.0]]])
    for scope in SCOPES:
        selection = Selection.of("clm", scope, 0.1)
        assert not selection.ahead and selection.splits
        assert selection.masks(live, {}, live, ALONE).tolist() == [[[True, False, True]]]
        assert selection.count([[3, 4], [5]]) == 12


def test_the_names_that_the_config_takes_are_those_that_are_registered():
    assert set(get_args(Objective)) == set(OBJECTIVES)
    assert set(get_args(Train.model_fields["scope"].annotation)) == set(SCOPES)
    with pytest.raises(KeyError):
        Selection.of("slm2", "micro", 0.5)
