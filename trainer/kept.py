"""`train.backward: kept`: a token that is not trained on carries no gradient through the layers either.

The exact backward goes through all tokens, since a dropped one is still context: its keys and values carry gradients of
the kept ones behind it. Here they are taken as they are, as if detached, so that a layer's backward products go over kept
rows alone: 2 + 4k of the 6 products of a step (k: kept share), beside attention's own. Losses, and so the selection, are
exact; gradients are not (Collider, arXiv 2502.00340). Off by default.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from schemas.errors import UserError
from schemas.forward import decoder_layers
from schemas.product import autocast_dtype, install, product


class KeptRows:
    """Which rows of the batch in flight are kept, rows laid end to end: known after its forward, before its backward."""

    def __init__(self) -> None:
        self.tokens, self.index = 0, torch.empty(0, dtype=torch.int64)

    def set(self, mask: torch.Tensor, count: int | None) -> None:
        """Take the mask of a batch; `count` of its tokens are kept, if that is known: the device is not asked then."""
        flat = mask.flatten()
        found = torch.nonzero(flat) if count is None else torch.nonzero_static(flat, size=count)
        self.tokens, self.index = len(flat), found.squeeze(1)


def carry_kept(module: nn.Module) -> KeptRows:
    """Have the linear layers of a model's decoder layers go back through kept rows alone.

    Raises UserError if there are none: some families have layers of their own kind.
    """
    kept = KeptRows()
    if not sum(install(layer, partial(_multiply, kept)) for layer in decoder_layers(module)):
        raise UserError(f"train.backward: kept: {type(module).__name__} has no plain linear layers", "set it to full")
    return kept


def _multiply(kept: KeptRows, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if (compute := autocast_dtype(rows.device)) is not None:  # autocast does not look into functions of others
        rows, weight, bias = rows.to(compute), weight.to(compute), None if bias is None else bias.to(compute)
    if not torch.is_grad_enabled():
        return product(rows, weight, bias)
    found: Any = _KeptProduct.apply(rows, weight, bias, kept)
    return found


class _KeptProduct(torch.autograd.Function):
    """`product` whose gradients are those of kept rows; of all where the rows are not a batch's (routed to an expert)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kept: KeptRows):  # type: ignore[override]
        ctx.save_for_backward(rows, weight)
        ctx.kept = kept
        return product(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad[:3]
        flat, given = grad.flatten(0, -2), rows.flatten(0, -2)
        whole = len(flat) != ctx.kept.tokens
        if not whole:
            flat, given = flat[ctx.kept.index], given[ctx.kept.index]
        found = None
        if of_rows:
            found = product(flat, weight.T)
            if not whole:
                found = torch.zeros_like(rows).flatten(0, -2).index_copy_(0, ctx.kept.index, found)
            found = found.view_as(rows)
        return (
            found,
            product(flat.T, given.T) if of_weight else None,
            flat.sum(0) if of_bias else None,
            None,
        )
