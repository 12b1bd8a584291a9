"""Steps that go wrong: which are outliers, and which windows made them."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from schemas.batch import IGNORE
from trainer.ranks import Ranks
from trainer.stream import MicroBatch

HISTORY = 64  # gradient norms that a step is held against
FEWEST = 16  # before there are so many, nothing is an outlier
LOUD = 5.0  # times the median: worth a row in the log, whether or not such steps are skipped
NAMED = 5  # windows


def is_spike(norm: float, before: Sequence[float], times: float) -> bool:
    """Whether a gradient norm is over `times` the median of those before it."""
    return len(before) >= FEWEST and norm > times * median(before)


def remembered(before: Sequence[float], norm: float) -> list[float]:
    """The norms that the next step is held against: skipped steps' too, so that a lasting change ends the skipping."""
    return [*before, norm][-HISTORY:]


def worst(micros: Sequence[MicroBatch], losses: Sequence[torch.Tensor], ranks: Ranks) -> list[dict[str, Any]]:
    """The windows of a step of all ranks that are not finite, else those of the greatest mean loss, the worst first.

    `losses`: float32 nats of each micro-batch, [rows, row_tokens], NaN where nothing is predicted. `loss` is None where
    it is not finite. Every rank must call.
    """
    found: list[dict[str, Any]] = []
    for micro, values in zip(micros, losses, strict=True):
        values, counted = values.cpu(), (micro.batch.targets != IGNORE).cpu()
        for placed, place in zip(micro.placed, micro.batch.places, strict=True):
            own = values[place.row, place.predicted][counted[place.row, place.predicted]]
            mean = float(own.double().mean()) if len(own) else 0.0
            window = placed.window
            who = {"doc_id": window.doc_id, "row": window.row, "window": window.index}
            found.append(who | {"loss": mean if abs(mean) < float("inf") else None})
    every = [item for own in ranks.every(_first(found)) for item in own]
    return _first(every)


def _first(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda item: -float("inf") if item["loss"] is None else -item["loss"])[:NAMED]


def spelled(windows: Sequence[dict[str, Any]]) -> str:
    """Windows in a message."""
    return ", ".join(
        f"{item['doc_id']} (row {item['row']}, window {item['window']}: "
        + ("not finite)" if item["loss"] is None else f"{item['loss']:.2f} nats)")
        for item in windows
    )
