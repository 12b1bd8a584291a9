"""Selection: which tokens a step trains on. Pure functions and two small registries; no model.

Equations 3 and 5 of Rho-1 with everything the paper leaves open decided: exactly round(keep * valid) tokens, ties go to
the earlier token, NaN is never selected. A new objective is one entry of OBJECTIVES (what scores a token) and its test;
a new scope one entry of SCOPES (what it is ranked over).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.ranks import ALONE, Ranks

Columns = Mapping[str, torch.Tensor]  # float32, shaped as the losses, NaN where nothing is predicted
Score = Callable[[torch.Tensor, Columns], torch.Tensor]  # live losses and columns to scores: the highest are kept
DIGITS = (11, 11, 10)  # bits of a float32, the highest first: histograms of 16 KB at most go between the ranks


@dataclass(frozen=True, slots=True)
class Objective:
    """What scores a token, from the `columns` stored beside it and, if `live`, from its loss under the live model.

    Without scores every token is kept; with several, a token that is selected by each of them alone.
    """

    columns: tuple[str, ...] = ()
    scores: tuple[Score, ...] = ()
    live: bool = False


def excess(live: torch.Tensor, columns: Columns) -> torch.Tensor:
    """Live loss minus reference loss, nats (equation 3)."""
    return live - columns["ref_loss"]


def highest(column: str) -> Score:
    """A stored column as it stands."""
    return lambda _live, columns: columns[column]


def lowest(column: str) -> Score:
    """A stored column, the least first."""
    return lambda _live, columns: -columns[column]


OBJECTIVES: dict[str, Objective] = {
    "clm": Objective(),
    "slm": Objective(("ref_loss",), (excess,), live=True),
    "random": Objective(("chance",), (highest("chance"),)),
    # Self-reference (section 3.4): the reference was trained on the corpus itself, and alone says what is kept.
    "self-ref-loss": Objective(("ref_loss",), (lowest("ref_loss"),)),
    "self-ref-entropy": Objective(("ref_entropy",), (lowest("ref_entropy"),)),
    "self-ref-both": Objective(("ref_loss", "ref_entropy"), (lowest("ref_loss"), lowest("ref_entropy"))),
}


@dataclass(frozen=True, slots=True)
class Scope:
    """What tokens are ranked over.

    mask: scores and window numbers [micro-batches, n] of what is ranked together, and keep, to the mask of this rank's.
    count: valid tokens of each window of what is ranked together, on all ranks, and keep, to the tokens that it keeps.
    splits: whether the choice stays the same however a step is cut into micro-batches and ranks (law 9).
    whole: whether all micro-batches of a step are ranked together, and not each by itself.
    """

    mask: Callable[[torch.Tensor, torch.Tensor, float, Ranks], torch.Tensor]
    count: Callable[[Sequence[int], float], int]
    splits: bool
    whole: bool = False


def quota(keep: float, valid: int) -> int:
    """How many of `valid` tokens are kept: round(keep * valid), halves to even."""
    return round(keep * valid)


def select_top(scores: torch.Tensor, keep: float, ranks: Ranks = ALONE) -> torch.Tensor:
    """Mask of the top `keep` share by `scores` [..., n] of all ranks; NaN marks what does not count.

    Equals go to the earlier: by all dimensions but the last, then by rank, then by the last, which is how the rows of a
    step are dealt out. Nothing is sorted and no score is sent: ranks add up histograms of the scores' bits.

    Example, keep 0.5: of 3 1 2 4 NaN 2 round(2.5) = 2 are kept, 3 and 4; at keep 0.6 the first 2 as well.
    """
    keys = ordered_bits(scores)
    threshold, room = threshold_of(keys, keep, ranks)
    tied = (keys == threshold).flatten(0, -2) if keys.ndim > 1 else (keys == threshold)[None]
    by_turn = ranks.gather(tied.sum(1)).T.flatten()  # equals of micro-batch 0 on rank 0, 1 ..., of micro-batch 1 ...
    before = (by_turn.cumsum(0) - by_turn).view(-1, ranks.world)[:, ranks.rank]
    first = tied & (before[:, None] + tied.cumsum(1) <= room)
    return (keys > threshold) | first.view_as(keys)


def ordered_bits(scores: torch.Tensor) -> torch.Tensor:
    """Whole numbers in [0, 2**32) that are ordered, and equal, as float32 scores are; -1 for NaN."""
    bits = (scores.float() + 0.0).view(torch.int32).long()  # + 0.0: the two zeros are equal
    return torch.where(torch.isnan(scores), -1, torch.where(bits < 0, ~bits, bits + 2**31))


def threshold_of(keys: torch.Tensor, keep: float, ranks: Ranks = ALONE) -> tuple[torch.Tensor, torch.Tensor]:
    """The lowest key that belongs to the top `keep` share of all ranks' keys, and how many equal to it do.

    Digit after digit: of the keys that begin as the threshold does, a histogram of their next digit says which it has.
    """
    keys = keys.flatten()
    prefix, room, shift = torch.zeros((), dtype=torch.int64, device=keys.device), None, sum(DIGITS)
    for bits in DIGITS:
        among = keys >> shift == prefix
        shift, digits = shift - bits, 1 << bits
        histogram = torch.zeros(digits, dtype=torch.int64, device=keys.device)
        histogram.scatter_add_(0, keys >> shift & digits - 1, among.long())
        above = ranks.sum(histogram).flip(0).cumsum(0)  # keys that have at least this digit, from the highest on
        if room is None:
            room = torch.round(keep * above[-1].double()).long()
        place = (above < room).sum()
        # A slice, not a number: indexing by one would wait for the device.
        higher = above.index_select(0, (place - 1).clamp_min(0)[None])[0]
        room = room - torch.where(place > 0, higher, 0)
        prefix = (prefix << bits) + digits - 1 - place
    assert room is not None
    return prefix, room


def select_top_by_window(scores: torch.Tensor, window: torch.Tensor, keep: float) -> torch.Tensor:
    """`select_top` within each window: `window` [n] holds window numbers, `scores` [n] nats or NaN.

    Example, keep 0.5: scores 3 1 2 | 5 NaN 4 4 of windows 0 | 1 have quotas round(1.5) = 2 and 2, and keep 3 2 | 5 4,
    the earlier of the two fours.
    """
    counted = ~torch.isnan(scores)
    owner = torch.where(counted, window.long(), torch.iinfo(torch.int64).max)  # what does not count comes last
    # Two stable sorts: by score, then by window; equal scores keep the order of positions.
    order = torch.argsort(scores, descending=True, stable=True)
    order = order[torch.argsort(owner[order], stable=True)]
    sorted_owner = owner[order]
    first, end = (torch.searchsorted(sorted_owner, sorted_owner, right=right) for right in (False, True))
    rank = torch.arange(len(order), device=scores.device) - first
    kept = rank < torch.round(keep * (end - first).double()).long()
    return torch.empty_like(kept).scatter_(0, order, kept) & counted


def _over_ranks(scores: torch.Tensor, _window: torch.Tensor, keep: float, ranks: Ranks) -> torch.Tensor:
    return select_top(scores, keep, ranks)


def _within_windows(scores: torch.Tensor, window: torch.Tensor, keep: float, _ranks: Ranks) -> torch.Tensor:
    return torch.stack([select_top_by_window(*own, keep) for own in zip(scores, window, strict=True)])


def _of_all(counts: Sequence[int], keep: float) -> int:
    return quota(keep, sum(counts))


SCOPES: dict[str, Scope] = {
    "micro": Scope(_over_ranks, _of_all, splits=False),
    "sequence": Scope(_within_windows, lambda counts, keep: sum(quota(keep, count) for count in counts), splits=True),
    "step": Scope(_over_ranks, _of_all, splits=True, whole=True),
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
        return not self.objective.scores or self.scope.splits

    @property
    def ahead(self) -> bool:
        """Whether the masks of a whole step must stand before its first backward.

        They do where all its tokens are ranked together, and where only the masks say how many tokens they keep.
        """
        return len(self.objective.scores) > 1 or (self.scope.whole and bool(self.objective.scores))

    def ranked(self, live: torch.Tensor, columns: Columns) -> torch.Tensor | None:
        """The one score that tokens are ranked by, shaped as the live losses; None where there is none, or several."""
        scores = self.objective.scores
        return scores[0](live, columns) if len(scores) == 1 else None

    def masks(self, live: torch.Tensor, columns: Columns, window: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        """Tokens this rank trains on, of micro-batches [micro-batches, rows, row_tokens]: of the whole step if `ahead`.

        live: float32 nats, NaN where nothing is predicted; it may be anything if the objective does not ask for it.
        """
        if not self.objective.scores:
            return ~torch.isnan(live)
        mask, windows = torch.ones_like(live, dtype=torch.bool), window.flatten(1)
        for score in self.objective.scores:
            scores = score(live, columns).flatten(1)
            parts = [slice(None)] if self.scope.whole else [slice(i, i + 1) for i in range(len(scores))]
            found = [self.scope.mask(scores[part], windows[part], self.keep, ranks) for part in parts]
            mask &= torch.cat(found).view_as(mask)
        return mask

    def own_count(self, every: Sequence[int], own: Sequence[int], ranks: Ranks) -> int | None:
        """Tokens that this rank keeps of a micro-batch, if they are known before any forward; else only its mask says.

        every: valid tokens of each window of the micro-batch of all ranks; own: of this rank's.
        """
        if not self.objective.scores:
            return sum(own)
        if self.ahead:
            return None
        apart = self.scope.splits and not self.scope.whole  # each window has its own quota, whoever holds it
        return self.scope.count(own if apart else every, self.keep) if apart or ranks.world == 1 else None

    def count(self, micros: Sequence[Sequence[int]]) -> int:
        """Tokens kept of a step on all ranks, known before any forward: what its loss is divided by.

        micros: valid tokens of each window of each micro-batch of all ranks. Not for several scores, which must be asked.
        """
        if not self.objective.scores:
            return sum(map(sum, micros))
        assert len(self.objective.scores) == 1
        parts = [[count for counts in micros for count in counts]] if self.scope.whole else micros
        return sum(self.scope.count(counts, self.keep) for counts in parts)
