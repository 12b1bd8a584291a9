"""Mixtures: several data sets interleaved by weight, so that any place of the order is found from one integer."""

from collections.abc import Collection, Iterator, Sequence
from functools import cached_property

import numpy as np

from schemas.errors import UserError
from schemas.seal import digest
from schemas.shard import Window
from trainer.data import Source, Stretch, block_windows, ordered
from trainer.ranks import Ranks

SCALE = 1 << 20  # distances between windows are whole numbers, so that no place depends on how a sum was rounded
STRETCH = 1024  # windows that are merged at a time


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
        self.scored_by = frozenset.union(*(source.scored_by for source in sources))
        self.made_of = frozenset.union(*(source.made_of for source in sources))
        self.conversations = any(source.conversations for source in sources)
        shares = [float(weight) for weight in weights]
        self.fingerprint = digest([[s.fingerprint, share] for s, share in zip(sources, shares, strict=True)])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, int32 [windows], source after source."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        return np.concatenate([source.lengths for source in self.sources])

    def valid(self, keys: np.ndarray) -> np.ndarray:
        """Tokens that count of the windows of these numbers."""
        ends, found = np.cumsum(self.windows), np.empty_like(keys)
        owners = np.searchsorted(ends, keys, side="right")
        for number, source in enumerate(self.sources):
            own = owners == number
            found[own] = source.valid(keys[own] - (ends[number] - self.windows[number]))
        return found

    def index(self, ranks: Ranks) -> None:
        """Have the counts ready, the work shared out over the ranks."""
        for source in self.sources:
            source.index(ranks)

    def read(
        self, group: int, rows: Sequence[int] | None = None, columns: Collection[str] | None = None
    ) -> list[Window]:
        """The windows of one group, or these `rows` of it; groups are numbered source after source."""
        for source in self.sources:
            if group < len(source.group_sizes):
                return source.read(group, rows, columns)
            group -= len(source.group_sizes)
        raise IndexError(group)

    def block(self, shuffle_groups: int) -> int:
        """Most windows of the order that come while one of the sources goes through a block of its own."""
        rates = [1 / distance for distance in self.distances]
        blocks = [block_windows(source, shuffle_groups) for source in self.sources]
        return max(round(size * sum(rates) / rate) for size, rate in zip(blocks, rates, strict=True)) + len(rates)

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

    def ordered(self, seed: int, shuffle_groups: int, position: int) -> Iterator[Stretch]:
        """Windows from `position` on, without end; each source in its own order."""
        drawn = self.drawn(position)
        feeds = [Feed(ordered(s, seed, shuffle_groups, count)) for s, count in zip(self.sources, drawn, strict=True)]
        first_key = [0, *np.cumsum(self.windows).tolist()]
        while True:
            position += STRETCH
            after = self.drawn(position)
            counts = [end - start for start, end in zip(drawn, after, strict=True)]
            dues = [distance * (2 * count + 1) for distance, count in zip(self.distances, drawn, strict=True)]
            # From the earliest on: whole numbers of any size become such of 64 bits.
            due = [
                due - min(dues) + 2 * distance * np.arange(count)
                for due, distance, count in zip(dues, self.distances, counts, strict=True)
            ]
            windows = Stretch.join([feed.take(count) for feed, count in zip(feeds, counts, strict=True)])
            windows.keys[:] += np.repeat(first_key[:-1], counts)
            yield windows[np.argsort(np.concatenate(due), kind="stable")]  # of equals the earlier source
            drawn = after


class Feed:
    """Takes any number of windows off stretches."""

    def __init__(self, stretches: Iterator[Stretch]):
        self.stretches, self.rest = stretches, Stretch(np.empty(0, np.int64), np.empty(0, np.int64))

    def take(self, count: int) -> Stretch:
        """The next `count` windows."""
        parts = [self.rest]
        while sum(map(len, parts)) < count:
            parts.append(next(self.stretches))
        joined = Stretch.join(parts)
        self.rest = joined[count:]
        return joined[:count]
