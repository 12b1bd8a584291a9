"""Objectives: which score ranks the tokens, over which scope, and how each is normalised."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from schemas.config import Objective
from trainer.select import planned_count, select_top, select_top_by_window
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
