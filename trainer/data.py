"""Where windows come from, and in which order.

The order is a pure function of (seed, epoch) and of the dataset: row groups are permuted, then windows are
shuffled inside blocks of `shuffle_groups` row groups. Each row group is therefore read once an epoch, and any
position in the order can be opened by reading one block. State is one integer: windows consumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from schemas.errors import UserError
from schemas.fingerprint import difference
from schemas.place import Place, each
from schemas.receipt import Layout, Receipt, read_complete, read_dataset, read_receipts
from schemas.seal import digest
from schemas.shard import SCORE_AGAIN, Window, open_shard, read_group, shard_metadata
from schemas.window import token_hashes
from trainer.cache import Cache


class Source(Protocol):
    """Windows in numbered groups, `tokens` in all. `columns`: what is stored beside their tokens."""

    fingerprint: str
    group_sizes: np.ndarray
    tokens: int
    columns: frozenset[str]

    def read(self, group: int) -> list[Window]:
        """The windows of one group, in stored order."""
        ...


class ScoreShards:
    """The committed units of a score dataset, indexed by their Parquet footers alone."""

    def __init__(self, root: Place, partial: bool = False, cache: Cache | None = None):
        """Index a dataset; `partial` accepts one whose scoring did not come to its end. `cache` opens its shards.

        Raises UserError if it is empty, unfinished or damaged, mixes settings, or holds a shard under another name.
        """
        self.root, self.cache, layout = root, cache or Cache(), Layout(root)
        self.dataset: dict[str, Any] = read_dataset(layout)
        receipts = read_receipts(layout)
        if not receipts:
            raise UserError(f"{root}: no receipts, so no verified scores", "run `make score`")
        check_whole(layout, set(receipts), partial)
        shards = each(root, self._groups, map(layout.shard, receipts), receipts.values())
        self.groups = [group for groups in shards for group in groups]
        self.group_sizes = np.array([group.windows for group in self.groups], dtype=np.int64)
        self.fingerprint = digest([self.dataset, sorted(receipt.sha256 for receipt in receipts.values())])
        self.tokens = sum(receipt.tokens for receipt in receipts.values())
        entropy = bool(self.dataset["scorer"].get("entropy"))
        self.columns = frozenset({"ref_loss", "ref_entropy"} if entropy else {"ref_loss"})

    def _groups(self, path: Place, receipt: Receipt) -> list["Group"]:
        try:
            there = self.cache.size(path) == receipt.bytes
        except FileNotFoundError:
            there = False
        if not there:
            raise UserError(
                f"{path}: missing or not the {receipt.bytes} bytes of its receipt", "see `tokensift verify`"
            )
        file = open_shard(self.cache.open(path))
        metadata = shard_metadata(path, file)
        changed = difference(self.dataset, metadata.fingerprint)
        if changed:
            raise UserError(
                f"{path}: made with other settings than dataset.json says: {'; '.join(changed)}", SCORE_AGAIN
            )
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        if metadata.unit != receipt.unit or sum(sizes) != receipt.windows:
            raise UserError(f"{path}: is not the shard that its receipt describes", SCORE_AGAIN)
        rows = (receipt.input_hash, receipt.first_document, receipt.end_document)
        return [Group(path=path, index=index, windows=size, rows=rows) for index, size in enumerate(sizes)]

    def read(self, group: int) -> list[Window]:
        """The windows of one row group, their token hashes checked. Raises UserError naming the shard."""
        wanted = self.groups[group]
        return read_group(wanted.path, open_shard(self.cache.open(wanted.path)), wanted.index)


@dataclass(frozen=True, slots=True)
class Group:
    """One row group of one score shard. `rows`: the input of its unit, by hash, first and last document."""

    path: Place
    index: int
    windows: int
    rows: tuple[str, int, int]


def check_whole(layout: Layout, found: set[str], partial: bool) -> None:
    """Raise UserError unless these units are those that make the dataset whole (or, `partial`, some of them)."""
    units = read_complete(layout)
    if units is None:
        if not partial:
            raise UserError(
                f"{layout.root}: scoring has not come to its end ({len(found)} units so far)",
                "run `make score` to finish it, or train on what is there with train.partial: true",
            )
        return
    missing, extra = set(units) - found, found - set(units)
    if missing and not partial:
        raise UserError(
            f"{layout.root}: {len(missing)} of {len(units)} units have no receipt, first {min(missing)}",
            "run `make score` to score them again, or train on what is there with train.partial: true",
        )
    if extra:
        raise UserError(
            f"{layout.root}: {len(extra)} units are not part of the dataset that was scored, first {min(extra)}",
            "remove them, or run `make score` if shards were added",
        )


class MemoryWindows:
    """Windows held in memory, without scores: what plain training of a base or a reference reads."""

    columns: frozenset[str] = frozenset()

    def __init__(self, windows: list[np.ndarray], group: int = 1024):
        """Take windows of token ids; `group` of them are shuffled as one."""
        self.windows, self.group = windows, group
        self.group_sizes = np.array(
            [len(windows[i : i + group]) for i in range(0, len(windows), group)], dtype=np.int64
        )
        self.tokens = sum(len(window) for window in windows)
        self.fingerprint = digest([int(value) for value in token_hashes(windows)])

    def read(self, group: int) -> list[Window]:
        """The windows of one group."""
        start = group * self.group
        return [
            Window(doc_id=f"#{start + i}", index=0, tokens=tokens, ref_loss=None)
            for i, tokens in enumerate(self.windows[start : start + self.group])
        ]


@dataclass(frozen=True, slots=True)
class Placed:
    """A window and its place: `key` is its number in stored order, whatever the `epoch`."""

    epoch: int
    key: int
    window: Window


def ordered(source: Source, seed: int, shuffle_groups: int, position: int) -> Iterator[Placed]:
    """Windows from `position` on, without end: epoch after epoch, each in its own order.

    Example, groups of 3, 2 and 4 windows, shuffle_groups 2: the permutation 2 0 1 makes the blocks {5 6 7 8, 0 1 2} and
    {3 4}; each is shuffled in itself, so position 7 opens the second block and reads group 1 alone.
    """
    total = int(source.group_sizes.sum())
    if total == 0:
        raise UserError("the dataset holds no windows", "look at it with `tokensift inspect`")
    first_key = [0, *np.cumsum(source.group_sizes).tolist()]
    while True:
        epoch, offset = divmod(position, total)
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(source.group_sizes))
        for start in range(0, len(groups), shuffle_groups):
            block = groups[start : start + shuffle_groups]
            size = int(source.group_sizes[block].sum())
            shuffle = rng.permutation(size)
            if offset >= size:
                offset -= size
                continue
            keys = np.concatenate([np.arange(first_key[group], first_key[group + 1]) for group in block])
            windows = [window for group in block for window in source.read(int(group))]
            for index in shuffle[offset:]:
                yield Placed(epoch=epoch, key=int(keys[index]), window=windows[index])
                position += 1
            offset = 0
