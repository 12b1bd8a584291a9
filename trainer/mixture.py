"""Mixtures: several data sets interleaved by weight, so that any place of the order is found from one integer."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from schemas.errors import UserError
from schemas.seal import digest
from schemas.shard import Window
from trainer.data import Placed, Source, ordered

SCALE = 1 << 20  # distances between windows are whole numbers, so that no place depends on how a sum was rounded


class Mixture:
    """Sources by weight in tokens; each goes through its own epochs in its own order.

    Window j of a source is due at `distance * (2 j + 1)`, where its distance is its mean window's tokens over its weight;
    windows come as they are due, the earlier source first. So the share of tokens is the weight's as far as a source's
    windows so far are as long as its mean, and exactly so whenever it has gone through an epoch.

    Example, windows of one length, weights 2 and 1: the distances are 1 and 2, windows are due at 1 3 5 7 ... and at
    2 6 10 ..., and come as a b a a b a a b a ...
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]):
        """Raises UserError if a source is empty."""
        self.sources = sources
        self.windows = [int(source.group_sizes.sum()) for source in sources]
        if not all(self.windows):
            raise UserError("train.mixture: a dataset holds no windows", "look at them with `tokensift inspect`")
        self.distances = [
            max(1, round(SCALE * source.tokens * sum(weights) / (windows * weight)))
            for source, windows, weight in zip(sources, self.windows, weights, strict=True)
        ]
        self.group_sizes = np.concatenate([source.group_sizes for source in sources])
        self.tokens = sum(source.tokens for source in sources)
        self.columns = frozenset.intersection(*(source.columns for source in sources))
        shares = [float(weight) for weight in weights]
        self.fingerprint = digest([[s.fingerprint, share] for s, share in zip(sources, shares, strict=True)])

    def read(self, group: int) -> list[Window]:
        """The windows of one group; groups are numbered source after source."""
        for source in self.sources:
            if group < len(source.group_sizes):
                return source.read(group)
            group -= len(source.group_sizes)
        raise IndexError(group)

    def drawn(self, position: int) -> list[int]:
        """How many windows of each source are among the first `position` of the order."""
        if position == 0:
            return [0] * len(self.sources)

        def by(time: int) -> list[int]:
            return [(time // distance + 1) // 2 for distance in self.distances]

        early, late = 0, min(self.distances) * (2 * position + 1)  # due before `early` too few, by `late` enough
        while early < late:
            middle = (early + late) // 2
            early, late = (early, middle) if sum(by(middle)) >= position else (middle + 1, late)
        counts = by(early - 1)
        for number, last in enumerate(by(early)):  # of those due at this very time the first sources'
            if sum(counts) < position:
                counts[number] = last
        return counts

    def ordered(self, seed: int, shuffle_groups: int, position: int) -> Iterator[Placed]:
        """Windows from `position` on, without end; `shuffle_groups` row groups of each source are held at a time."""
        drawn = self.drawn(position)
        streams = [ordered(s, seed, shuffle_groups, count) for s, count in zip(self.sources, drawn, strict=True)]
        due = [distance * (2 * count + 1) for distance, count in zip(self.distances, drawn, strict=True)]
        first_key = [0, *np.cumsum(self.windows).tolist()]
        while True:
            number = due.index(min(due))
            placed = next(streams[number])
            yield replace(placed, key=first_key[number] + placed.key)
            due[number] += 2 * self.distances[number]
