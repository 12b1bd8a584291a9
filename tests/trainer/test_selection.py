"""Law 7: selection is a pure function of (excess, valid, keep)."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.selection import planned_count, quota, select_top, select_top_by_window

values = st.lists(st.one_of(st.integers(-3, 3).map(float), st.just(float("nan"))), min_size=1, max_size=60)
shares = st.sampled_from([0.1, 0.25, 0.5, 0.6, 0.7, 0.99, 1.0])


@given(values, shares)
def test_exactly_round_keep_times_valid_tokens_are_selected(excess, keep):
    mask = select_top(torch.tensor(excess), keep)
    assert int(mask.sum()) == quota(keep, int(np.isfinite(excess).sum()))


@given(values, shares)
def test_nan_is_never_selected(excess, keep):
    mask = select_top(torch.tensor(excess), keep)
    assert not torch.isnan(torch.tensor(excess)[mask]).any()


@given(values, shares)
def test_every_kept_token_beats_or_ties_before_every_dropped_one(excess, keep):
    tensor = torch.tensor(excess)
    mask = select_top(tensor, keep)
    for kept in torch.nonzero(mask).flatten().tolist():
        for dropped in torch.nonzero(~mask & ~torch.isnan(tensor)).flatten().tolist():
            assert (tensor[kept], -kept) > (tensor[dropped], -dropped)


@given(st.lists(values, min_size=1, max_size=6), shares)
def test_selection_within_windows_equals_selection_of_each_window_alone(windows, keep):
    excess = torch.tensor([value for window in windows for value in window])
    owner = torch.tensor([number for number, window in enumerate(windows) for _ in window])
    alone = torch.cat([select_top(torch.tensor(window), keep) for window in windows])
    assert torch.equal(select_top_by_window(excess, owner, keep), alone)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), shares)
def test_the_planned_count_is_what_selection_selects(counts, keep):
    excess = torch.randn(sum(counts))
    owner = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    assert planned_count(counts, keep, "micro") == int(select_top(excess, keep).sum())
    assert planned_count(counts, keep, "sequence") == int(select_top_by_window(excess, owner, keep).sum())
