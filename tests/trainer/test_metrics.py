"""Figures of a step against sums written out; rows of a log against what a reader of its files finds."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.metrics import Log, StepStats, read_metrics
from trainer.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
NAN = float("nan")
NORM = torch.tensor(0.5)


class OfTwo:
    """Two ranks of which the other found the same sums, and one lower score."""

    def sum(self, values):
        return 2 * values

    def least(self, values):
        return torch.minimum(values, torch.tensor([-7.0]))


def stats_of(*micros):
    stats = StepStats(torch.device("cpu"))
    for losses, mask, predicted, scores in micros:
        tensors = [torch.tensor(losses), torch.tensor(mask), torch.tensor(predicted)]
        stats.add(*tensors, None if scores is None else torch.tensor(scores))
    return stats


# The last column of each row is not predicted: its loss is NaN, and its score counts for nothing.
FIRST = ([[1.0, 2.0, 4.0, NAN]], [[True, False, True, False]], [[True, True, True, False]], [[0.5, -9.0, 0.25, NAN]])
SECOND = ([[8.0, 16.0, NAN]], [[False, True, False]], [[True, True, False]], [[-9.0, 3.0, NAN]])


def test_figures_are_means_over_all_kept_and_dropped_tokens_of_a_step():
    assert stats_of(FIRST, SECOND).means(ALONE, NORM) == {
        "loss_all": 31 / 5,
        "loss_kept": 21 / 3,
        "loss_dropped": 10 / 2,
        "threshold": 0.25,
        "score_over": [3 / 5, 3 / 5, 3 / 5, 3 / 5, 2 / 5, 1 / 5, 1 / 5],  # at least -2, -1, -0.5, 0, 0.5, 1, 2 nats
        "keep": 3 / 5,
        "broken": 0.0,
        "selected": 3.0,
        "grad_norm": 0.5,
    }


def test_figures_of_ranks_are_those_of_all_their_tokens():
    found = stats_of(FIRST, SECOND).means(OfTwo(), NORM)
    assert (found["loss_all"], found["loss_kept"], found["loss_dropped"], found["keep"]) == (31 / 5, 7, 5, 3 / 5)
    assert (found["selected"], found["threshold"]) == (6, -7)
    assert found["score_over"] == stats_of(FIRST, SECOND).means(ALONE, NORM)["score_over"]


def test_what_has_no_tokens_or_was_not_ranked_has_no_figure():
    found = stats_of(([2.0, 4.0], [True, True], [True, True], None)).means(ALONE, NORM)
    assert (found["loss_all"], found["loss_kept"], found["loss_dropped"], found["threshold"]) == (3, 3, None, None)
    assert found["score_over"] is None
    empty = stats_of(([NAN], [False], [False], [NAN])).means(ALONE, NORM)
    assert (empty["loss_all"], empty["loss_kept"], empty["keep"], empty["selected"]) == (0, 0, 0, 0)
    assert (empty["loss_dropped"], empty["threshold"]) == (None, None)


def test_a_single_token_is_its_own_mean():
    found = stats_of(([2.0, 5.0], [True, False], [True, True], [1.0, 0.0])).means(ALONE, NORM)
    assert (found["loss_all"], found["loss_kept"], found["loss_dropped"], found["keep"]) == (3.5, 2, 5, 0.5)
    found = stats_of(([2.0], [True], [True], None)).means(ALONE, NORM)
    assert (found["loss_all"], found["loss_kept"], found["keep"]) == (2, 2, 1)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_losses_that_are_not_finite_are_counted_where_something_is_predicted(bad):
    losses, predicted = [bad, bad, 1.0, NAN], [True, True, True, False]
    assert stats_of((losses, [True, False, True, False], predicted, None)).means(ALONE, NORM)["broken"] == 2


def test_sums_over_a_step_do_not_lose_small_losses_beside_large_ones():
    losses = [2.0**25, *[1.0] * 64]
    kept = stats_of((losses, [True] * 65, [True] * 65, None)).means(ALONE, NORM)
    dropped = stats_of((losses, [False] * 65, [True] * 65, None)).means(ALONE, NORM)
    assert kept["loss_kept"] == dropped["loss_dropped"] == (2**25 + 64) / 65
    one = ([1.0], [True], [True], None)
    assert stats_of(([2.0**25], [True], [True], None), one).means(ALONE, NORM)["loss_kept"] == (2**25 + 1) / 2


def test_figures_are_gathered_where_the_losses_are():
    stats = StepStats(torch.device("meta"))
    assert (stats.sums.device.type, stats.lowest.device.type) == ("meta", "meta")


def test_no_figure_keeps_what_it_would_take_to_differentiate_it():
    losses = torch.ones(3, requires_grad=True)
    stats = StepStats(torch.device("cpu"))
    stats.add(losses, torch.tensor([True, True, False]), torch.ones(3, dtype=torch.bool), losses * 2)
    assert not stats.sums.requires_grad and not stats.lowest.requires_grad


def rows_of(folder: Path):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def board_of(folder: Path):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def written(folder, first, last):
    """A log that goes on after step `first`, with a row of each kind for every step up to `last`."""
    log = Log(folder, first)
    for step in range(first, last + 1):
        if step > first:
            log.write("train", step, {"loss": step / 2})
        log.write("eval", step, {"loss": step / 4})
    log.close()


def test_rows_and_scalars_hold_what_was_written(tmp_path):
    log = Log(tmp_path / "deep" / "run", 0)
    log.write("train", 1, {"loss": 0.5, "dropped": None, "position": 7, "isolation": "packed"})
    log.write("train", 2, {"score_over": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25]})
    log.write("eval", 1, {"loss": 0.25})
    assert rows_of(tmp_path / "deep" / "run") == [  # at once: a reader need not wait for the run's end
        {"kind": "train", "step": 1, "loss": 0.5, "dropped": None, "position": 7, "isolation": "packed"},
        {"kind": "train", "step": 2, "score_over": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.25]},
        {"kind": "eval", "step": 1, "loss": 0.25},
    ]
    log.close()
    assert log.file.closed
    board = board_of(tmp_path / "deep" / "run")
    assert board.pop("train/score_over/2") == [(2, 0.25)] and len([tag for tag in board if "score_over" in tag]) == 6
    assert {tag: rows for tag, rows in board.items() if "score_over" not in tag} == {
        "train/loss": [(1, 0.5)],
        "train/position": [(1, 7)],
        "eval/loss": [(1, 0.25)],
    }


@pytest.mark.parametrize("saved", [1, 3])
def test_a_log_that_goes_on_drops_the_rows_after_its_checkpoint_and_keeps_those_before(tmp_path, saved):
    written(tmp_path, 0, 5)
    before = [row for row in rows_of(tmp_path) if row["step"] <= saved]
    log = Log(tmp_path, saved)
    assert rows_of(tmp_path) == before
    log.write("train", saved + 1, {"loss": 9.0})
    log.close()
    assert rows_of(tmp_path) == [*before, {"kind": "train", "step": saved + 1, "loss": 9.0}]
    # The board takes back what steps said that came after the checkpoint.
    assert [value for step, value in board_of(tmp_path)["train/loss"] if step > saved] == [9.0]


def test_a_log_that_starts_anew_is_empty(tmp_path):
    written(tmp_path, 0, 2)
    Log(tmp_path, 0).close()
    assert rows_of(tmp_path) == []


def test_syncing_makes_the_rows_durable(tmp_path, monkeypatch):
    seen = []
    log = Log(tmp_path, 0)
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(Path(f"/proc/self/fd/{handle}").readlink()))
    log.sync()
    assert seen == [tmp_path / "metrics.jsonl"]
    log.close()


def test_what_is_left_of_a_crash_is_read_up_to_the_first_line_that_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    good = {"kind": "train", "step": 1, "loss": 2.0}
    for bad in ('{"kind": "train", "st', '{"step": 2}', '{"kind": "train"}', "[]", '{"kind": "train", "step": "x"}'):
        path.write_text("\n".join([json.dumps(good), bad, json.dumps(good)]) + "\n")
        assert read_metrics(path) == [good]
    path.write_text(json.dumps(good | {"step": "3"}) + "\n")
    assert read_metrics(path) == [good | {"step": 3}]
