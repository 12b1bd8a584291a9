"""How the selection meets the data and the live model: what it reads, and when it is asked."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from schemas.errors import UserError
from trainer.data import Source
from trainer.head import Choose
from trainer.live import Live, choose_none
from trainer.metrics import read
from trainer.ranks import Ranks
from trainer.selection import OBJECTIVES, Selection
from trainer.stream import CHANCE, MicroBatch

MAKE_COLUMN = {
    "ref_loss": "train on scores",
    "ref_entropy": "score the corpus with score.entropy: true, into another score.output",
}


def require_columns(objective: str, source: Source) -> None:
    """Raise UserError naming a column that the objective reads and the data lack."""
    for column in OBJECTIVES[objective].columns:
        if column != CHANCE and column not in source.columns:
            raise UserError(
                f"train.objective: {objective} needs the column `{column}`, which these data do not have",
                MAKE_COLUMN[column],
            )


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step trains on, known before its first backward.

    masks: bool [micro-batches, rows, row_tokens] of this rank; counts: tokens of each; every: of all ranks, 1 at least,
    still on the device.
    """

    masks: torch.Tensor
    counts: list[int]
    every: torch.Tensor


def choice(
    selection: Selection, micro: MicroBatch, ranks: Ranks, chosen: Chosen | None, index: int
) -> tuple[Choose, int | None]:
    """What the live model asks for the mask of this rank's tokens when it has their losses, and their number if known."""
    if chosen:
        return lambda _losses: chosen.masks[index], chosen.counts[index]
    columns = {name: values[None] for name, values in micro.columns.items()}
    return (
        lambda losses: selection.masks(losses[None], columns, micro.batch.owner[None], ranks)[0],
        selection.own_count(micro.counts, micro.batch.valid, ranks),
    )


@torch.no_grad()
def chosen_ahead(live: Live, micros: Sequence[MicroBatch], selection: Selection, ranks: Ranks) -> Chosen:
    """Choose for this rank's part of a whole step, `micros` on its device.

    An objective that asks for the live loss costs one more forward; a static one none.
    """
    shape = micros[0].batch.ids.shape
    losses = [
        live(micro.batch, choose_none).losses if selection.objective.live else torch.empty(shape, device=ranks.device)
        for micro in micros
    ]
    columns = {name: torch.stack([micro.columns[name] for micro in micros]) for name in selection.columns}
    owner = torch.stack([micro.batch.owner for micro in micros])
    masks = selection.masks(torch.stack(losses), columns, owner, ranks)
    counts = masks.flatten(1).sum(1)
    every = ranks.sum(counts.sum()).clamp_min(1)
    return Chosen(masks, [int(count) for count in read(counts)], every)
