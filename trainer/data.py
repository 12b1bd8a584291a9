"""Where windows come from, and in which order.

The order is a pure function of (seed, epoch) and of the dataset: row groups are permuted, then windows are
shuffled inside blocks of `shuffle_groups` row groups. Each row group is therefore read once an epoch, and any
position in the order is found without reading anything. State is one integer: windows consumed.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from schemas.errors import UserError
from schemas.fingerprint import difference
from schemas.place import Place, each
from schemas.receipt import Layout, Receipt, read_complete, read_dataset, read_receipts
from schemas.seal import digest
from schemas.shard import SCORE_AGAIN, TRAINED, Window, open_shard, read_counts, read_group, shard_metadata
from trainer.cache import Cache
from trainer.lengths import indexed
from trainer.ranks import ALONE, Ranks

READERS = 4  # threads of a rank


class Source(Protocol):
    """Windows in numbered groups, `tokens` in all. `columns`: what is stored beside their tokens.

    scored_by: what the models of their scores are known as on the hub, or the hashes of their files; made_of: what
    their corpora are known as there. conversations: whether some are of conversations.
    """

    fingerprint: str
    group_sizes: np.ndarray
    tokens: int
    columns: frozenset[str]
    scored_by: frozenset[str]
    made_of: frozenset[str]
    conversations: bool

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, int32 [windows], in stored order. Raises UserError naming a shard that is damaged."""
        ...

    def valid(self, keys: np.ndarray) -> np.ndarray:
        """Tokens that count of the windows of these numbers, int [keys]: all but the first, of conversations the trained."""
        ...

    def index(self, ranks: Ranks) -> None:
        """Have these counts ready, the work shared out over the ranks, each of which must call."""
        ...

    def read(
        self, group: int, rows: Sequence[int] | None = None, columns: Collection[str] | None = None
    ) -> list[Window]:
        """The windows of one group, in stored order, or these `rows` of it; `columns`: of `columns` only these are needed."""
        ...


