"""The forward: an opened model, and the one function that runs it. Attention, dtype and positions are decided here."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from schemas.attention import bounded
from schemas.batch import Batch, batches, best_fit, collate, one_a_row, renumbered

ENGINE = "hf-by-shape"  # named anew when the forward's arithmetic changes: scores of two kinds are not mixed
Isolation = Literal["varlen", "packed", "alone"]


@dataclass(frozen=True, slots=True)
class Opened:
    """A causal language model, and what was proven of it when it was opened.

    linear: logits are `last_hidden_state @ output_embeddings.weight.T` and nothing more.
    isolation: `varlen`: attention is told the windows' boundaries; `packed`: it reads them off restarting positions;
    `alone`: each window needs a row of its own.
    compute: dtype of the forward's products; float32 parameters are cast for them.
    """

    module: Any
    linear: bool
    isolation: Isolation
    compute: torch.dtype

    def rows(self, lengths: list[int], row_tokens: int) -> list[list[int]]:
        """How windows of these lengths share rows of at most `row_tokens` under this model."""
        return one_a_row(lengths) if self.isolation == "alone" else best_fit(lengths, row_tokens)

    def batches(self, lengths: list[int], window: int, batch_tokens: int) -> list[list[list[int]]]:
        """Rows of window numbers, batch after batch of about `batch_tokens`: a function of the lengths alone.

        With boundaries a batch is one long row: it holds no padding. Without, rows are no longer than a `window`, for
        a mask costs their square.
        """
        row_tokens = max(window, batch_tokens) if self.isolation == "varlen" else window
        # Rows of one window share batches, for those need no mask.
        rows = sorted(self.rows(lengths, row_tokens), key=lambda row: len(row) > 1)
        return batches(rows, lengths, batch_tokens)

    def collated(
        self, windows: Sequence[np.ndarray], window: int, batch_tokens: int
    ) -> Iterator[tuple[list[int], Batch]]:
        """`batches` of windows of token ids, with the numbers of their windows in the rows' order."""
        for rows in self.batches(list(map(len, windows)), window, batch_tokens):
            members = [index for row in rows for index in row]
            yield members, collate([windows[index] for index in members], renumbered(rows))


def forward(model: Opened, batch: Batch) -> torch.Tensor:
    """Run a model on a batch: the only place that does, for the scorer, the trainer, evaluation and the report.

    Returns last hidden states [rows, row_tokens, d] if the head is linear, else finished logits [rows, row_tokens, vocab].
    """
    # Alone, a model counts positions itself: some families know no other ones.
    named: dict[str, Any] = {} if model.isolation == "alone" else {"position_ids": batch.positions}
    body = model.module.base_model if model.linear else model.module
    told = model.isolation == "varlen"
    if told:
        named |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.bounds)
        named |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest)
        # Else transformers looks for windows in the positions, and waits for the device to say what it found.
        named["attention_mask"] = torch.ones_like(batch.ids, dtype=torch.bool)
    with casting(model), bounded() if told else nullcontext():
        output = body(input_ids=batch.ids, use_cache=False, **named)
    return output.last_hidden_state if model.linear else output.logits


def decoder_layers(module: Any) -> nn.ModuleList:
    """The longest list of modules in the body; empty if there is none."""
    lists = [item for item in module.base_model.modules() if isinstance(item, nn.ModuleList)]
    return max(lists, key=len, default=nn.ModuleList())


@contextmanager
def casting(model: Opened) -> Iterator[None]:
    """Products in `compute` dtype while parameters stay what they are; nothing to do where they agree."""
    parameter = next(model.module.parameters())
    # A parameter sharded by FSDP is cast by its own policy.
    cast = parameter.dtype != model.compute and not hasattr(parameter, "full_tensor")
    with torch.autocast(parameter.device.type, model.compute) if cast else nullcontext():
        yield
