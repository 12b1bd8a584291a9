"""Objectives: which score ranks the tokens, over which scope, and how each is normalised."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from schemas.config import Objective
from trainer.stream import Micro

# torch 2.13 renamed it and warns about the old name.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def token_scores(objective: Objective, losses: torch.Tensor, micro: Micro) -> torch.Tensor:
    """What tokens are ranked by: excess loss L_live - L_ref for `slm` (equation 3), a fixed draw for `random`."""
    if objective == "slm":
        return losses - micro.ref_loss
    return torch.where(torch.isnan(losses), torch.nan, micro.chance)


def chooser(
    objective: Objective, scope: str, keep: float, micro: Micro, rank: int, world: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from losses [rows, row_tokens] to the mask of tokens this rank trains on."""

    def choose(losses: torch.Tensor) -> torch.Tensor:
        if objective == "clm":
            return ~torch.isnan(losses)
        scores = token_scores(objective, losses, micro)
        if scope == "sequence":
            return select_top_by_window(scores.flatten(), micro.window.flatten(), keep).view(losses.shape)
        every = scores.flatten()
        if world > 1:  # 4 bytes a token: one gather makes count, threshold and ties exact on every rank
            every = scores.new_empty(world * scores.numel())
            gather_into(every, scores.flatten())
        return select_top(every, keep).view(world, *losses.shape)[rank]

    return choose


def selected_tokens(objective: Objective, scope: str, keep: float, micros: list[Micro]) -> int:
    """Tokens that a step trains on, over all ranks and micro-batches: what its loss is divided by."""
    if objective == "clm":
        return sum(sum(micro.counts) for micro in micros)
    return sum(planned_count(micro.counts, keep, scope) for micro in micros)


def quota(keep: float, valid: int) -> int:
    """How many of `valid` tokens are kept: round(keep * valid), halves to even."""
    return round(keep * valid)


def select_top(excess: torch.Tensor, keep: float) -> torch.Tensor:
    """Mask of the top `keep` share by `excess` [n]; NaN marks what does not count (padding, first tokens)."""
    return select_top_by_window(excess, torch.zeros_like(excess, dtype=torch.int64), keep)


def select_top_by_window(excess: torch.Tensor, window: torch.Tensor, keep: float) -> torch.Tensor:
    """`select_top` within each window: `window` [n] holds window numbers, `excess` [n] nats or NaN."""
    mask = torch.zeros_like(excess, dtype=torch.bool)
    valid = torch.nonzero(~torch.isnan(excess)).squeeze(1)
    if not len(valid):
        return mask
    # Two stable sorts: by excess, then by window; equal excess keeps the order of positions.
    order = valid[torch.argsort(excess[valid], descending=True, stable=True)]
    order = order[torch.argsort(window[order], stable=True)]
    _, counts = torch.unique_consecutive(window[order], return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(order), device=excess.device) - torch.repeat_interleave(first, counts)
    quotas = torch.round(keep * counts.double()).long()
    mask[order[rank < torch.repeat_interleave(quotas, counts)]] = True
    return mask


def planned_count(counts: Sequence[int], keep: float, scope: str) -> int:
    """How many tokens a micro-batch will train on, known before its forward: the divisor of the loss.

    `counts`: valid tokens of each of its windows.
    """
    return quota(keep, sum(counts)) if scope == "micro" else sum(quota(keep, count) for count in counts)
