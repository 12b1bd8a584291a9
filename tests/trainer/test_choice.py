"""What a step trains on where its masks stand before its first backward, and what a column that is lacking is called."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from schemas.batch import collate
from schemas.errors import UserError
from tests.trainer.made import made
from trainer.choice import choice, chosen_ahead, require_columns
from trainer.ranks import ALONE, Ranks
from trainer.selection import Selection
from trainer.stream import MicroBatch

NAN = torch.nan
LIVE = [  # losses of two micro-batches of one row of two windows: 4 and 3 tokens
    torch.tensor([[5.0, 1.0, 4.0, NAN, 2.0, 9.0, NAN]]),
    torch.tensor([[3.0, 8.0, 7.0, NAN, 6.0, 0.0, NAN]]),
]
REF = torch.tensor([[1.0, 1.0, 1.0, NAN, 1.0, 8.5, NAN]])
ENTROPY = torch.tensor([[0.5, 3.0, 0.1, NAN, 2.0, 0.2, NAN]])


def micros():
    batch = collate([np.arange(4), np.arange(3)], [[0, 1]], 7)
    return [MicroBatch(batch, {"ref_loss": REF, "ref_entropy": ENTROPY}, [3, 2]) for _ in LIVE]


class Judge:
    """A live model whose losses are those above; counts its forwards."""

    def __init__(self):
        self.forwards = 0

    def __call__(self, batch, choose):
        losses = LIVE[self.forwards]
        assert not choose(losses).any() and not torch.is_grad_enabled()
        self.forwards += 1
        return SimpleNamespace(losses=losses)


def test_in_scope_step_the_whole_steps_highest_excess_losses_are_chosen_for_one_forward_each():
    judge = Judge()
    chosen = chosen_ahead(judge, micros(), Selection.of("slm", "step", 0.4), ALONE)
    # Excess: 4 0 3 | 1 0.5 and 2 7 6 | 5 -8.5; of ten the four highest are 7, 6, 5 and 4.
    assert chosen.masks.int().tolist() == [[[1, 0, 0, 0, 0, 0, 0]], [[0, 1, 1, 0, 1, 0, 0]]]
    assert (chosen.counts, chosen.every.item(), judge.forwards) == ([1, 3], 4, 2)


def test_what_two_scores_both_keep_is_chosen_without_a_forward():
    judge = Judge()
    chosen = chosen_ahead(judge, micros(), Selection.of("self-ref-both", "sequence", 0.67), ALONE)
    # Of each window: two of 1 1 1 by loss are the earlier, by entropy 0.1 and 0.5; one of 1 8.5, and of 2.0 0.2.
    assert chosen.masks.int().tolist() == [[[1, 0, 0, 0, 0, 0, 0]]] * 2
    assert (chosen.counts, chosen.every.item(), judge.forwards) == ([1, 1], 2, 0)


class Three(Ranks):
    """One of three ranks that hold the same."""

    def sum(self, values):
        return values * 3


def test_the_divisor_is_what_all_ranks_keep_and_one_at_least():
    three = Three(0, 3, torch.device("cpu"))
    chosen = chosen_ahead(Judge(), micros(), Selection.of("self-ref-both", "sequence", 0.67), three)
    assert (chosen.counts, chosen.every.item()) == ([1, 1], 6)
    nothing = chosen_ahead(Judge(), micros(), Selection.of("slm", "step", 0.01), ALONE)
    assert (nothing.counts, nothing.every.item(), int(nothing.masks.sum())) == ([0, 0], 1, 0)


def test_a_micro_batch_takes_its_own_part_of_what_was_chosen_else_it_chooses_by_itself():
    selection, (one, other) = Selection.of("slm", "step", 0.4), micros()
    chosen = chosen_ahead(Judge(), [one, other], selection, ALONE)
    for index, micro in enumerate((one, other)):
        choose, count = choice(selection, micro, ALONE, chosen, index)
        assert torch.equal(choose(LIVE[index]), chosen.masks[index]) and count == chosen.counts[index]
    selection = Selection.of("slm", "sequence", 0.4)
    choose, count = choice(selection, one, ALONE, None, 0)
    assert choose(LIVE[0]).int().tolist() == [[1, 0, 0, 0, 1, 0, 0]] and count == 2
    choose, count = choice(Selection.of("clm", "micro", 0.4), one, ALONE, None, 0)
    assert torch.equal(choose(LIVE[0]), ~torch.isnan(LIVE[0])) and count == 5


@pytest.mark.parametrize(
    ("objective", "there", "lacking", "fix"),
    [
        ("slm", set(), "ref_loss", "train on scores"),
        ("self-ref-both", {"ref_loss"}, "ref_entropy", r"score the corpus with score\.entropy: true"),
        ("self-ref-entropy", {"ref_loss"}, "ref_entropy", r"score the corpus with score\.entropy: true"),
    ],
)
def test_a_column_that_an_objective_reads_and_the_data_lack_is_named_with_the_way_to_it(objective, there, lacking, fix):
    with pytest.raises(UserError, match=rf"train\.objective: {objective} needs the column `{lacking}`, .*; {fix}"):
        require_columns(objective, made([3], columns=there))
    require_columns(objective, made([3], columns=("ref_loss", "ref_entropy")))
    for free in ("clm", "random"):
        require_columns(free, made([3], columns=there))


def test_what_is_ranked_over_all_ranks_is_asked_of_all_ranks_and_its_count_is_not_known():
    selection, micro = Selection.of("slm", "micro", 0.4), micros()[0]
    choose, count = choice(selection, micro, ALONE, None, 0)
    assert choose(LIVE[0]).int().tolist() == [[1, 0, 1, 0, 0, 0, 0]] and count == 2  # of excess 4 0 3 | 1 0.5
    three = Better(0, 3, torch.device("cpu"))
    choose, count = choice(selection, micro, three, None, 0)
    assert count is None and not choose(LIVE[0]).any()  # the others hold what is better by far


class Better(Ranks):
    """One of three ranks, the others of which hold five tokens each of the highest score there is."""

    def sum(self, values):
        if values.ndim:
            values[-1] += 10
        return values

    def gather(self, values):
        return torch.stack([values, *[torch.full_like(values, 5)] * 2])
