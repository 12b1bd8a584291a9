"""Windows of planned steps, read before their step comes: each row group once, for all that this rank wants of it."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from schemas.errors import UserError
from schemas.shard import Window
from trainer.data import READERS, Source, Stretch

Place = tuple[int, int]  # a window's epoch and key
Found = dict[Place, Window]


@dataclass(frozen=True, slots=True)
class Placed:
    """A window and its place: `key` is its number in stored order, whatever the `epoch`."""

    epoch: int
    key: int
    window: Window


class Ahead:
    """Reads by threads what is asked for; what is merely wanted is read along with it.

    Wanted windows of a row group come by one reading of it, if all that is wanted of it is known when it is asked for.
    It holds this rank's windows alone, from asking to taking, and a row group a thread.
    """

    def __init__(self, source: Source, columns: Collection[str]):
        """`columns`: what is needed beside the tokens."""
        self.source, self.columns = source, frozenset(columns) & source.columns
        self.ends = np.cumsum(source.group_sizes)
        self.wanted: dict[tuple[int, int], list[Place]] = defaultdict(list)  # of an epoch's row group
        self.coming: dict[Place, Future[Found]] = {}
        self.readers = ThreadPoolExecutor(READERS, "windows")

    def want(self, windows: Stretch) -> None:
        """Say that these will be asked for."""
        for which, place in self._places(windows):
            self.wanted[which].append(place)

    def ask(self, windows: Stretch) -> None:
        """Begin to read what is wanted of these windows' row groups."""
        for epoch, group in dict.fromkeys(which for which, _ in self._places(windows)):
            if places := self.wanted.pop((epoch, group), None):
                self.coming |= dict.fromkeys(places, self.readers.submit(self._read, group, places))

    def take(self, windows: Stretch) -> list[Placed]:
        """The windows, which must have been asked for. Raises UserError naming a shard that is damaged."""
        places = [place for _, place in self._places(windows)]
        return [Placed(*place, self.coming.pop(place).result()[place]) for place in places]

    def close(self) -> None:
        """Leave no thread behind."""
        self.readers.shutdown(cancel_futures=True)

    def _places(self, windows: Stretch) -> Iterator[tuple[tuple[int, int], Place]]:
        """The epoch's row group, and the place, of each window."""
        groups, epochs = np.searchsorted(self.ends, windows.keys, side="right").tolist(), windows.epochs.tolist()
        return zip(zip(epochs, groups, strict=True), zip(epochs, windows.keys.tolist(), strict=True), strict=True)

    def _read(self, group: int, places: Sequence[Place]) -> Found:
        first = int(self.ends[group] - self.source.group_sizes[group])
        windows = self.source.read(group, [key - first for _, key in places], self.columns)
        valid = self.source.valid(np.array([key for _, key in places]))
        for (_, key), window, count in zip(places, windows, valid, strict=True):
            found, known = (len(window.tokens), window.valid), (self.source.lengths[key], count)
            if found != known:
                raise UserError(
                    f"row group {group}: window {key - first} holds {found[0]} tokens, {found[1]} of which count, and the"
                    f" index of lengths says {known[0]} and {known[1]}",
                    "delete the file `.lengths` beside the scores",
                )
        return dict(zip(places, windows, strict=True))
