"""`train.compile`: decoder layers compiled one by one, and held to the model as it was proven before they run a step."""

import numpy as np
import torch
from torch.nn.functional import pad

from schemas.batch import Batch, collate
from schemas.compiling import compile_layers, compiling, uncompiled
from schemas.errors import UserError
from schemas.probe import TOLERANCE_NATS
from trainer.live import Live, choose_none
from trainer.ranks import Ranks
from trainer.stream import Geometry

ROUNDED_NATS = 0.05  # mean difference of bfloat16 losses: 0.003 to 0.01 at 135M, where kernels round at other places


def compile_live(live: Live) -> None:
    """Have the layers compiled for the one shape that a run's micro-batches have. Call it before sharding."""
    live.compiled = True
    compile_layers(live.model)


def prove_compiled(live: Live, geometry: Geometry, window: int, ranks: Ranks, dropout: bool = False) -> None:
    """Hold compiled layers to the plain ones in the shape and dtype of a step, and windows apart (law 13).

    Every rank must call. Raises UserError if losses are others, if a window's change with its neighbour, or if the layers
    cannot be compiled.
    """
    row_tokens = geometry.row_tokens
    live.model.eval()
    length = min(window, row_tokens if live.opened.isolation == "alone" else max(2, row_tokens // 2))
    vocabulary = live.model.get_output_embeddings().weight.shape[0]
    shape = (geometry.micro_rows, row_tokens, length, vocabulary)
    one, other = (_batch(*shape, change).to(ranks.device) for change in (0, 1))
    with uncompiled(), torch.no_grad():
        wanted = live(one, choose_none).losses
    with compiling("train.compile"):
        found, changed = (live(batch, choose_none).losses for batch in (one, other))
    live.model.train(dropout)
    apart = float(pad((found - changed)[:, length:].abs().nan_to_num().flatten(), (0, 1)).max())
    difference = (found - wanted).abs()
    exact = live.opened.compute == torch.float32
    distance = float(difference.nan_to_num().max() if exact else difference.nanmean())
    if not max(distance / (TOLERANCE_NATS if exact else ROUNDED_NATS), apart / TOLERANCE_NATS) <= 1:
        raise UserError(
            f"train.compile: compiled layers give other losses (by {distance:.2g} nats; by {apart:.2g} with what else is in"
            " the row)",
            "set it to false",
        )


def _batch(rows: int, row_tokens: int, length: int, vocabulary: int, change: int) -> Batch:
    """Random windows of `length`, as many as a row holds; with `change` the first of each row is another."""
    numbers = np.arange(rows * (row_tokens // length)).reshape(rows, -1)
    windows = list(np.random.default_rng(0).integers(0, vocabulary, (numbers.size, length)))
    for first in numbers[:, 0]:
        windows[first] = (windows[first] + change) % vocabulary
    return collate(windows, numbers.tolist(), row_tokens)
