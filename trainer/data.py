"""Where windows come from, and in which order.

The order is a pure function of (seed, epoch) and of the dataset: row groups are permuted, then windows are
shuffled inside blocks of `shuffle_groups` row groups. Each row group is therefore read once an epoch, and any
position in the order can be opened by reading one block. State is one integer: windows consumed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from schemas.errors import UserError
from schemas.fingerprint import difference, digest
from schemas.receipt import Layout, read_dataset, read_receipts
from schemas.shard import Window, check_windows, open_shard, shard_metadata
from schemas.window import token_hashes


class Source(Protocol):
    """Windows in numbered groups."""

    fingerprint: str
    group_sizes: np.ndarray

    def read(self, group: int) -> list[Window]:
        """The windows of one group, in stored order."""
        ...


class ScoreShards:
    """The committed units of a score dataset, indexed by their Parquet footers alone."""

    def __init__(self, root: Path):
        """Index a dataset. Raises UserError if it is empty, damaged, or mixes settings."""
        layout = Layout(root)
        self.dataset: dict[str, Any] = read_dataset(layout)
        receipts = read_receipts(layout)
        if not receipts:
            raise UserError(f"{root}: no receipts, so no verified scores; run `make score`")
        self.groups: list[tuple[Path, int]] = []
        sizes: list[int] = []
        for unit, receipt in receipts.items():
            path = layout.shard(unit)
            if not path.exists() or path.stat().st_size != receipt.bytes:
                raise UserError(
                    f"{path}: missing or not the {receipt.bytes} bytes of its receipt; see `tokensift verify`"
                )
            file = open_shard(path)
            changed = difference(self.dataset, shard_metadata(file)["fingerprint"])
            if changed:
                raise UserError(f"{path}: made with other settings than dataset.json says: {'; '.join(changed)}")
            for group in range(file.metadata.num_row_groups):
                self.groups.append((path, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self.group_sizes = np.array(sizes, dtype=np.int64)
        self.tokens = sum(receipt.tokens for receipt in receipts.values())
        self.fingerprint = digest([self.dataset, sorted(receipt.sha256 for receipt in receipts.values())])

    def read(self, group: int) -> list[Window]:
        """The windows of one row group, their token hashes checked. Raises UserError naming the shard."""
        path, index = self.groups[group]
        try:
            table = open_shard(path).read_row_group(index)
        except OSError as error:
            raise UserError(
                f"{path}: row group {index} is damaged ({error}); delete its receipt, score again"
            ) from error
        return check_windows(path, table)


class MemoryWindows:
    """Windows held in memory, without scores: what plain training of a base or a reference reads."""

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
            Window(f"#{start + i}", 0, tokens, None)
            for i, tokens in enumerate(self.windows[start : start + self.group])
        ]


@dataclass(frozen=True, slots=True)
class Placed:
    """A window and its place: `key` is its number in stored order, whatever the `epoch`."""

    epoch: int
    key: int
    window: Window


def ordered(source: Source, seed: int, shuffle_groups: int, position: int) -> Iterator[Placed]:
    """Windows from `position` on, without end: epoch after epoch, each in its own order."""
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
