"""Law 7: selection is a pure function of (scores, valid, keep), held against a plain sort that knows nothing of it."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.config import Objective, Train
from trainer.selection import OBJECTIVES, SCOPES, Selection, select_top, select_top_by_window

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


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), SHARES, st.sampled_from(sorted(SCOPES)))
def test_the_count_known_before_the_forward_is_what_is_selected(counts, keep, scope):
    live = torch.randn(sum(counts))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    selection = Selection.of("slm", scope, keep)
    columns = {"ref_loss": torch.randn(sum(counts))}
    mask = selection.mask(live[None], columns, owner[None], lambda values: values[None], 0)
    assert selection.count(counts) == int(mask.sum())


@given(st.lists(VALUES, min_size=2, max_size=4), SHARES)
def test_in_micro_scope_the_ranks_select_together_what_one_rank_selects_of_all(ranks, keep):
    width = max(map(len, ranks))
    padded = [torch.tensor(scores + [float("nan")] * (width - len(scores))) for scores in ranks]
    every = torch.stack(padded)
    selection = Selection.of("slm", "micro", keep)
    parts = [
        selection.mask(own[None], {"ref_loss": torch.zeros(1, width)}, torch.zeros(1, width), lambda _: every, rank)
        for rank, own in enumerate(padded)
    ]
    assert torch.cat(parts).flatten().tolist() == plainly(every.flatten().tolist(), keep)


def test_what_scores_a_token():
    live, reference = torch.tensor([3.0, 2.0, float("nan")]), torch.tensor([1.0, 5.0, float("nan")])
    columns = {"ref_loss": reference, "chance": torch.tensor([0.2, 0.9, 0.5])}
    scores = {
        name: objective.score(live, columns) if objective.score else None for name, objective in OBJECTIVES.items()
    }
    np.testing.assert_array_equal(scores["slm"], [2.0, -3.0, np.nan])
    np.testing.assert_array_equal(scores["random"], torch.tensor([0.2, 0.9, torch.nan]))
    assert scores["clm"] is None


def test_plain_training_keeps_every_predicted_token_whatever_keep_says():
    live = torch.tensor([[1.0, float("nan"), 2.0]])
    selection = Selection.of("clm", "micro", 0.1)
    assert selection.mask(live, {}, live, lambda values: values, 0).tolist() == [[True, False, True]]
    assert selection.count([3, 4]) == 7


def test_the_names_that_the_config_takes_are_those_that_are_registered():
    assert set(get_args(Objective)) == set(OBJECTIVES)
    assert set(get_args(Train.model_fields["scope"].annotation)) == set(SCOPES)
    with pytest.raises(KeyError):
        Selection.of("slm2", "micro", 0.5)
