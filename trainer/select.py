"""Selection: which tokens a step trains on. Pure functions; no model, no processes.

`select_top` is equation 5 of Rho-1 with everything the paper leaves open decided: exactly round(keep * valid)
tokens, ties go to the earlier token, NaN is never selected.
"""

from collections.abc import Sequence

import torch


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
