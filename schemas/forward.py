"""The forward: an opened model, and the one function that runs it. Attention, dtype and positions are decided here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from schemas.batch import Batch, best_fit, one_a_row

Isolation = Literal["packed", "alone"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A causal language model, and what was proven of it when it was opened.

    linear: logits are `last_hidden_state @ output_embeddings.weight.T` and nothing more.
    isolation: `packed`: windows that share a row do not see each other; `alone`: each needs a row of its own.
    compute: dtype of the forward's products; float32 parameters are cast for them.
    """

    module: Any
    linear: bool
    isolation: Isolation
    compute: torch.dtype

    def rows(self, lengths: list[int], row_tokens: int) -> list[list[int]]:
        """How windows of these lengths share rows of at most `row_tokens` under this model."""
        return best_fit(lengths, row_tokens) if self.isolation == "packed" else one_a_row(lengths)


def forward(model: Opened, batch: Batch) -> torch.Tensor:
    """Run a model on a batch: the only place that does, for the scorer, the trainer, evaluation and the report.

    Returns last hidden states [rows, row_tokens, d] if the head is linear, else finished logits [rows, row_tokens, vocab].
    """
    # Alone, a model counts positions itself: some families know no other ones.
    positions = {"position_ids": batch.positions} if model.isolation == "packed" else {}
    body = model.module.base_model if model.linear else model.module
    with casting(model):
        output = body(input_ids=batch.ids, use_cache=False, **positions)
    return output.last_hidden_state if model.linear else output.logits


@contextmanager
def casting(model: Opened) -> Iterator[None]:
    """Products in `compute` dtype while parameters stay what they are; nothing to do where they agree."""
    parameter = next(model.module.parameters())
    # A parameter sharded by FSDP is cast by its own policy.
    cast = parameter.dtype != model.compute and not hasattr(parameter, "full_tensor")
    with torch.autocast(parameter.device.type, model.compute, enabled=cast):
        yield
