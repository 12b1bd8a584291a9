"""The head: losses of all tokens first, then a backward through the kept rows alone.

The logits of the forward are kept in the compute dtype, so the backward needs no second product for them:
2 + 4k products of rows x vocabulary instead of the 6 of a masked cross-entropy (k: kept share). When they
would not fit, kept rows are projected again (2 + 6k).
"""

from collections.abc import Callable
from typing import Any

import torch

from schemas.batch import IGNORE
from schemas.loss import CHUNK_TOKENS, project

KEPT_LOGITS_BYTES = 2 << 30
Choose = Callable[[torch.Tensor], torch.Tensor]  # float32 losses [n] -> mask [n]


class KeptLoss(torch.autograd.Function):
    """Sum over kept rows of the cross-entropy of `hidden @ weight.T`; equals a masked cross-entropy (law 11)."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, choose: Choose):  # type: ignore[override]
        """hidden [n, d], weight [vocab, d], targets [n]; `choose` maps losses [n] to a mask [n] of kept rows.

        Returns (sum of kept losses in nats, losses float32 [n] with NaN where unpredicted, mask).
        """
        fits = hidden.shape[0] * weight.shape[0] * hidden.element_size() <= KEPT_LOGITS_BYTES
        logits = hidden.new_empty(hidden.shape[0], weight.shape[0]) if fits else None
        losses, log_z = torch.full((2, hidden.shape[0]), torch.nan, device=hidden.device).unbind()
        for start in range(0, hidden.shape[0], CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            chunk = project(hidden[rows], weight)
            log_z[rows] = torch.logsumexp(chunk, dim=1)
            losses[rows] = log_z[rows] - chunk.gather(1, targets[rows].clamp_min(0)[:, None]).squeeze(1)
            if logits is not None:
                logits[rows] = chunk
        losses = torch.where(targets == IGNORE, torch.nan, losses)
        mask = choose(losses)
        ctx.save_for_backward(hidden, weight, targets, log_z, mask, logits)
        ctx.mark_non_differentiable(losses, mask)
        return losses[mask].sum(), losses, mask

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: Any):  # type: ignore[override]
        """Softmax minus one-hot on the kept rows, in two products."""
        hidden, weight, targets, log_z, mask, logits = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for rows in torch.nonzero(mask).squeeze(1).split(CHUNK_TOKENS):
            kept = hidden[rows]
            chunk = project(kept, weight) if logits is None else logits[rows].float()
            chunk = chunk.sub_(log_z[rows, None]).exp_()
            chunk.scatter_add_(1, targets[rows, None], chunk.new_full((len(rows), 1), -1.0))
            chunk = chunk.mul_(grad).to(hidden.dtype)
            grad_hidden[rows] = chunk @ weight
            grad_weight += (chunk.T @ kept).float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None
