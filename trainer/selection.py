"""Selection: which tokens a step trains on. Pure functions and two small registries; no model.

Equations 3 and 5 of Rho-1 with everything the paper leaves open decided: exactly round(keep * valid) tokens, ties go to
the earlier token, NaN is never selected. A new objective is one entry of OBJECTIVES (what scores a token) and its test;
a new scope one entry of SCOPES (what it is ranked over).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Columns = Mapping[str, torch.Tensor]  # float32, shaped as the losses, NaN where nothing is predicted
Gather = Callable[[torch.Tensor], torch.Tensor]  # [n] on each rank -> [ranks, n] on all


@dataclass(frozen=True, slots=True)
class Objective:
    """What scores a token: the live loss and `columns`, by name. Without a score every token is kept."""

    columns: tuple[str, ...] = ()
    score: Callable[[torch.Tensor, Columns], torch.Tensor] | None = None


OBJECTIVES: dict[str, Objective] = {
    "clm": Objective(),
    "slm": Objective(("ref_loss",), lambda live, columns: live - columns["ref_loss"]),  # excess loss, equation 3
    "random": Objective(("chance",), lambda live, columns: torch.where(live.isnan(), torch.nan, columns["chance"])),
}


@dataclass(frozen=True, slots=True)
class Scope:
    """What tokens are ranked over.

    mask: scores [n], window numbers [n] and keep to the mask [n] of this rank's kept tokens.
    count: valid tokens of each window of the micro-batch of all ranks, and keep, to the tokens that it keeps.
    splits: whether the choice stays the same however a step is cut into micro-batches and ranks (law 9).
    """

    mask: Callable[[torch.Tensor, torch.Tensor, float, Gather, int], torch.Tensor]
    count: Callable[[Sequence[int], float], int]
    splits: bool


def quota(keep: float, valid: int) -> int:
    """How many of `valid` tokens are kept: round(keep * valid), halves to even."""
    return round(keep * valid)


def select_top(scores: torch.Tensor, keep: float) -> torch.Tensor:
    """Mask of the top `keep` share by `scores` [n]; NaN marks what does not count (padding, first tokens)."""
    return select_top_by_window(scores, torch.zeros_like(scores, dtype=torch.int64), keep)


def select_top_by_window(scores: torch.Tensor, window: torch.Tensor, keep: float) -> torch.Tensor:
    """`select_top` within each window: `window` [n] holds window numbers, `scores` [n] nats or NaN.

    Example, keep 0.5: scores 3 1 2 | 5 NaN 4 4 of windows 0 | 1 have quotas round(1.5) = 2 and 2, and keep 3 2 | 5 4,
    the earlier of the two fours.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    valid = torch.nonzero(~torch.isnan(scores)).squeeze(1)
    if not len(valid):
        return mask
    # Two stable sorts: by score, then by window; equal scores keep the order of positions.
    order = valid[torch.argsort(scores[valid], descending=True, stable=True)]
    order = order[torch.argsort(window[order], stable=True)]
    _, counts = torch.unique_consecutive(window[order], return_counts=True)
    first = torch.cumsum(counts, 0) - counts
    rank = torch.arange(len(order), device=scores.device) - torch.repeat_interleave(first, counts)
    quotas = torch.round(keep * counts.double()).long()
    mask[order[rank < torch.repeat_interleave(quotas, counts)]] = True
    return mask


def _over_ranks(scores: torch.Tensor, _window: torch.Tensor, keep: float, gather: Gather, rank: int) -> torch.Tensor:
    """Over the micro-batch of all ranks: 4 bytes a token in one gather make count, threshold and ties exact everywhere."""
    every = gather(scores)
    return select_top(every.flatten(), keep).view_as(every)[rank]


def _within_windows(
    scores: torch.Tensor, window: torch.Tensor, keep: float, _gather: Gather, _rank: int
) -> torch.Tensor:
    return select_top_by_window(scores, window, keep)


SCOPES: dict[str, Scope] = {
    "micro": Scope(_over_ranks, lambda counts, keep: quota(keep, sum(counts)), splits=False),
    "sequence": Scope(_within_windows, lambda counts, keep: sum(quota(keep, count) for count in counts), splits=True),
}


@dataclass(frozen=True, slots=True)
class Selection:
    """An objective over a scope: everything the loop asks about which tokens count."""

    objective: Objective
    scope: Scope
    keep: float

    @classmethod
    def of(cls, objective: str, scope: str, keep: float) -> "Selection":
        """The selection that the config names. Raises KeyError for a name that is not registered."""
        return cls(OBJECTIVES[objective], SCOPES[scope], keep)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that must stand beside the tokens."""
        return self.objective.columns

    @property
    def splits(self) -> bool:
        """Whether a step may be cut in any way without changing the choice."""
        return self.objective.score is None or self.scope.splits

    def scores(self, live: torch.Tensor, columns: Columns) -> torch.Tensor | None:
        """What tokens are ranked by, shaped as the live losses; None where nothing is ranked."""
        return None if self.objective.score is None else self.objective.score(live, columns)

    def mask(
        self, live: torch.Tensor, columns: Columns, window: torch.Tensor, gather: Gather, rank: int
    ) -> torch.Tensor:
        """Tokens this rank trains on; live [rows, row_tokens] is NaN where nothing is predicted."""
        scores = self.scores(live, columns)
        if scores is None:
            return ~torch.isnan(live)
        return self.scope.mask(scores.flatten(), window.flatten(), self.keep, gather, rank).view_as(live)

    def count(self, counts: Sequence[int]) -> int:
        """Tokens kept of a micro-batch of all ranks, known before its forward: what the loss is divided by.

        `counts`: valid tokens of each of its windows.
        """
        return sum(counts) if self.objective.score is None else self.scope.count(counts, self.keep)
