"""Steps that go wrong: outliers by their definition, windows named, steps not taken, and all of it the same after a stop."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import UserError
from schemas.models import open_tokenizer
from trainer import spikes
from trainer.data import ScoreShards
from trainer.loop import Run, Stopped, train
from trainer.ranks import Ranks
from trainer.spikes import is_spike, remembered, spelled, worst
from trainer.stream import Geometry, Order, steps

ALONE = Ranks(rank=0, world=1, device=torch.device("cpu"))


def test_an_outlier_is_over_so_many_times_the_median_of_enough_steps():
    before = [1.0] * 10 + [2.0] * 6
    assert is_spike(3.1, before, 3.0) and not is_spike(3.0, before, 3.0)
    assert not is_spike(100.0, before[1:], 3.0)
    assert remembered(list(range(64)), 7.0) == [*range(1, 64), 7.0]


def a_step(scores):
    order, geometry = Order(ScoreShards(scores.score.output), 0, 2), Geometry(8, 64, 4)
    micros = next(steps(order, geometry, 0)).micros
    return micros, [torch.where(micro.batch.targets < 0, torch.nan, 1.0) for micro in micros]


def test_windows_that_are_not_finite_come_first_then_those_of_the_greatest_mean_loss(scores):
    micros, losses = a_step(scores)
    named = [(0, 1, math.nan), (1, 0, math.inf), (0, 0, 9.0), (1, 1, 8.0)]
    for micro, number, value in named:
        place = micros[micro].batch.places[number]
        losses[micro][place.row, place.start if not math.isfinite(value) else place.predicted] = value
    found = worst(micros, losses, ALONE)
    windows = [micros[micro].placed[number].window for micro, number, _ in named]
    wanted = [{"doc_id": window.doc_id, "row": window.row, "window": window.index} for window in windows]
    assert [{key: item[key] for key in wanted[0]} for item in found[:4]] == wanted
    assert [item["loss"] for item in found] == [None, None, 9.0, 8.0, 1.0]
    assert spelled(found[1:3]) == (
        f"{windows[1].doc_id} (row {windows[1].row}, window {windows[1].index}: not finite), "
        f"{windows[2].doc_id} (row {windows[2].row}, window {windows[2].index}: 9.00 nats)"
    )


class Beside(Ranks):
    """One of two ranks; the other one's windows are these."""

    def every(self, value, group=None):
        assert len(value) <= 5
        return [value, [OTHER | {"loss": loss} for loss in (None, 5.0, 0.5, 0.25)]]


OTHER = {"doc_id": "of the other rank", "row": 1, "window": 2}


def test_the_worst_windows_are_those_of_all_ranks_and_a_window_in_which_nothing_counts_is_none_of_them(scores):
    micros, losses = a_step(scores)
    place = micros[0].batch.places[0]
    own = micros[0].batch.targets[place.row, place.predicted]
    own[:] = -100  # a window of a conversation of which nothing is trained on
    micros[0].batch.targets[place.row, place.predicted] = own
    losses[1][micros[1].batch.places[0].row, micros[1].batch.places[0].predicted] = 7.0
    found = worst(micros, losses, Beside(0, 2, torch.device("cpu")))
    assert [item["loss"] for item in found] == [None, 7.0, 5.0, 1.0, 1.0]
    assert [item["doc_id"] == "of the other rank" for item in found] == [True, False, True, False, False]
    everywhere = worst(micros[:1], [torch.zeros_like(losses[0]) - 1.0], ALONE)
    assert everywhere[0]["loss"] == 0.0 and everywhere[0]["doc_id"] == micros[0].placed[0].window.doc_id


def go(scores, output, report=lambda row, done: None, **fields):
    base = Path(scores.base)
    fields = {"epochs": 1, "checkpoint_every": 3, **fields, "output": output}
    settings, source = scores.train.model_copy(update=fields), ScoreShards(scores.score.output)
    return train(Run(settings, scores.context, base, source, open_tokenizer(base, "base"), ALONE, None, report))


def test_a_run_that_breaks_names_its_windows(scores, tmp_path):
    with pytest.raises(UserError, match=r"not finite at step \d+; its worst windows: \S+ \(row \d+, window \d+: "):
        go(scores, tmp_path, learning_rate=1e30, schedule="constant", warmup=0.0)


def rows_of(output):
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    keys = ("kind", "step", "grad_norm", "loss_all", "skipped", "windows")
    return [{key: row[key] for key in keys if key in row} for row in rows if row["kind"] != "model"]


def test_outliers_are_logged_with_their_windows_and_skipped_when_asked_also_after_a_stop(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "FEWEST", 2)
    whole = go(scores, tmp_path / "whole", skip_spikes=1.02)
    logged = [row for row in rows_of(tmp_path / "whole") if row["kind"] == "spike"]
    assert len(logged) > 1 and all(row["skipped"] and len(row["windows"]) == 5 for row in logged)
    seen = []

    def stop(row, done):
        seen.append(row)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        go(scores, tmp_path / "cut", stop, skip_spikes=1.02)
    cut = go(scores, tmp_path / "cut", skip_spikes=1.02)
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    taken = go(scores, tmp_path / "taken")
    one, other, third = ((folder / "model.safetensors").read_bytes() for folder in (whole, cut, taken))
    assert one == other != third
    monkeypatch.setattr("trainer.loop.LOUD", 1.02)
    go(scores, tmp_path / "loud")
    assert [row["skipped"] for row in rows_of(tmp_path / "loud") if row["kind"] == "spike"][:1] == [False]


def test_a_skipped_step_leaves_the_weights_as_they_were(scores, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.loop.is_spike", lambda norm, before, times: True)
    monkeypatch.setattr("trainer.loop.worst", lambda *_: [])
    final = go(scores, tmp_path, skip_spikes=2.0, epochs=0.3)
    base = load_file(Path(scores.base) / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(final / "model.safetensors").items())
