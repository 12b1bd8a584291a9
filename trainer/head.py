"""The head: losses of all tokens first, then a backward through the kept rows alone.

The forward keeps log-probabilities in the compute dtype, so the backward needs no second product for them:
2 + 4k products of rows x vocabulary instead of the 6 of a masked cross-entropy (k: kept share). When they
would not fit, kept rows are projected again (2 + 6k).

Kept as log-probabilities, bfloat16 costs the gradient nothing beside what its products cost (0.3 to 0.5 % of the
largest entry, kept or projected again): rounding is relative, and the probable tokens' are near zero. Kept as logits
it cost 0.7, 3.6 and 8.9 % at logits of standard deviation 2, 5 and 10.
"""

from collections.abc import Callable
from typing import Any

import torch

from schemas.batch import IGNORE
from schemas.loss import CHUNK_TOKENS
from schemas.product import product, project

KEPT_BYTES = 2 << 30
Choose = Callable[[torch.Tensor], torch.Tensor]  # float32 losses of any shape -> mask of the same shape


def log_probabilities(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float32 [n, vocab] of hidden [n, d] under the head `weight` [vocab, d]; one tensor of that size is made."""
    logits = project(hidden, weight)
    return logits.sub_(torch.logsumexp(logits, dim=1, keepdim=True))


class KeptLoss(torch.autograd.Function):
    """Sum over kept rows of the cross-entropy of `hidden @ weight.T`; equals a masked cross-entropy (law 11)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        choose: Choose,
        count: int | None = None,
        compute: torch.dtype | None = None,
    ):
        """hidden [n, d], weight [vocab, d], targets [n]; `choose` maps losses [n] to a mask [n] of kept rows.

        count: how many it keeps; the backward asks the device, and waits for it, if that is not known. compute: dtype of
        the products; gradients are of the dtypes given, so that a float32 weight's is not rounded on the way.
        Returns (sum of kept losses in nats, losses float32 [n] with NaN where unpredicted, mask).
        """
        ctx.dtypes, compute = (hidden.dtype, weight.dtype), compute or hidden.dtype
        hidden, weight = hidden.to(compute), weight.to(compute)
        fits = hidden.shape[0] * weight.shape[0] * hidden.element_size() <= KEPT_BYTES
        stored = hidden.new_empty(hidden.shape[0], weight.shape[0]) if fits and ctx.needs_input_grad[0] else None
        losses = torch.full((hidden.shape[0],), torch.nan, device=hidden.device)
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            log_p = log_probabilities(hidden[rows], weight)
            losses[rows] = -log_p.gather(1, targets[rows].clamp_min(0)[:, None]).squeeze(1)
            if stored is not None:
                stored[rows] = log_p
        losses = torch.where(targets == IGNORE, torch.nan, losses)
        mask = choose(losses)
        ctx.save_for_backward(hidden, weight, targets, mask, stored)
        ctx.mark_non_differentiable(losses, mask)
        ctx.count = count
        return torch.where(mask, losses, 0.0).sum(), losses, mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any):  # type: ignore[override]
        """Softmax minus one-hot on the kept rows, in two products."""
        hidden, weight, targets, mask, stored = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), None
        found = torch.nonzero(mask) if ctx.count is None else torch.nonzero_static(mask, size=ctx.count)
        for rows in found.squeeze(1).split(CHUNK_TOKENS):
            kept = hidden[rows]
            log_p = log_probabilities(kept, weight) if stored is None else stored[rows].float()
            chunk = log_p.exp_()
            chunk.scatter_add_(1, targets[rows, None], chunk.new_full((len(rows), 1), -1.0))
            chunk = chunk.mul_(grad).to(hidden.dtype)
            grad_hidden[rows] = product(chunk, weight.T)
            own = product(chunk.T, kept.T).float()
            grad_weight = own if grad_weight is None else grad_weight.add_(own)
        if grad_weight is None:
            grad_weight = torch.zeros_like(weight)
        of_hidden, of_weight = ctx.dtypes
        return grad_hidden.to(of_hidden), grad_weight.to(of_weight), None, None, None, None