class ScoreShards:
    """The committed units of a score dataset, indexed by their Parquet footers alone."""

    def __init__(self, root: Place, partial: bool = False, cache: Cache | None = None):
        """Index a dataset; `partial` accepts one whose scoring did not come to its end. `cache` opens its shards.

        Raises UserError if it is empty, unfinished or damaged, mixes settings, or holds a shard under another name.
        """
        self.root, self.cache, layout = root, cache or Cache(), Layout(root)
        self.dataset: dict[str, Any] = read_dataset(layout)
        scorer = self.dataset["scorer"]
        stored = {"ref_loss": scorer.get("engine", "") is not None, "ref_entropy": bool(scorer.get("entropy"))}
        self.columns = frozenset(name for name, there in stored.items() if there)  # none beside tokens never scored
        self.conversations = bool(self.dataset["corpus"].get("messages"))
        receipts = read_receipts(layout)
        if not receipts:
            raise UserError(f"{root}: no receipts, so no verified scores", "run `make score`")
        check_whole(layout, set(receipts), partial)
        shards = each(root, self._groups, map(layout.shard, receipts), receipts.values())
        self.groups = [group for groups in shards for group in groups]
        self.group_sizes = np.array([group.windows for group in self.groups], dtype=np.int64)
        self.fingerprint = digest([self.dataset, sorted(receipt.sha256 for receipt in receipts.values())])
        self.tokens = sum(receipt.tokens for receipt in receipts.values())
        self.scored_by = _models(self.dataset, receipts.values())
        self.made_of = frozenset(receipt.engine.get("corpus", "") for receipt in receipts.values()) - {""}
        self._counts: np.ndarray | None = None

    def _groups(self, path: Place, receipt: Receipt) -> list["Group"]:
        try:
            there = self.cache.size(path) == receipt.bytes
        except FileNotFoundError:
            there = False
        if not there:
            raise UserError(
                f"{path}: missing or not the {receipt.bytes} bytes of its receipt", "see `tokensift verify`"
            )
        file = self._open(path)
        metadata = shard_metadata(path, file)
        changed = difference(self.dataset, metadata.fingerprint)
        if changed:
            raise UserError(
                f"{path}: made with other settings than dataset.json says: {'; '.join(changed)}", SCORE_AGAIN
            )
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        marked = TRAINED in file.schema_arrow.names
        if metadata.unit != receipt.unit or sum(sizes) != receipt.windows or marked != self.conversations:
            raise UserError(f"{path}: is not the shard that its receipt describes", SCORE_AGAIN)
        rows = (receipt.input_hash, receipt.first_document, receipt.end_document)
        return [Group(path=path, index=index, windows=size, rows=rows) for index, size in enumerate(sizes)]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each window, int32 [windows], in stored order. Raises UserError naming a shard that is damaged."""
        return self._counted()[0]

    def valid(self, keys: np.ndarray) -> np.ndarray:
        """Tokens that count of the windows of these numbers, int [keys]: all but the first, of conversations the trained."""
        return self._counted()[1][keys] if self.conversations else self.lengths[keys] - 1

    def index(self, ranks: Ranks) -> None:
        """Have the counts ready: read from beside the scores, or off the shards, of which each rank takes its share."""
        kinds = 2 if self.conversations else 1
        self._counts = indexed(self.root, self.fingerprint, self.group_sizes, self._counts_of, ranks, kinds)

    def _counted(self) -> np.ndarray:
        if self._counts is None:
            self.index(ALONE)
        assert self._counts is not None
        return self._counts

    def _counts_of(self, first: int, end: int) -> Iterator[np.ndarray]:
        """Counts of the windows of row groups `first` to `end`, a shard at a time."""
        shards = [list(groups) for _, groups in groupby(self.groups[first:end], key=lambda group: group.path)]

        def read(groups: list[Group]) -> np.ndarray:
            file = self._open(groups[0].path)
            return np.concatenate([read_counts(group.path, file, group.index) for group in groups], axis=1)

        with ThreadPoolExecutor(READERS) as readers:
            yield from readers.map(read, shards)

    def read(
        self, group: int, rows: Sequence[int] | None = None, columns: Collection[str] | None = None
    ) -> list[Window]:
        """The windows of one row group, or these `rows` of it, token hashes checked. Raises UserError naming the shard."""
        wanted = self.groups[group]
        return read_group(wanted.path, self._open(wanted.path), wanted.index, rows, columns)

    def _open(self, path: Place) -> pq.ParquetFile:
        return open_shard(self.cache.open(path), losses="ref_loss" in self.columns)


def _models(dataset: dict[str, Any], receipts: Iterable[Receipt]) -> frozenset[str]:
    """Names of the models that scored a dataset, or if one has none, their hashes."""
    names = {receipt.engine.get("model", "") for receipt in receipts}
    hashes = ", ".join(f"{name} `{number[:16]}`" for name, number in sorted(dataset["model"].items()))
    return frozenset(names if "" not in names else {hashes} - {""})


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


@dataclass(frozen=True, slots=True)
class Stretch:
    """Windows that follow each other: the epoch of each, and its key, its number in stored order, int64 [windows]."""

    epochs: np.ndarray
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, which: slice | np.ndarray) -> "Stretch":
        return Stretch(self.epochs[which], self.keys[which])

    @classmethod
    def join(cls, parts: Sequence["Stretch"]) -> "Stretch":
        """One after another."""
        return cls(np.concatenate([part.epochs for part in parts]), np.concatenate([part.keys for part in parts]))


def ordered(source: Source, seed: int, shuffle_groups: int, position: int) -> Iterator[Stretch]:
    """Windows from `position` on, without end: epoch after epoch, each in its own order.

    Example, groups of 3, 2 and 4 windows, shuffle_groups 2: the permutation 2 0 1 makes the blocks {5 6 7 8, 0 1 2} and
    {3 4}; each is shuffled in itself and is a stretch, so position 7 opens the second block.
    """
    total = int(source.group_sizes.sum())
    if total == 0:
        raise UserError("the dataset holds no windows", "look at it with `tokensift inspect`")
    first_key = [0, *np.cumsum(source.group_sizes).tolist()]
    epoch, offset = divmod(position, total)
    while True:
        rng = np.random.default_rng([seed, epoch])
        groups = rng.permutation(len(source.group_sizes))
        for start in range(0, len(groups), shuffle_groups):
            block = groups[start : start + shuffle_groups]
            size = int(source.group_sizes[block].sum())
            shuffle = rng.permutation(size)
            if offset < size:
                keys = np.concatenate([np.arange(first_key[group], first_key[group + 1]) for group in block])
                yield Stretch(epochs=np.full(size - offset, epoch), keys=keys[shuffle[offset:]])
            offset = max(0, offset - size)
        epoch += 1


def block_windows(source: Source, shuffle_groups: int) -> int:
    """Most windows of a block."""
    return int(source.group_sizes.max(initial=1)) * min(shuffle_groups, len(source.group_sizes))
